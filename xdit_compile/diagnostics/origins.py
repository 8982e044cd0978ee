"""Which node of the local program holds which value of the global one.

Every local node says on whose behalf it was made (``origin``). Where a rule has to lay out its operands
first, these come before the result and may look like it, so the value of a global node is the last local one
that was made for it and has its shape.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from xdit_compile.ir.layout import Layout
from xdit_compile.ir.program import Program


@dataclass(frozen=True)
class Piece:
    """``node`` of a local graph holds this rank's piece of a global value: of ``origin``, or, where that
    returns several tensors, of its ``index``-th."""

    node: fx.Node
    origin: fx.Node
    index: int | None

    @property
    def layout(self) -> Layout:
        return self.node.meta["layout"]


def global_functions(whole: Program, local: Program) -> dict[str, str]:
    """Of each function of the local program, the name of the global one it was made from."""
    calls = {n.name: str(n.target) for n in whole.main.graph.find_nodes(op="call_module")}
    made = {str(n.target): calls[n.meta["origin"]] for n in local.main.graph.find_nodes(op="call_module")}
    return {"main": "main"} | made


def pieces(whole: fx.Graph, local: fx.Graph) -> dict[fx.Node, Piece]:
    """By local node, in order: every one that holds a piece of a value of the global graph."""
    by_name = {n.name: n for n in whole.nodes}
    last: dict[tuple[str, int | None], Piece] = {}
    for node in local.nodes:
        origin, layout = by_name.get(node.meta.get("origin", "")), node.meta.get("layout")
        if origin is None or layout is None:
            continue
        several = not isinstance(origin.meta["val"], torch.Tensor)
        index = node.args[1] if several and node.target is operator.getitem else None
        value = origin.meta["val"][index] if index is not None else origin.meta["val"]
        if isinstance(value, torch.Tensor) and layout.shape == tuple(value.shape):
            last[origin.name, index] = Piece(node, origin, index)
    return {p.node: p for p in sorted(last.values(), key=lambda p: p.node)}
