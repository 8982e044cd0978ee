"""Which values of a graph are used as weights, and which of those were smaller as parameters."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from xdit_compile.ir.flops import FORMULAS, aten

WEIGHED = FORMULAS.keys() - {aten.scaled_dot_product_attention.default}
"""Operators whose operands after the first may be weights."""


def is_weight(node: fx.Node) -> bool:
    """Whether a value is used where weights are."""
    return any((user.target in WEIGHED and node in user.args[1:]) or (
        user.target is aten.embedding.default and node is user.args[0]) for user in node.users)


def unpacked(node: fx.Node, asked: Collection[fx.Node]) -> bool:
    """Whether a value is a weight that was smaller as parameters, packed or of a smaller type: it is made each time
    that it is used, so that there is one of them at a time. ``asked``: what depends on arguments."""
    if node in asked or not is_weight(node):
        return False
    roots, queue, seen = set[fx.Node](), [node], {node}
    while queue:
        for before in queue.pop().all_input_nodes:
            if before.op == "placeholder":
                roots.add(before)
            elif before not in seen:
                seen.add(before)
                queue.append(before)
    return all(isinstance(n.meta["val"], torch.Tensor) for n in (node, *roots)) and _nbytes(node) > sum(
        map(_nbytes, roots))


def _nbytes(node: fx.Node) -> int:
    return int(node.meta["val"].numel() * node.meta["val"].element_size())
