"""Run a global program and one rank's local program together, and compare every value that both compute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from xdit_compile.diagnostics.difference import Difference, difference, magnitude, piece_of
from xdit_compile.diagnostics.origins import pieces
from xdit_compile.ir.layout import Position

OUTPUT = "output"


@dataclass(frozen=True)
class Step:
    """A node that has just run, what it was given and what it returned."""

    node: fx.Node
    args: Sequence[Any]
    value: Any


@dataclass(frozen=True)
class Finding:
    """A value whose piece on this rank was compared: ``node`` of the global graph, the ``order``-th there."""

    order: int
    node: str
    layout: str
    difference: Difference


def steps(module: fx.GraphModule, arguments: Sequence[Any]) -> Iterator[Step]:
    """Run a graph node by node; a value is dropped after its last use."""
    last = {used: node for node in module.graph.nodes for used in node.all_input_nodes}
    held: dict[fx.Node, Any] = {}
    given = iter(arguments)
    for node in module.graph.nodes:
        operands: Any = fx.map_arg((node.args, node.kwargs), held.__getitem__)
        args, kwargs = operands
        if node.op == "placeholder":
            held[node] = next(given)
        elif node.op == "output":
            held[node] = args[0]
        else:
            function = getattr(module, node.target) if node.op == "call_module" else node.target
            held[node] = function(*args, **kwargs)
        yield Step(node, args, held[node])
        for used in node.all_input_nodes:
            if last[used] is node:
                del held[used]


def findings(whole: fx.GraphModule, local: fx.GraphModule, whole_arguments: Sequence[Any],
             local_arguments: Sequence[Any], position: Position) -> Iterator[Finding]:
    """Run both to their ends and compare; results that wait for a sum over ranks are passed over."""
    held = {node: p for node, p in pieces(whole.graph, local.graph).items() if p.layout.partial is None}
    order = {node: i for i, node in enumerate(whole.graph.nodes)}
    awaited = Counter(p.origin for p in held.values())
    reference = steps(whole, whole_arguments)
    expected: dict[fx.Node, Any] = {}

    def value_of(origin: fx.Node) -> Any:
        while origin not in expected:
            step = next(reference)
            if step.node in awaited or step.node.op == OUTPUT:
                expected[step.node] = step.value
        return expected[origin]

    for step in steps(local, local_arguments):
        if step.node.op == OUTPUT:
            end = whole.graph.output_node()
            for node, a, b in zip(end.args[0], step.value, value_of(end), strict=True):  # type: ignore[arg-type]
                if a.shape == b.shape:
                    yield Finding(order[end], OUTPUT, f"result {node}", difference(a, b))
        elif step.node in held:
            piece = held[step.node]
            whole_value = value_of(piece.origin)
            whole_value = whole_value if piece.index is None else whole_value[piece.index]
            mine = piece_of(whole_value, piece.layout, position)
            yield Finding(order[piece.origin], piece.origin.name, str(piece.layout),
                          difference(step.value, mine, magnitude(whole_value)))
            awaited[piece.origin] -= 1
            if not awaited[piece.origin]:
                del expected[piece.origin]


def arguments_of_call(module: fx.GraphModule, arguments: Sequence[Any],
                      call: fx.Node) -> Sequence[torch.Tensor]:
    """What a call of a block function is given; ``module`` runs up to and including it."""
    return next(step.args for step in steps(module, arguments) if step.node is call)
