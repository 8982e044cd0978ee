"""Which weights tensor ranks share out, and how, found by trying, as ``token_axis.py`` finds the tokens.

A weight that is cut by its output features (tensor parallelism, arXiv 1909.08053) is where a cut begins: heads of
attention, hidden features of a feed-forward, parts of a modulation. What follows is the rules' affair: the next weight
is cut by its input features, and a sum is pending after it. Weights that are only ever used as a rule has laid them out
are given to ranks like that, so that none holds more. The block functions of a program are looked at one at a time:
what enters and leaves them is whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import fx

from xdit_compile.errors import SpecError
from xdit_compile.ir.layout import TENSOR, Dim, Layout, concatenate
from xdit_compile.ir.mesh import position_of
from xdit_compile.ir.parameter_groups import ParameterGroup
from xdit_compile.ir.program import Program
from xdit_compile.passes.cost import Cost, CostMemo, LaidOut
from xdit_compile.passes.interpreter import TURNS, ProgramInterpreter, Seeds

aten = torch.ops.aten

TRAFFIC_WEIGHT = 2.0
"""Bytes sent over all bytes that the model computes, against its shares of operations and of parameters. Low enough
that blocks are cut, since who asks for this axis pays two sums of all features for each; so high that embeddings of
tokens, whose weights are next to nothing, are not."""

OUTSIDE_WEIGHT = 0.5
"""Of cuts outside of blocks, once found: bytes over all that blocks send. A block has about as large a share of
operations and parameters as of these bytes; an embedding of a long text, or the last layer, much less."""

WORTH = 1e-7
"""By how much of all there is a cut must lower what a rank has to do and to hold."""

MOST_LEFT = 0.99
"""Of a model's operations: where each rank has more than so much left, nothing is gained."""

PRODUCTS = (aten.linear.default, aten.mm.default, aten.bmm.default, aten.matmul.default, aten.addmm.default,
            aten.baddbmm.default, aten._int_mm.default, aten.embedding.default)
CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)


def tensor_seeds(program: Program, sizes: Mapping[str, int], base: Seeds,
                 groups: Sequence[ParameterGroup] = ()) -> Seeds:
    """How parameters are shared out along the tensor axis, by the names of their inputs, beside the seeds ``base``: as
    another program of the model has it already, if ``groups`` say so.

    Raises:
        SpecError: no cut of any weight saves work.
    """
    parts = sizes[TENSOR]
    if parts == 1:
        return {}
    if known := {name: m.layout for group in groups for m in group.members if m.layout for name in m.names}:
        holders = program.main.graph.find_nodes(op="placeholder")
        return {n.name: known[i.name] for n, i in zip(holders, program.inputs, strict=True)
                if i.kind == "parameter" and i.name in known and known[i.name].sharded}
    search = _Search(program, sizes, base)
    found = search.seeds()
    if not found:
        raise SpecError(f"{program.spec} shares out weights among {parts} ranks, but no cut of any weight of the model "
                        "leaves each with less to do (weights that an operator of their own unpacks, as bitsandbytes' "
                        "four bits, are not cut); use ulysses or ring, and shard or pipefusion to spread weights")
    return found


@dataclass(frozen=True)
class _Candidate:
    """An input of a function that is a weight, and the node that multiplies with it."""

    place: int
    outputs: int
    """The dimension of the weight that holds its output features."""
    inputs: int | None
    """That of its input features; None of a table, which has none."""
    product: fx.Node


@dataclass(frozen=True)
class _Measured:
    """What a choice of cuts comes to, and how it lays out weights that it leaves whole."""

    score: float
    sent: int
    wanted: LaidOut

    @property
    def follow(self) -> set[int]:
        """The weights that are cut because features before them are."""
        return {i for i, wants in self.wanted.items() if (layout := _agreed(wants)) and len(layout.dims) > 1}


_NOTHING = _Measured(0.0, 0, {})


