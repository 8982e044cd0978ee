"""Parameters that are cut over ranks, or wait in the host's memory, come to the device one block ahead of their use.

In place of its parameters a program takes this rank's share of each group of them (``ir/parameter_groups.py``). While
a group is in use the next one is gathered; what was gathered dies after its last use, as any value does. Which group
comes when is decided from the global program, so that it is the same on every rank.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from xdit_compile.errors import PlanError
from xdit_compile.ir.carried_types import CARRIED
from xdit_compile.ir.host_copy import fetch, fetched
from xdit_compile.ir.layout import Position
from xdit_compile.ir.mesh import SHARD, group_name
from xdit_compile.ir.parameter_groups import Member, ParameterGroup, by_member, groups_of
from xdit_compile.ir.program import ARRIVAL, Input, Note, Program
from xdit_compile.passes.emitter import Emitter

aten = torch.ops.aten
c10d = torch.ops._c10d_functional

APART = 2
"""A group that is read again after so many others have come comes again, rather than stay all the time."""


@dataclass(frozen=True)
class Arrival:
    """A group that comes to the device, and goes.

    Attributes:
        place: of the first node that reads it, among those of the global ``main``; readers: the names of all.
    """

    group: ParameterGroup
    place: int
    readers: frozenset[str]


def parameters_of(program: Program) -> tuple[ParameterGroup, ...]:
    """The groups of those parameters that a program takes, where nothing is known of the model."""
    holders = program.main.graph.find_nodes(op="placeholder")
    return groups_of((i.name, n.meta["val"]) for n, i in zip(holders, program.inputs, strict=True)
                     if i.kind == "parameter")


def arrivals(program: Program, groups: Sequence[ParameterGroup]) -> tuple[Arrival, ...]:
    """In which order the groups come that the global ``program`` reads."""
    held = _members(program, groups)
    found: list[tuple[ParameterGroup, int, set[str]]] = []
    last: dict[str, tuple[int, int]] = {}
    """Of each group the number of its arrival, and how many had come when it was last read."""
    for place, node in enumerate(program.main.graph.nodes):
        for group in dict.fromkeys(held[n][0] for n in node.all_input_nodes if n in held):
            number, count = last.get(group.name, (-1, -APART))
            if number < 0 or len(found) - count >= APART:
                number = len(found)
                found.append((group, place, set()))
            found[number][2].add(node.name)
            last[group.name] = number, len(found)
    return tuple(Arrival(group, place, frozenset(readers)) for group, place, readers in found)


def shard_parameters(program: Program, order: Sequence[Arrival], whole: Program, position: Position,
                     sizes: dict[str, int], mode: FakeTensorMode) -> Program:
    """Needs a lowered program made of ``whole``; guarantees that it takes shares of what comes in ``order`` instead of
    these parameters, and that the next arrival is under way when the first node reads one."""
    assert program.spec is not None
    if not order:
        return program
    rewriter = _Rewriter(program, order, whole, Emitter(mode, position, sizes))
    main = rewriter.run()
    graphs = {name: module.graph for name, module in program.functions()} | {"main": main}
    return program.rebuilt(graphs, inputs=tuple(rewriter.inputs), notes=(*program.notes, *rewriter.notes))


class _Rewriter:
    """Copies ``main`` and brings parameters."""

    def __init__(self, program: Program, order: Sequence[Arrival], whole: Program, emitter: Emitter) -> None:
        assert program.spec is not None
        self.program, self.order, self.emitter = program, order, emitter
        self.ranks, self.offload = program.spec.shard_degree, program.spec.offload != "none"
        self.held = _members(program, [a.group for a in order])
        self.places = {node.name: place for place, node in enumerate(whole.main.graph.nodes)}
        self.inputs: list[Input] = []
        self.notes: list[Note] = []
        self.shares: dict[str, fx.Node] = {}
        self.coming: list[fx.Node] = []
        """What each arrival so far is under way as."""
        self.copies: dict[int, fx.Node] = {}
        self.pieces: dict[int, fx.Node] = {}
        """What each arrival that was waited for is taken apart as."""
        self.views: dict[tuple[int, Member], fx.Node] = {}

    def run(self) -> fx.Graph:
        graph, env = self.emitter.graph, dict[fx.Node, fx.Node]()
        holders = self.program.main.graph.find_nodes(op="placeholder")
        devices = {group.name: n.meta["val"].device for n, (group, _) in self.held.items()}
        for arrival in self.order:
            if arrival.group.name not in self.shares:
                self._take(arrival.group, devices[arrival.group.name])
        for node, given in zip(holders, self.program.inputs, strict=True):
            if node not in self.held:
                env[node] = graph.node_copy(node)
                self.inputs.append(given)
        at = -1
        for node in (n for n in self.program.main.graph.nodes if n.op != "placeholder"):
            at = max(at, self.places.get(node.meta.get("origin", node.name), at))
            while len(self.coming) < len(self.order) and (
                    not self.coming or node.op == "output" or self.order[len(self.coming) - 1].place <= at):
                self._start(len(self.coming))
            if node.op == "output":
                for number in range(len(self.order)):
                    self._arrived(number)
            read = {n: self._read(node, n) for n in node.all_input_nodes if n in self.held}
            env[node] = graph.node_copy(node, lambda n, read=read: read[n] if n in read else env[n])
        return graph

    def _take(self, group: ParameterGroup, device: torch.device) -> None:
        """A further input: this rank's share of ``group``."""
        node = self.emitter.graph.placeholder(f"share_{len(self.shares)}")
        with self.emitter.mode:
            node.meta["val"] = torch.empty(group.share(self.ranks), dtype=group.dtype,
                                           device="cpu" if self.offload else device)
        self.shares[group.name] = node
        self.inputs.append(Input("parameter_share", group.name))
        node.meta["device"] = device

    def _start(self, number: int) -> None:
        """Let an arrival begin, once the one before has come: two under way would take more memory and come no sooner.
        With both, a share is copied from the host one arrival ahead of being gathered."""
        if number:
            self._arrived(number - 1)
        if self.offload:
            ahead = range(number, min(number + (2 if self.ranks > 1 else 1), len(self.order)))
            for copy in (n for n in ahead if n not in self.copies):
                share = self.shares[self.order[copy].group.name]
                self.copies[copy] = self._call(copy, fetch, share, share.meta["device"])
        share = self.copies.get(number, self.shares[self.order[number].group.name])
        if self.ranks > 1:
            if self.offload:
                share = self._call(number, fetched, share)
            group = self.order[number].group
            size = (self.ranks - 1) * group.share(self.ranks) * group.dtype.itemsize
            self.notes.append(Note("collective", f"arrival_{number}", "all_gather: parameters, one block ahead",
                                   module=group.path, size=size))
            if group.dtype not in CARRIED:
                share = self._call(number, aten.view.dtype, share, torch.uint8)
            share = self._call(number, c10d.all_gather_into_tensor.default, share, self.ranks,
                               group_name(SHARD, self.emitter.sizes))
        self.coming.append(share)

    def _arrived(self, number: int) -> fx.Node:
        """The parameters that have come, and the gaps between them: views of one memory."""
        if number not in self.pieces:
            memory, sizes = self.coming[number], list[int]()
            if self.ranks > 1 or self.offload:
                memory = self._call(number, c10d.wait_tensor.default if self.ranks > 1 else fetched, memory)
            group = self.order[number].group
            if memory.meta["val"].dtype != group.dtype:
                memory = self._call(number, aten.view.dtype, memory, group.dtype)
            ends = [*(m.offset for m in group.members[1:]), group.share(self.ranks) * self.ranks]
            for member, end in zip(group.members, ends, strict=True):
                sizes += [member.size, end - member.offset - member.size]
            self.pieces[number] = self._call(number, aten.split_with_sizes.default, memory, sizes)
        return self.pieces[number]

    def _view(self, number: int, member: Member) -> fx.Node:
        """A parameter that has come, as the model has it."""
        if (number, member) not in self.views:
            at = 2 * self.order[number].group.members.index(member)
            made = self._call(number, operator.getitem, self._arrived(number), at)
            made = self._call(number, aten.view.default, made, [member.shape[i] for i in member.order])
            if member.order != tuple(range(len(member.order))):
                back = [member.order.index(i) for i in range(len(member.order))]
                made = self._call(number, aten.permute.default, made, back)
            self.views[number, member] = made
        return self.views[number, member]

    def _read(self, node: fx.Node, parameter: fx.Node) -> fx.Node:
        """``parameter``, for ``node`` to read."""
        group, member = self.held[parameter]
        came = [i for i, a in enumerate(self.order[:len(self.coming)]) if a.group == group]
        if not came:
            raise PlanError(f"{node.name} reads {member.name} before it comes")
        origin = node.meta.get("origin", node.name)
        return self._view(next((i for i in came if origin in self.order[i].readers), came[-1]), member)

    def _call(self, number: int, target: Callable[..., Any], *args: Any) -> fx.Node:
        node = self.emitter.call(target, *args)
        # Bytes that are looked at otherwise are made contiguous.
        for made in (node, *(n for n in node.all_input_nodes if n.target is aten.contiguous.default)):
            made.meta |= {ARRIVAL: number, "origin": f"arrival_{number}"}
        return node


def _members(program: Program, groups: Sequence[ParameterGroup]) -> dict[fx.Node, tuple[ParameterGroup, Member]]:
    """Which placeholders of ``main`` stand for what of the groups."""
    holders, known = program.main.graph.find_nodes(op="placeholder"), by_member(groups)
    return {n: known[i.name] for n, i in zip(holders, program.inputs, strict=True)
            if i.kind == "parameter" and i.name in known}
