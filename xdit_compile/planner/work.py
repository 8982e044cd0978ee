"""What one rank has to do and to send under a spec, counted by the passes' own walk, without programs being made."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import fx

from xdit_compile.driver.compile_stage import stage_edges
from xdit_compile.errors import SpecError
from xdit_compile.frontend.gc_pause import gc_paused
from xdit_compile.ir.layout import SEQUENCE
from xdit_compile.ir.mesh import axis_sizes, position_of
from xdit_compile.ir.program import Program
from xdit_compile.passes import plan, plan_start
from xdit_compile.passes.batch_axis import merge_seeds
from xdit_compile.passes.cost import Cost
from xdit_compile.passes.interpreter import ATTENTION, ProgramInterpreter, Seeds
from xdit_compile.passes.pipefusion import Pipeline, plan_pipeline, stage_costs
from xdit_compile.passes.recorded import Known
from xdit_compile.passes.stage_partition import balanced, blocks_in
from xdit_compile.passes.token_axis import candidates, check_heads
from xdit_compile.report.memory import is_view, peak_activations
from xdit_compile.report.operations import node_flops
from xdit_compile.runtime.pipefusion.schedule import RESULT, WHOLE, Edge
from xdit_compile.spec import ShardingSpec

FEW = 128
"""Rows of a matrix product below which a device waits for the weights, not for the product."""

VIEW = 0.5
"""Of the host's time for an operator, what one takes that starts nothing on the device."""

FUNCTIONS = frozenset(getattr(torch.ops.aten, name).default for name in (
    "gelu", "silu", "sigmoid", "tanh", "exp", "erf", "log", "sin", "cos", "softplus", "mish", "elu")) | {
        torch.ops.aten._softmax.default, torch.ops.aten.softmax.int}
"""Element-wise operators of which each value takes a CPU many operations."""

PACKING, MERGING = 3, 4
"""Operators around an exchange, and around a part of attention that a ring brings."""


@dataclass(frozen=True)
class Exchange:
    """Collectives of one kind along one axis: how many, and the bytes that a rank sends in all of them."""

    kind: str
    axis: str
    count: float
    nbytes: float


@dataclass(frozen=True)
class Work:
    """What one rank does for one forward, or for a part of it.

    Attributes:
        products, attention: operations.
        moved: bytes that all other work reads and writes; functions: values of exp, tanh, gelu and the like in it.
        weights: bytes of weights that are read for few rows of features each: embeddings of time, modulations.
        packed: bytes of all weights that are multiplied with, as often as they are.
        launches: operators that start something on the device.
        exchanges: what goes over links.
        stale: bytes of keys and values that are kept for later patches.
    """

    products: float = 0
    attention: float = 0
    moved: float = 0
    weights: float = 0
    launches: float = 0
    exchanges: tuple[Exchange, ...] = ()
    stale: int = 0
    functions: float = 0
    packed: float = 0

    @property
    def flops(self) -> float:
        return self.products + self.attention

    @property
    def sent(self) -> float:
        """Bytes that leave the rank."""
        return sum(x.nbytes for x in self.exchanges)

    def times(self, factor: float) -> Work:
        """So much of it."""
        return replace(self, products=self.products * factor, attention=self.attention * factor,
                       moved=self.moved * factor, weights=self.weights * factor, launches=self.launches * factor,
                       functions=self.functions * factor, packed=self.packed * factor,
                       exchanges=tuple(replace(x, count=x.count * factor, nbytes=x.nbytes * factor)
                                       for x in self.exchanges))


@dataclass(frozen=True)
class Staged:
    """What the stages of a pipeline do: ``once`` per step and for each unit (a patch, or WHOLE), and send."""

    once: tuple[Work, ...]
    units: tuple[Mapping[int, Work], ...]
    edges: tuple[Edge, ...]


@dataclass(frozen=True)
class Whole:
    """What the model takes on one device, for one call: the measure of all that is counted by ``moved`` alone.

    Attributes:
        walked: bytes of all results, as the passes' walk counts them.
        dtype: in which most of the products are computed.
        parameters: bytes; activations: at the worst moment; arguments: of the call.
    """

    work: Work
    walked: int
    dtype: str
    parameters: int
    activations: int
    arguments: int