class _Search:
    def __init__(self, program: Program, sizes: Mapping[str, int], base: Seeds) -> None:
        assert program.spec is not None
        self.program, self.sizes, self.parts = program, sizes, sizes[TENSOR]
        self.base, self.memo, self.here = base, CostMemo(), position_of(0, program.spec)
        self.graphs = {name: module.graph for name, module in program.functions()}
        self.whole = self._interpreter(base).main().cost
        self.calls = {name: graph_calls for name in self.graphs if name != "main" and (
            graph_calls := self.graphs["main"].find_nodes(op="call_module", target=name))}
        holders = self.graphs["main"].find_nodes(op="placeholder")
        self.parameters = {n: n.meta["val"] for n, what in zip(holders, program.inputs, strict=True)
                           if what.kind == "parameter"}
        self.constants = {n for n, what in zip(holders, program.inputs, strict=True)
                          if what.kind in ("parameter", "constant")}
        self.held = max(sum(t.nbytes for t in self.parameters.values()), 1)

    def _interpreter(self, seeds: Seeds) -> ProgramInterpreter:
        assert self.program.spec is not None
        return ProgramInterpreter(self.program, seeds, self.here, self.sizes, memo=self.memo)

    def seeds(self) -> Seeds:
        seeds: dict[str, Layout] = {}
        for name, calls in self.calls.items():
            chosen = self._of_function(name, calls)
            seeds |= {call.args[i].name: layout for call in calls for i, layout in chosen.items()}
        seeds |= self._of_main(seeds)
        found = self._interpreter({**self.base, **seeds}).main()
        if found.cost.flops > MOST_LEFT * self.whole.flops:
            return {}
        wanted = found.wanted
        holders = self.graphs["main"].find_nodes(op="placeholder")
        return seeds | {n.name: layout for i, n in enumerate(holders) if n in self.parameters and n.name not in seeds
                        and (layout := _agreed(wanted.get(i, set())))}

    # One function after the other

    def _of_function(self, name: str, calls: Sequence[fx.Node]) -> dict[int, Layout]:
        """The cuts of the weights of a block function, by the number of its input."""
        graph = self.graphs[name]
        # A weight that others use too has to be there as they need it.
        own = {i for i in range(len(calls[0].args)) if all(call.args[i] in self.parameters and all(
            user in calls and user.args.count(call.args[i]) == 1 and user.args[i] is call.args[i]
            for user in call.args[i].users) for call in calls)}
        given = [Layout.replicated(n.meta["val"].shape) for n in graph.find_nodes(op="placeholder")]
        sizes = [n.meta["val"].nbytes if i in own else 0 for i, n in enumerate(graph.find_nodes(op="placeholder"))]

        def measure(choice: Mapping[int, Layout]) -> _Measured:
            layouts = tuple(choice.get(i, layout) for i, layout in enumerate(given))
            _, _, cost, wanted = self._interpreter(self.base).function(name, layouts)
            return _Measured(len(calls) * self._score(cost, sizes, choice, wanted), cost.sent, wanted)

        fixed = {i for i in range(len(calls[0].args)) if all(call.args[i] in self.constants for call in calls)}
        return self._chosen(list(_candidates(graph, own, fixed)), measure, graph)[1]

    def _of_main(self, known: Seeds) -> Seeds:
        """The cuts of weights outside of block functions."""
        graph = self.graphs["main"]
        holders = graph.find_nodes(op="placeholder")
        own = {i for i, n in enumerate(holders) if n in self.parameters and n.name not in known and all(
            u.op != "call_module" for u in n.users)}
        sizes = [n.meta["val"].nbytes if i in own else 0 for i, n in enumerate(holders)]

        def measure(choice: Mapping[int, Layout]) -> _Measured:
            named = {holders[i].name: layout for i, layout in choice.items()}
            found = self._interpreter({**self.base, **known, **named}).main()
            return _Measured(self._score(found.cost, sizes, choice, found.wanted), found.cost.sent, found.wanted)

        fixed = {i for i, n in enumerate(holders) if n in self.constants}
        best, chosen = self._chosen(list(_candidates(graph, own, fixed)), measure, graph)
        by_blocks = measure({}).sent if known else 0
        for place in [*chosen] if by_blocks else ():
            more = OUTSIDE_WEIGHT / by_blocks - TRAFFIC_WEIGHT / max(self.whole.moved, 1)
            found = measure(fewer := {i: layout for i, layout in chosen.items() if i != place})
            if found.score + more * found.sent < best.score + more * best.sent:
                best, chosen = found, fewer
        return {holders[i].name: layout for i, layout in chosen.items()}

    def _chosen(self, candidates: Sequence[_Candidate], measure: Callable[[Mapping[int, Layout]], _Measured],
                graph: fx.Graph) -> tuple[_Measured, dict[int, Layout]]:
        """The cuts of least score, of two ways to find them."""
        start = measure({}) if candidates else _NOTHING
        tried = [self._descended(candidates, measure, graph, start, wary) for wary in (False, True)]
        return min(tried, key=lambda t: t[0].score)

    def _descended(self, candidates: Sequence[_Candidate], measure: Callable[[Mapping[int, Layout]], _Measured],
                   graph: fx.Graph, best: _Measured, wary: bool) -> tuple[_Measured, dict[int, Layout]]:
        """Cuts that each lower the score, found one after the other. A weight that follows from those before is let be:
        to cut its output instead would send as much, and leave features cut for all that comes after. Who is ``wary``
        looks last at a cut that several weights follow, as those of queries, keys and values follow features that were
        cut before them; to others they are the two outputs of joint attention. Cuts by input features come last."""
        choice: dict[int, Layout] = {}
        heads, holders = _heads(graph), graph.find_nodes(op="placeholder")
        for last in (False, True):
            for candidate in candidates:
                if candidate.place in choice or _agreed(best.wanted.get(candidate.place, set())):
                    continue
                shape, before = tuple(holders[candidate.place].meta["val"].shape), best
                for dim, cut in self._ways(candidate, shape, heads, last):
                    trial = {**choice, candidate.place: Layout.replicated(shape).replace(dim, cut)}
                    found = measure(trial)
                    if found.score < best.score - WORTH and (
                            last or not wary or len(found.follow - before.follow) < 2):
                        best, choice = found, trial
        return best, choice

    def _ways(self, candidate: _Candidate, shape: Sequence[int], heads: Sequence[int],
              last: bool) -> Iterator[tuple[int, Dim]]:
        """Dimensions of a weight, and how to cut them."""
        for cut in _cuts(candidate, shape[candidate.outputs], self.parts, heads):
            yield candidate.outputs, cut
        if last and candidate.inputs is not None and shape[candidate.inputs] > 1:
            yield candidate.inputs, Dim.even(shape[candidate.inputs], self.parts, TENSOR)

    def _score(self, cost: Cost, sizes: Sequence[int], choice: Mapping[int, Layout], wanted: LaidOut) -> float:
        """What a rank does, sends and holds, as shares of what one device does, computes and holds."""
        held = 0
        for i, size in enumerate(sizes):
            layout = choice.get(i) or _agreed(wanted.get(i, set()))
            held += size if layout is None else size * math.prod(layout.local_shape(self.here)) // max(
                math.prod(layout.shape), 1)
        return cost.flops / max(self.whole.flops, 1) + held / self.held + TRAFFIC_WEIGHT * cost.sent / max(
            self.whole.moved, 1)


