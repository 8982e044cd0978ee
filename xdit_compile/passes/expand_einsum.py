"""Einsum in the terms that have rules: permutations and one matrix product with its batch dimensions kept."""

from __future__ import annotations

import math

import torch
from torch import fx

from xdit_compile.ir.program import drop_unused
from xdit_compile.passes.graph_editor import Editor, val

aten = torch.ops.aten


def expand_einsum(graph: fx.Graph) -> None:
    """Rewrite every einsum of one or two operands without repeated or summed-away letters; others stay as they are
    (computed whole where they meet a sharded value)."""
    for node in graph.find_nodes(op="call_function", target=aten.einsum.default):
        equation, operands = node.args
        sides = equation.replace(" ", "").split("->")
        terms = sides[0].split(",")
        letters = [set(t) for t in terms]
        if len(sides) < 2 or "." in equation or any(len(s) < len(t) for s, t in zip(letters, terms, strict=True)):
            continue
        out = sides[1]
        edit, dtype = Editor(node), val(node).dtype
        # Without a letter to sum over, einsum multiplies elements, of whatever dtypes.
        operands = [x if val(x).dtype == dtype else edit.call(aten._to_copy.default, x, dtype=dtype) for x in operands]
        if len(terms) == 1 and letters[0] == set(out):
            edit.replace_with(edit.call(aten.permute.default, operands[0], [terms[0].index(c) for c in out]))
        elif len(terms) == 2 and (letters[0] ^ letters[1]) <= set(out) <= letters[0] | letters[1]:
            edit.replace_with(_product(edit, terms, out, operands))
    drop_unused(graph)


def _product(edit: Editor, terms: list[str], out: str, operands: list[fx.Node]) -> fx.Node:
    left, right = terms
    sizes = {c: n for term, x in zip(terms, operands, strict=True) for c, n in zip(term, val(x).shape, strict=True)}
    batch = [c for c in out if c in left and c in right]
    summed = [c for c in left if c in right and c not in out]
    rows, columns = [c for c in out if c not in right], [c for c in out if c not in left]

    def arranged(x: fx.Node, term: str, *groups: list[str]) -> fx.Node:
        x = edit.call(aten.permute.default, x, [term.index(c) for c in [*batch, *groups[0], *groups[1]]])
        shape = [*(sizes[c] for c in batch), *(math.prod(sizes[c] for c in g) for g in groups)]
        return x if list(val(x).shape) == shape else edit.call(aten.reshape.default, x, shape)

    product = edit.call(aten.matmul.default, arranged(operands[0], left, rows, summed),
                        arranged(operands[1], right, summed, columns))
    order = [*batch, *rows, *columns]
    shape = [sizes[c] for c in order]
    if list(val(product).shape) != shape:
        product = edit.call(aten.reshape.default, product, shape)
    return edit.call(aten.permute.default, product, [order.index(c) for c in out])
