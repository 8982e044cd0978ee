"""Let exchanges run while there is other work: start them early, wait for them late.

Between the start of a collective and the wait for it a rank computes what does not need its result: in a block
with attention and MLP side by side, the MLP's first half while queries, keys and values travel, its second half
while the result travels back. Collectives start in the order in which they did, which is the same on every rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile

import torch
from torch import fx

from xdit_compile.ir.flops import flops
from xdit_compile.ir.host_copy import fetched, is_fetch
from xdit_compile.ir.program import ARRIVAL, Program, brings_parameters, is_collective

WAITS = {torch.ops._c10d_functional.wait_tensor.default, fetched}

NEAR = 8
"""Work moves past no more than this many starts, back or forth: what is made early or read late is kept long, and
where a model does one frame after the other, none may be begun or ended far from its turn."""


def overlap(program: Program) -> Program:
    """Needs a lowered program; guarantees the same nodes in an order in which collectives overlap with work."""
    starting = {name for name, module in program.functions() if name != "main" and any(
        is_collective(n) for n in module.graph.nodes)}
    functions = {name: _Schedule(module.graph, starting).run() for name, module in program.functions()}
    return program.rebuilt(functions)


class _Schedule:
    """Emits nodes on demand: first all that the next start needs, a wait only when its result is asked for."""

    def __init__(self, graph: fx.Graph, starting: set[str]) -> None:
        self.left = dict.fromkeys(graph.nodes)
        """What is not emitted yet, in order."""
        self.place = {n: i for i, n in enumerate(graph.nodes)}
        self.inputs = {n: n.all_input_nodes for n in graph.nodes}
        # A rank to which nothing is sent reads no result, but waits like the others.
        *before, output = self.left
        self.inputs[output] = before
        self.starts = {n: None for n in graph.nodes if (is_collective(n) and n.target not in WAITS) or is_fetch(n)
                       or (n.op == "call_module" and n.target in starting)}
        self._one_ahead(graph)
        self.new = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}

    def run(self) -> fx.Graph:
        for node in [n for n in self.left if n.op == "placeholder"]:
            self._emit(node)
        goals = [*self.starts, next(reversed(self.left))]
        for i, goal in enumerate(goals):
            if i >= NEAR:
                for node in self._until(goals[i - NEAR]):
                    self._emit(node)
            left = min(len(goals) - i, NEAR)
            self._towards(goal, goals[i + left - 1], share=1 / left)
        return self.new

    def _one_ahead(self, graph: fx.Graph) -> None:
        """Parameters come when what came two arrivals before has been read and the arrival before is here: memory
        holds no more than two of them."""
        readers: dict[int, list[fx.Node]] = {}
        waits = {n.meta[ARRIVAL]: n for n in graph.nodes if n.target in WAITS and brings_parameters(n)}
        for node in (n for n in graph.nodes if not brings_parameters(n)):
            for number in {n.meta[ARRIVAL] for n in node.all_input_nodes if brings_parameters(n)}:
                readers.setdefault(number, []).append(node)
        for start in self.starts:
            if brings_parameters(start):
                number = start.meta[ARRIVAL]
                before = [*readers.get(number - 2, ()), *([waits[number - 1]] if number - 1 in waits else ())]
                self.inputs[start] = [*self.inputs[start], *(n for n in before if self.place[n] < self.place[start])]

    def _towards(self, goal: fx.Node, end: fx.Node, share: float) -> None:
        """Emit ``goal`` and what it needs; before its first wait also ``share`` of the work before ``end`` that could
        be done now."""
        needed = self._needed(goal)
        late = self._late(n for n in needed if n is not goal)
        for node in needed:
            if node not in late and node is not goal:
                self._emit(node)
        if late:
            near = self._until(end)
            late = self._late(near)
            free = [n for n in near if n not in late and n is not goal]
            budget = share * sum(map(_cost, free))
            for node in free:
                if budget <= 0:
                    break
                budget -= _cost(node)
                self._emit(node)
        for node in needed:
            if node in self.left:
                self._emit(node)

    def _until(self, end: fx.Node) -> list[fx.Node]:
        """What is left up to ``end``, in order."""
        return list(takewhile(lambda n: self.place[n] <= self.place[end], self.left))

    def _needed(self, goal: fx.Node) -> list[fx.Node]:
        """``goal`` and all it depends on, as far as it is left, in order."""
        found, stack = {goal}, [goal]
        while stack:
            new = [n for n in self.inputs[stack.pop()] if n in self.left and n not in found]
            found.update(new)
            stack += new
        return sorted(found)

    def _late(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """Those of ``nodes``, in order, that cannot be had without another wait or start."""
        late: set[fx.Node] = set()
        for node in nodes:
            if node.target in WAITS or node in self.starts or any(n in late for n in self.inputs[node]):
                late.add(node)
        return late

    def _emit(self, node: fx.Node) -> None:
        self.env[node] = self.new.node_copy(node, lambda n: self.env[n])
        del self.left[node]


def _cost(node: fx.Node) -> float:
    """Rough work: reading and writing an element counts as a few operations."""
    value, schema = node.meta.get("val"), getattr(node.target, "_schema", None)
    if not isinstance(value, torch.Tensor) or schema is None or schema.returns[0].alias_info:
        return 0
    args = [a.meta["val"].shape if isinstance(a, fx.Node) and isinstance(a.meta["val"], torch.Tensor) else a
            for a in node.args]
    return flops(node.target, args, value.shape) + 8 * value.numel()