def _agreed(wants: set[Layout | None]) -> Layout | None:
    """The one layout that all uses of a parameter ask for."""
    return next(iter(wants)) if len(wants) == 1 else None


def _candidates(graph: fx.Graph, own: set[int], fixed: set[int]) -> Iterator[_Candidate]:
    """Weights among the inputs ``own`` that are multiplied with, in the order of the graph; ``fixed`` are all inputs
    that are the same in each call."""
    places = {n: i for i, n in enumerate(graph.find_nodes(op="placeholder"))}
    for node in graph.nodes:
        if node.target not in PRODUCTS and node.target not in CONVOLUTIONS:
            continue
        for operand in node.args[:3]:
            if not isinstance(operand, fx.Node):
                continue
            order = list(range(operand.meta["val"].ndim))
            origin = operand
            while origin.target in TURNS:
                # Which dimension of the origin each of these is.
                before = TURNS[origin.target](list(range(origin.meta["val"].ndim)), *origin.args[1:])
                order = [before[i] for i in order]
                origin = origin.args[0]
            if len(order) < 2:
                continue
            table = node.target is aten.embedding.default
            rows = not table and (node.target is aten.linear.default or node.target in CONVOLUTIONS)
            outputs, inputs = (order[0], order[1]) if rows else (order[-1], order[-2])
            if places.get(origin) in own:
                yield _Candidate(places[origin], outputs, None if table else inputs, node)
            elif (packed := _packed(origin, outputs, places, own, fixed)) is not None:
                yield _Candidate(packed, outputs, None, node)


def _packed(weight: fx.Node, outputs: int, places: Mapping[fx.Node, int], own: set[int],
            fixed: set[int]) -> int | None:
    """The number of the input that ``weight`` is unpacked from, if it has a row for each output feature. Its columns
    are blocks of several numbers, which are not cut."""
    leaves, queue, seen = list[fx.Node](), [weight], {weight}
    while queue:
        node = queue.pop()
        if node.op == "placeholder":
            leaves.append(node)
        for before in node.all_input_nodes:
            if before not in seen:
                seen.add(before)
                queue.append(before)
    if not leaves or any(places[n] not in fixed for n in leaves):
        return None
    largest = max(leaves, key=lambda n: n.meta["val"].nbytes)
    shape, size = largest.meta["val"].shape, weight.meta["val"].shape[outputs]
    same = places[largest] in own and outputs < len(shape) and shape[outputs] == size
    return places[largest] if same else None


