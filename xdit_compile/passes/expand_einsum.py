"""Einsum in the terms that have rules: sums, permutations, and products of two operands at a time."""

from __future__ import annotations

import math
import string
from collections import Counter
from collections.abc import Sequence

import torch
from torch import fx

from xdit_compile.ir.program import drop_unused
from xdit_compile.passes.graph_editor import Editor, val

aten = torch.ops.aten

Term = tuple[str, fx.Node]
"""An operand, and a letter for each of its dimensions."""


def expand_einsum(graph: fx.Graph) -> None:
    """Rewrite every einsum, but for those that read a diagonal (a letter twice in one operand)."""
    for node in graph.find_nodes(op="call_function", target=aten.einsum.default):
        equation, operands = node.args
        letters, out = _letters(equation, [val(x).ndim for x in operands])
        if any(max(Counter(term).values(), default=1) > 1 for term in letters):
            continue
        edit, dtype = Editor(node), val(node).dtype
        # Without a letter to sum over, einsum multiplies elements, of whatever dtypes.
        operands = [x if val(x).dtype == dtype else edit.call(aten._to_copy.default, x, dtype=dtype) for x in operands]
        terms = _without_repeats(edit, list(zip(letters, operands, strict=True)))
        path = list(node.kwargs.get("path") or [])
        while len(terms) > 1:
            # As PyTorch does: along the path that its optimiser found, else from the left.
            first, second = sorted((path.pop(0), path.pop(0))) if path else (0, 1)
            right, left = terms.pop(second), terms.pop(first)
            wanted = set(out).union(*(term for term, _ in terms))
            terms.insert(len(terms) if node.kwargs.get("path") else 0, _product(edit, left, right, wanted))
        term, x = _summed(edit, terms[0], set(out))
        edit.replace_with(edit.call(aten.permute.default, x, [term.index(c) for c in out]))
    drop_unused(graph)


def _letters(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """A letter for each dimension of the operands and of the result, also of those that dots and no arrow imply."""
    sides = equation.replace(" ", "").split("->")
    terms = sides[0].split(",")
    free = [c for c in string.printable if c.isalnum() is False and c not in ".,->" and not c.isspace()]
    dotted = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True) if "..." in term]
    more = "".join(free[: max(dotted, default=0)])
    full = [term.replace("...", more[len(more) - (rank - len(term.replace("...", ""))) :])
            for term, rank in zip(terms, ranks, strict=True)]
    counts = Counter(c for c in sides[0] if c.isalpha())
    out = sides[1] if len(sides) > 1 else "..." * bool(dotted) + "".join(sorted(c for c, n in counts.items() if n == 1))
    return full, out.replace("...", more)


def _without_repeats(edit: Editor, terms: list[Term]) -> list[Term]:
    """Dimensions of size one that are repeated, as another operand has more of that letter, are left away."""
    sizes: dict[str, int] = {}
    for term, x in terms:
        sizes |= {c: max(n, sizes.get(c, 1)) for c, n in zip(term, val(x).shape, strict=True)}
    made = []
    for term, x in terms:
        alone = [i for i, c in enumerate(term) if val(x).shape[i] < sizes[c]]
        kept = "".join(c for i, c in enumerate(term) if i not in alone)
        made.append((kept, edit.call(aten.squeeze.dims, x, alone) if alone else x))
    return made


def _summed(edit: Editor, term: Term, wanted: set[str]) -> Term:
    """Without the letters that nobody wants."""
    letters, x = term
    gone = [i for i, c in enumerate(letters) if c not in wanted]
    return "".join(c for c in letters if c in wanted), edit.call(aten.sum.dim_IntList, x, gone) if gone else x


def _product(edit: Editor, left: Term, right: Term, wanted: set[str]) -> Term:
    """The two operands as one: a matrix product where letters are summed, else a product of elements."""
    left = _summed(edit, left, wanted | set(right[0]))
    right = _summed(edit, right, wanted | set(left[0]))
    sizes = {c: n for term, x in (left, right) for c, n in zip(term, val(x).shape, strict=True)}
    batch = [c for c in left[0] if c in right[0] and c in wanted]
    summed = [c for c in left[0] if c in right[0] and c not in wanted]
    rows, columns = [c for c in left[0] if c not in right[0]], [c for c in right[0] if c not in left[0]]

    def arranged(term: Term, *groups: list[str]) -> fx.Node:
        letters, x = term
        x = edit.call(aten.permute.default, x, [letters.index(c) for c in [*batch, *groups[0], *groups[1]]])
        shape = [*(sizes[c] for c in batch), *(math.prod(sizes[c] for c in g) for g in groups)]
        return x if list(val(x).shape) == shape else edit.call(aten.reshape.default, x, shape)

    operator = aten.matmul.default if summed else aten.mul.Tensor
    product = edit.call(operator, arranged(left, rows, summed), arranged(right, summed, columns))
    order = [*batch, *rows, *columns]
    if list(val(product).shape) != [sizes[c] for c in order]:
        product = edit.call(aten.reshape.default, product, [sizes[c] for c in order])
    return "".join(order), product