class WorkCounter:
    """Counts one captured call under one spec after the other. What specs have in common is found once."""

    def __init__(self, captured: Program) -> None:
        self.captured = captured
        self.known: Known = {}
        self._tokens: dict[tuple[int, int], Seeds] = {}
        """Where tokens are cut for so many ranks and groups of the batch: much the same, however these talk."""

    @cached_property
    def whole(self) -> Whole:
        """The call on one device."""
        program, _ = plan(self.captured, ShardingSpec(), (), self.known)
        return _whole(program, _walk(program, {}, ShardingSpec()).moved)

    def exact(self, spec: ShardingSpec) -> Work | Staged:
        """What ranks do under ``spec``, by the passes' own plan for it.

        Raises:
            SpecError: as ``parallelize`` does for this call.
        """
        with gc_paused():
            if spec.pipefusion_degree > 1:
                return self._staged(plan_pipeline(self.captured, spec, found=self.known))
            program, seeds = plan(self.captured, spec, (), self.known)
            self._tokens.setdefault((spec.sequence_degree, spec.batch_degree), _tokens_among(seeds))
            return self._work(_walk(program, seeds, spec), spec)

    def quick(self, spec: ShardingSpec) -> Work | Staged:
        """The same nearly, in a hundredth of a second: tokens are cut as another spec has them for so many ranks, and
        stages have equal parts of the blocks.

        Raises:
            SpecError: as ``parallelize`` does, as far as it is seen.
        """
        stages = spec.pipefusion_degree
        flat = replace(spec, pipefusion_degree=1, num_patches=0, warmup_steps=1, stage_blocks="", shard_degree=1)
        with gc_paused():
            program, batch, weights = plan_start(self.captured, flat, (), self.known)
            if flat.ulysses_degree > 1:
                check_heads(program)
            key = (flat.sequence_degree, flat.batch_degree)
            if key not in self._tokens:
                self.exact(replace(flat, tensor_degree=1))
            seeds = {**weights, **merge_seeds(batch, self._tokens[key])}
            work = self._work(_walk(program, seeds, flat, [0]), flat)
        if stages == 1:
            return work
        if (blocks := len(self._blocks)) < stages:
            raise SpecError(f"{spec} asks for {stages} stages, but the model has {blocks} blocks to share out")
        most = self._share(stages)
        hidden = int(self._hidden / spec.sequence_degree / spec.batch_degree)
        edges = [Edge(i, i + 1, (hidden // spec.patches,) * spec.patches, hidden, "hidden") for i in range(stages - 1)]
        result = self.whole.arguments // spec.batch_degree
        edges += [Edge(stages - 1, 0, (result // spec.patches,) * spec.patches, result, RESULT)]
        units = {p: work.times(most / spec.patches) for p in range(spec.patches)} | {WHOLE: work.times(most)}
        # Each patch starts as many operators, and multiplies with as many weights, as all of them together.
        whole = units[WHOLE]
        packing = (work.launches - self.whole.work.launches) * most
        units = {unit: replace(u, weights=0, launches=self.whole.work.launches / stages + packing, packed=whole.packed,
                               exchanges=tuple(replace(x, count=w.count) for x, w in
                                               zip(u.exchanges, whole.exchanges, strict=True)))
                 for unit, u in units.items()}
        return Staged((Work(weights=work.weights * most),) * stages, (units,) * stages, tuple(edges))

    @cached_property
    def _blocks(self) -> list[int]:
        """Operations of each block that can be a stage's."""
        program, *_ = plan_start(self.captured, ShardingSpec(), (), self.known)
        return list(blocks_in(program, list(program.main.graph.nodes)).values())

    def _share(self, stages: int) -> float:
        """Of the blocks' operations, those of the busiest of so many stages."""
        borders = [0, *accumulate(balanced(self._blocks, stages))]
        return max(sum(self._blocks[a:b]) for a, b in pairwise(borders)) / max(sum(self._blocks), 1)

    @cached_property
    def _hidden(self) -> float:
        """Bytes of what goes from block to block, nearly: the largest value that enters one."""
        program, *_ = plan_start(self.captured, ShardingSpec(), (), self.known)
        sizes = [size_of(n.meta["val"]) for n in candidates(program)]
        return max(sizes, default=0)

    def _staged(self, pipeline: Pipeline) -> Staged:
        spec = pipeline.whole.spec
        assert spec is not None
        share = self.whole.work.weights / spec.tensor_degree / spec.pipefusion_degree
        once, units = [], []
        stages = stage_costs(pipeline)
        flops = sum(patches[WHOLE].flops for _, patches in stages)
        for apart, patches in stages:
            packed = self.whole.work.packed / spec.tensor_degree * patches[WHOLE].flops / max(flops, 1)
            once.append(replace(self._work(apart, spec), weights=share, packed=0.0))
            units.append({unit: replace(self._work(cost, spec), weights=0.0, packed=packed)
                          for unit, cost in patches.items()})
        # Each patch starts as many operators as all of them together, and packs what it sends.
        others = self.whole.work.launches * (1 - 1 / spec.pipefusion_degree)
        units = [{unit: replace(w, launches=w.launches - others) for unit, w in u.items()} for u in units]
        once = [replace(w, launches=0.0) for w in once]
        return Staged(tuple(once), tuple(units), stage_edges(pipeline, 0))

    def _work(self, cost: Cost, spec: ShardingSpec) -> Work:
        whole = self.whole
        share = cost.moved / max(whole.walked, 1)
        ways = {(kind, axis) for _, kind, axis in cost.traffic}
        exchanges = tuple(Exchange(kind, axis, cost.traffic["count", kind, axis], cost.traffic["bytes", kind, axis])
                          for kind, axis in sorted(ways) if cost.traffic["count", kind, axis])
        # What is sent is packed before and unpacked after; parts of attention are merged.
        packed = sum(4 * x.nbytes for x in exchanges)
        started = sum((MERGING if x.kind == "ring" else PACKING) * x.count for x in exchanges)
        return Work(cost.flops - cost.attention_flops, cost.attention_flops, whole.work.moved * share + packed,
                    whole.work.weights / spec.tensor_degree, whole.work.launches + started, exchanges, cost.stale_bytes,
                    whole.work.functions * share, whole.work.packed / spec.tensor_degree)


def _walk(program: Program, seeds: Seeds, spec: ShardingSpec, ranks: Collection[int] = ()) -> Cost:
    """What the busiest of ``ranks`` has to do; by default of the first and the last, with the largest remainders."""
    sizes = axis_sizes(spec)
    ends = ranks or sorted({0, spec.world_size - 1})
    return max((ProgramInterpreter(program, seeds, position_of(rank, spec), sizes).main().cost for rank in ends),
               key=lambda cost: cost.flops)


def _tokens_among(seeds: Seeds) -> Seeds:
    return {name: layout for name, layout in seeds.items() if any(SEQUENCE in d.axes for d in layout.dims)
            or not any(d.sharded for d in layout.dims)}


def _whole(program: Program, walked: int) -> Whole:
    calls, moved, weights, launches, functions, packed = program.calls(), 0, 0, 0.0, 0, 0
    flops: Counter[str] = Counter()
    dtypes: Counter[torch.dtype] = Counter()
    for name, module in program.functions():
        for node in module.graph.nodes:
            if node.op != "call_function" or node.target is operator.getitem:
                continue
            cost, times = node_flops(node), calls[name]
            if is_view(node):
                launches += VIEW * times
                continue
            launches += times
            if cost:
                flops["attention" if node.target is ATTENTION else "products"] += cost * times
                dtypes[node.meta["val"].dtype] += cost * times
                packed += times * sum(size_of(a.meta["val"]) for a in _multiplied(node))
                rows = node.meta["val"].numel() // max(node.meta["val"].shape[-1], 1)
                if node.target is not ATTENTION and rows < FEW:
                    weights += times * sum(size_of(n.meta["val"]) for n in node.all_input_nodes)
            else:
                results = node.meta["val"] if isinstance(node.meta["val"], (tuple, list)) else [node.meta["val"]]
                moved += times * sum(map(size_of, [*results, *(n.meta["val"] for n in node.all_input_nodes)]))
                functions += times * results[0].numel() if node.target in FUNCTIONS else 0
    holders = list(zip(program.main.graph.find_nodes(op="placeholder"), program.inputs, strict=True))
    held = {what.name: size_of(n.meta["val"]) for n, what in holders if what.kind == "parameter"}
    given = sum(size_of(n.meta["val"]) for n, what in holders if what.kind == "argument")
    dtype = max(dtypes, key=dtypes.__getitem__, default=torch.float32)
    return Whole(Work(flops["products"], flops["attention"], moved, weights, launches, functions=functions,
                      packed=packed), walked,
                 str(dtype).removeprefix("torch."), sum(held.values()), peak_activations(program), given)


def _multiplied(node: fx.Node) -> Iterator[fx.Node]:
    """The weights of a product, by what its operator calls them; one of a whole batch has none."""
    for argument, given in zip(node.target._schema.arguments, node.args, strict=False):  # type: ignore[union-attr]
        named = argument.name == "weight" or (argument.name == "mat2" and node.target is not torch.ops.aten.bmm.default)
        if named and isinstance(given, fx.Node):
            yield given


def size_of(value: Any) -> int:
    """Bytes of a tensor, of several, or of what is none."""
    if isinstance(value, (tuple, list)):
        return sum(map(size_of, value))
    return value.numel() * value.dtype.itemsize if isinstance(value, torch.Tensor) else 0
