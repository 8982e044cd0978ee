"""The most memory that activations take at once, from how long each value of a graph lives.

A graph runs node after node and drops a value after its last use. Views hold on to the tensor they look at
and cost nothing; a call of a block function costs what lives in the caller and, on top, its own peak. Left
out: parameters, the call's inputs (the caller holds them) and the scratch memory of kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from xdit_compile.ir.program import Program

WAIT = torch.ops._c10d_functional.wait_tensor.default


def peak_activations(program: Program) -> int:
    """Bytes at the worst moment of one forward."""
    functions = dict(program.functions())
    blocks = {name: _footprint(module.graph, {}) for name, module in functions.items() if name != "main"}
    return _footprint(functions["main"].graph, blocks).peak


def result_bytes(program: Program) -> int:
    """Bytes that the results of one forward hold on to; not those of the call's inputs."""
    functions = dict(program.functions())
    blocks = {name: _footprint(module.graph, {}) for name, module in functions.items() if name != "main"}
    return sum(b.size for b in set(_footprint(functions["main"].graph, blocks).results))


@dataclass(eq=False)
class _Buffer:
    """A stretch of memory, in bytes. An argument's belongs to the caller and counts as nothing here."""

    size: int
    argument: int | None = None
    last: int = 0
    """The index of the last node that reads it."""


@dataclass(frozen=True)
class _Footprint:
    """A function's peak in bytes, and the buffers in which its results lie."""

    peak: int
    results: tuple[_Buffer, ...]


def _footprint(graph: fx.Graph, blocks: Mapping[str, _Footprint]) -> _Footprint:
    held = _buffers(graph, blocks)
    nodes = list(graph.nodes)
    for i, node in enumerate(nodes):
        for used in (node, *node.all_input_nodes):
            for buffer in held[used]:
                buffer.last = i
    peak = live = 0
    alive: set[_Buffer] = set()
    for i, node in enumerate(nodes):
        if node.op == "call_module":
            peak = max(peak, live + blocks[str(node.target)].peak)
        new = set(held[node]) - alive
        live += sum(b.size for b in new)
        peak = max(peak, live)
        alive |= new
        dead = {b for b in alive if b.last == i}
        live -= sum(b.size for b in dead)
        alive -= dead
    return _Footprint(peak, held[graph.output_node()])


def _buffers(graph: fx.Graph, blocks: Mapping[str, _Footprint]) -> dict[fx.Node, tuple[_Buffer, ...]]:
    """Of each node, the buffer behind each of its results."""
    held: dict[fx.Node, tuple[_Buffer, ...]] = {}
    arguments = 0
    for node in graph.nodes:
        if node.op == "placeholder":
            held[node] = (_Buffer(0, argument=arguments),)
            arguments += 1
        elif node.op == "output":
            held[node] = tuple(held[n][0] for n in node.args[0])
        elif node.op == "call_module":
            results = blocks[str(node.target)].results
            here = {b: _Buffer(b.size) if b.argument is None else held[node.args[b.argument]][0]
                    for b in results}
            held[node] = tuple(here[b] for b in results)
        elif isinstance(node.meta["val"], (tuple, list)):
            shared = held[node.args[0]] * len(node.meta["val"]) if _is_view(node) else ()
            held[node] = shared or tuple(_Buffer(_size(v)) for v in node.meta["val"])
        elif _is_item(node):
            held[node] = (held[node.args[0]][node.args[1]],)
        else:
            held[node] = held[node.args[0]] if _is_view(node) else (_Buffer(_size(node.meta["val"])),)
    return held


def _size(value: torch.Tensor) -> int:
    return value.numel() * value.dtype.itemsize


def _is_item(node: fx.Node) -> bool:
    """Whether the node picks one of several results of another."""
    return isinstance(node.args[0], fx.Node) and isinstance(node.args[0].meta["val"], (tuple, list)) if (
        node.args) else False


def _is_view(node: fx.Node) -> bool:
    """Whether the result looks at the memory of the first argument. Operators such as reshape say only that
    they may; PyTorch's fake kernels know for these strides."""
    if node.target is WAIT:
        return True
    schema = getattr(node.target, "_schema", None)
    if schema is None or not any(r.alias_info for r in schema.returns):
        return False
    operands: Any = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    args, kwargs = operands
    with args[0].fake_mode, torch.no_grad():
        made: Any = node.target(*args, **kwargs)  # type: ignore[operator]
    first = made[0] if isinstance(made, (tuple, list)) else made
    return first.untyped_storage()._cdata == args[0].untyped_storage()._cdata
