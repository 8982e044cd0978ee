"""Find the first value that ranks hold wrongly: in ``main``, then inside the first block that returns one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import fx

from xdit_compile.diagnostics.difference import Difference
from xdit_compile.diagnostics.side_by_side import Finding, arguments_of_call, findings
from xdit_compile.ir.layout import Position
from xdit_compile.ir.program import Program, module_of, source_of

MOST = 5
"""How many differing values are named: the first is to blame, the next show how the error spreads."""

Gather = Callable[[Any], Sequence[Any]]
"""Gives every rank what each of them holds, in rank order."""


@dataclass(frozen=True)
class NodeDifference:
    """A value of the global program of which the pieces of some ``ranks`` are wrong.

    ``function`` is the graph that ``node`` stands in; for a block function ``module`` lies in the block that
    was called. ``absolute`` and ``relative`` are the largest differences on any rank.
    """

    function: str
    node: str
    operator: str
    module: str
    source: str
    layout: str
    absolute: float
    relative: float
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """A global function and its local form, each with what it is given."""

    name: str
    whole: fx.GraphModule
    local: fx.GraphModule
    whole_arguments: Sequence[torch.Tensor]
    local_arguments: Sequence[torch.Tensor]

    def inside(self, call: fx.Node) -> Pair:
        """The block function that ``call`` calls. Runs both functions up to that call."""
        (mine,) = (n for n in self.local.graph.find_nodes(op="call_module") if n.meta["origin"] == call.name)
        return Pair(
            str(call.target), getattr(self.whole, str(call.target)), getattr(self.local, str(mine.target)),
            arguments_of_call(self.whole, self.whole_arguments, call),
            arguments_of_call(self.local, self.local_arguments, mine))


def first_differences(main: Pair, position: Position, tolerance: float,
                      gather: Gather) -> tuple[NodeDifference, ...]:
    """The first values that differ by more than ``tolerance`` on any rank, in the order they are made in.

    Every rank calls this and runs all collectives of its program, whatever it finds by itself; what to look
    into next is decided from what all ranks found.
    """
    found = _differing(main, position, tolerance, gather)
    nodes = {n.name: n for n in main.whole.graph.nodes}
    if found and nodes[found[0].node].op == "call_module":
        call = nodes[found[0].node]
        inner = _differing(main.inside(call), position, tolerance, gather, call)
        return (inner or found)[:MOST]
    return found[:MOST]


def _differing(pair: Pair, position: Position, tolerance: float, gather: Gather,
               call: fx.Node | None = None) -> tuple[NodeDifference, ...]:
    mine = [f for f in findings(pair.whole, pair.local, pair.whole_arguments, pair.local_arguments, position)
            if f.difference.exceeds(tolerance)]
    by_value: dict[tuple[int, str, str], dict[int, Finding]] = defaultdict(dict)
    for rank, theirs in enumerate(gather([astuple(f) for f in mine])):
        for finding in (Finding(order, node, layout, Difference(*d)) for order, node, layout, d in theirs):
            by_value[finding.order, finding.node, finding.layout][rank] = finding
    nodes = {n.name: n for n in pair.whole.graph.nodes}
    differing = []
    for (_, name, layout), held in sorted(by_value.items(), key=lambda item: item[0][0]):
        node, found = nodes[name], [f.difference for f in held.values()]
        differing.append(NodeDifference(
            pair.name, name, str(node.target), _module(node, call), source_of(node), layout,
            max(d.absolute for d in found), max(d.relative for d in found), tuple(held)))
    return tuple(differing)


def _module(node: fx.Node, call: fx.Node | None) -> str:
    """The node's module path; inside a shared block function, with the path of the block that was called."""
    path = module_of(node)
    if call is None:
        return path
    blocks = [module_of(n) for n in call.graph.find_nodes(op="call_module") if n.target == call.target]
    example = next((b for b in blocks if path == b or path.startswith(f"{b}.")), path)
    return module_of(call) + path.removeprefix(example)


def arguments_of(program: Program, state: dict[str, torch.Tensor],
                 tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What ``main`` is called with, from the model's ``state`` by name and the tensors of the call."""
    given = iter(tensors)
    tables = {"parameter": state, "constant": program.constants}
    return [next(given) if i.kind == "argument" else tables[i.kind][i.name] for i in program.inputs]
