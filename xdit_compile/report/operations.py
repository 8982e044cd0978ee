"""Floating-point operations of a program, from the shapes in its graphs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from xdit_compile.ir.flops import attention_flops, flops
from xdit_compile.ir.program import Program

ours = torch.ops.xdit_compile
KERNELS = {ours.attention.default, ours.attention_lse.default}


def node_flops(node: fx.Node) -> int:
    """Operations of one node, each time it runs; element-wise work counts as none."""
    if node.op != "call_function":
        return 0
    shapes = [_shape(a) for a in node.args]
    if node.target in KERNELS:
        return attention_flops(*shapes[:3])
    out = node.meta["val"]
    return flops(node.target, shapes, out.shape) if isinstance(out, torch.Tensor) else 0


def contractions(program: Program) -> Iterator[tuple[str, fx.Node, int]]:
    """Every node that costs operations: its function, the node, and its operations in one forward."""
    calls = program.calls()
    for name, module in program.functions():
        for node in module.graph.nodes:
            cost = node_flops(node) * calls[name]
            if cost:
                yield name, node, cost


def program_flops(program: Program) -> int:
    """Operations of one forward."""
    return sum(cost for _, _, cost in contractions(program))


def _shape(argument: Any) -> Any:
    if isinstance(argument, fx.Node) and isinstance(argument.meta["val"], torch.Tensor):
        return argument.meta["val"].shape
    return argument