def _heads(graph: fx.Graph) -> list[int]:
    """The numbers of heads of attention in a graph, those of keys first."""
    found: dict[int, None] = {}
    for node in graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        for x in (node.args[1], node.args[0]):
            shape = x.meta["val"].shape
            if len(shape) > 2:
                found[shape[-3]] = None
    return list(found)


def _cuts(candidate: _Candidate, size: int, parts: int, heads: Sequence[int]) -> Iterator[Dim]:
    """Ways to share out output features: in whole heads where there are some, each part of a fused projection by
    itself."""
    axis = 1 if candidate.product.target in CONVOLUTIONS else candidate.product.meta["val"].ndim - 1
    uses = _Uses.of(candidate.product, axis, size)
    seen: set[Dim] = set()
    for sections in ((size,), *uses.sections):
        for units in (*heads, *uses.units, 0):
            dim = concatenate(_even(n, units, parts) for n in sections)
            if dim.sharded and dim not in seen:
                seen.add(dim)
                yield dim


def _even(size: int, units: int, parts: int) -> Dim:
    """``size`` features cut evenly in multiples of what one of ``units`` has."""
    units = units if units and size % units == 0 else size
    return Dim.even(units, parts, TENSOR).scale(size // units)


@dataclass(frozen=True)
class _Uses:
    """How the features of a product are taken apart by what uses them: in sections that splits and slices make, in
    equal units, as heads, that views make."""

    sections: tuple[tuple[int, ...], ...]
    units: tuple[int, ...]

    @staticmethod
    def of(product: fx.Node, axis: int, size: int) -> _Uses:
        sections: dict[tuple[int, ...], None] = {}
        units: dict[int, None] = {}
        queue, seen = [(product, axis)], {product}
        while queue:
            here, axis = queue.pop(0)
            for user in here.users:
                if user.args[0] is not here or user in seen:
                    continue
                dim = user.args[1] if len(user.args) > 1 else 0
                next_axis: int | None = None
                if user.target in (aten.split_with_sizes.default, aten.split.Tensor):
                    dim = user.args[2] if len(user.args) > 2 else 0
                    if dim % here.meta["val"].ndim == axis:
                        sections[tuple(v.shape[axis] for v in user.meta["val"])] = None
                elif user.target is aten.slice.Tensor:
                    if dim % here.meta["val"].ndim == axis:
                        sections[_sliced(here, axis, size)] = None
                elif user.target is aten.reshape.default:
                    shape, lead = list(user.meta["val"].shape), math.prod(here.meta["val"].shape[:axis])
                    found = next((i for i, n in enumerate(shape) if n > 1 and math.prod(shape[:i]) == lead), None)
                    times = 0 if found is None else shape[found]
                    if times == size:
                        next_axis = found
                    elif times and size % times == 0:
                        units[times] = None
                        if times <= MOST_SECTIONS:
                            sections[(size // times,) * times] = None
                elif user.target in TURNS:
                    next_axis = TURNS[user.target](list(range(here.meta["val"].ndim)), *user.args[1:]).index(axis)
                elif torch.Tag.pointwise in getattr(user.target, "tags", ()) and (
                        user.meta["val"].ndim == here.meta["val"].ndim):
                    next_axis = axis
                if next_axis is not None:
                    seen.add(user)
                    queue.append((user, next_axis))
        return _Uses(tuple(sections), tuple(units))


MOST_SECTIONS = 12
"""More equal parts than this are no parts of a fused projection, but heads."""


def _sliced(node: fx.Node, axis: int, size: int) -> tuple[int, ...]:
    """The parts between all borders at which dimension ``axis`` of ``node`` is sliced."""
    borders = {0, size}
    for user in node.users:
        dim = user.args[1] if user.target is aten.slice.Tensor and len(user.args) > 1 else 0
        if user.target is aten.slice.Tensor and dim % node.meta["val"].ndim == axis:
            start, stop, _ = slice(*(*user.args[2:5], None, None)[:2]).indices(size)
            borders |= {start, max(start, stop)}
    return tuple(b - a for a, b in pairwise(sorted(borders)))
