"""From a program to one rank's stage of a pipeline over patches (PipeFusion, arXiv 2405.14430).

A stage's program is made once for each patch, and once more for all of them together, which is what exact steps run and
what fills the memory that patches read. All are the same interpretation of the same graph under the same layouts; only
the place in time differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from xdit_compile.errors import PlanError, SpecError
from xdit_compile.ir.layout import BATCH, EVERY, PATCH, SEQUENCE, TENSOR, Dim, Layout
from xdit_compile.ir.mesh import STAGE, axis_sizes, position_of
from xdit_compile.ir.parameter_groups import ParameterGroup
from xdit_compile.ir.program import Program
from xdit_compile.ir.weights_in_graphs import unpacked
from xdit_compile.passes import localize, plan_start
from xdit_compile.passes.batch_axis import merge_seeds
from xdit_compile.passes.cost import Cost
from xdit_compile.passes.hoist import hoist
from xdit_compile.passes.interpreter import FunctionInterpreter, Leave, ProgramInterpreter, Seeds
from xdit_compile.passes.patch_axis import cut_by_patches, patch_seeds
from xdit_compile.passes.recorded import Known, analysed, count_of_seeds, remembered
from xdit_compile.passes.sharded_value import Value
from xdit_compile.passes.stage_partition import Stage, stages
from xdit_compile.passes.token_axis import arguments, check_heads, choose_seeds
from xdit_compile.spec import ShardingSpec

_STILL = {BATCH, TENSOR}
"""Axes that cut the same at all times."""


@dataclass(frozen=True)
class Pipeline:
    """The stages of one program, the same on every rank.

    Attributes:
        whole: the canonical program; ``seeds``: where its layouts begin.
        stages: what each stage computes.
        samples: arguments that are cut into patches, by the names of their inputs, as a rank of the first stage takes
            them.
        layouts: of the values that are computed once, and of those that stages send.
        results: of the model's results: cut into patches along one dimension, or whole.
    """

    whole: Program
    seeds: Seeds
    stages: tuple[Stage, ...]
    samples: Mapping[str, Layout]
    layouts: Mapping[str, Layout]
    results: tuple[Layout, ...]

    @property
    def once_seeds(self) -> Seeds:
        """The seeds of what is computed once per step: those of the batch and of weights."""
        return {n: Layout(tuple(d if d.axes & _STILL else Dim.replicated(d.size) for d in lay.dims))
                for n, lay in self.seeds.items() if any(d.axes & _STILL for d in lay.dims)}


@dataclass(frozen=True)
class LocalStage:
    """One rank's programs: ``once`` per step, and ``units`` for each patch and for EVERY."""

    once: Program
    units: Mapping[int, Program]


def plan_pipeline(program: Program, spec: ShardingSpec,
                  known: Mapping[str, int] = MappingProxyType({}),
                  groups: Sequence[ParameterGroup] = (), found: Known | None = None) -> Pipeline:
    """The stages of ``program`` under ``spec``; blocks whose paths are ``known`` go to the stages that are given;
    ``groups`` as for ``plan``, and ``found`` as its ``known``.

    Raises:
        SpecError: the model has fewer blocks than stages, fewer tokens than patches, or writes into its arguments.
    """
    if program.output_spec.changes_arguments:
        raise SpecError(f"{spec} cuts the model into stages, but this call of it writes into its arguments, which only "
                        "one stage would see; use ulysses or ring")
    program, batch, weights = plan_start(program, spec, groups, found)
    sizes, still = axis_sizes(spec), {**weights, **batch}
    if spec.ulysses_degree > 1:
        check_heads(program)
    if spec.patches > 1:
        cut = ("patches", spec.patches, spec.ulysses_degree, spec.tensor_degree, spec.batch_degree)
        program, patches = analysed("patch_axis", patch_seeds, program, lambda p: remembered(
            found, cut, lambda: patch_seeds(p, sizes, still)), count_of_seeds)
        seeds = merge_seeds(still, patches)
        begin = cut_by_patches(seeds)
    else:
        program, tokens = analysed("token_axis", choose_seeds, program, lambda p: choose_seeds(p, sizes, still),
                                   count_of_seeds)
        seeds = merge_seeds(still, tokens)
        begin = _flowing_from(program, sizes, still)
    program, (hoisted, flowing) = analysed("hoist", hoist, program, lambda p: hoist(p, begin, unpacked),
                                           lambda found: {"flowing": len(found[1])})
    given = [int(n) for n in spec.stage_blocks.split("+")] if spec.stage_blocks else []
    program, made = analysed("stage_partition", stages, program,
                             lambda _: stages(hoisted, flowing, spec.pipefusion_degree, given, known),
                             lambda found: {"stage": len(found)})
    made = tuple(replace(stage, body=replace(stage.body, history=program.history)) for stage in made)
    of_argument = {n.name: n for n in arguments(program)}
    samples = {name: Layout(tuple(_without(d, BATCH).gathered(SEQUENCE) for d in seeds[name].dims))
               for name in begin if name in of_argument and name in seeds and spec.patches > 1}
    samples = {n: lay for n, lay in samples.items() if any(len(d.segments) > 1 for d in lay.dims)}
    layouts: dict[str, Layout] = {}
    results: dict[int, Layout] = {}
    for index, stage in enumerate(made):
        position = {**position_of(index * spec.ranks_per_stage, spec), PATCH: EVERY}
        once = ProgramInterpreter(stage.once, still, position, sizes).main(leave=_leave(stage, once=True))
        layouts |= dict(zip(stage.held, once.layouts, strict=False))
        body = ProgramInterpreter(stage.body, seeds, position, sizes).main(_given(stage, samples, layouts),
                                                                           _leave(stage))
        layouts |= dict(zip(stage.sends, body.layouts, strict=False))
        results |= dict(zip(stage.results, body.layouts[len(stage.sends):], strict=True))
        results |= dict(zip(stage.fixed, once.layouts[len(stage.held):], strict=True))
    return Pipeline(program, seeds, made, samples, layouts, tuple(results[i] for i in sorted(results)))


def localize_stage(pipeline: Pipeline, rank: int, dump: Callable[[str, Program], None] | None = None,
                   groups: Sequence[ParameterGroup] = ()) -> LocalStage:
    """The programs of ``rank``, which all keep the same values. ``dump`` is called with each pass's name and result,
    for that of all patches; ``groups`` as for ``localize``."""
    spec = pipeline.whole.spec
    assert spec is not None
    stage = pipeline.stages[position_of(rank, spec)[STAGE]]
    once = localize(stage.once, pipeline.once_seeds, rank, leave=_leave(stage, once=True), groups=groups)
    given = _given(stage, pipeline.samples, pipeline.layouts)
    times = [EVERY, *range(spec.patches)] if spec.patches > 1 else [EVERY]
    units = {patch: localize(stage.body, pipeline.seeds, rank, dump if patch == EVERY else None, patch=patch,
                             given=given, leave=_leave(stage), groups=groups) for patch in times}
    if len({_kept(program) for program in units.values()}) > 1:
        raise PlanError("patches of one stage do not keep the same values")
    return LocalStage(once, units)


def stage_costs(pipeline: Pipeline) -> list[tuple[Cost, Mapping[int, Cost]]]:
    """What one rank of each stage has to do once per step, and for each patch and for EVERY."""
    spec = pipeline.whole.spec
    assert spec is not None
    sizes, found = axis_sizes(spec), []
    alike = {EVERY: EVERY, **(_alike(pipeline.seeds, spec) if spec.patches > 1 else {})}
    for index, stage in enumerate(pipeline.stages):
        position = position_of(index * spec.ranks_per_stage, spec)
        given = _given(stage, pipeline.samples, pipeline.layouts)
        once = ProgramInterpreter(stage.once, pipeline.once_seeds, {**position, PATCH: EVERY}, sizes).main(
            leave=_leave(stage, once=True))
        walked = {patch: ProgramInterpreter(stage.body, pipeline.seeds, {**position, PATCH: patch}, sizes).main(
            given, _leave(stage)).cost for patch in set(alike.values())}
        found.append((once.cost, {patch: walked[one] for patch, one in alike.items()}))
    return found


def _alike(seeds: Seeds, spec: ShardingSpec) -> dict[int, int]:
    """For each patch the first that costs as much: where every rank has as much of it, and of the patches beside it."""
    cut = [layout for layout in seeds.values() if any(PATCH in d.axes for d in layout.dims)]
    ranks = [position_of(r, spec) for r in range(spec.ranks_per_stage)]
    shapes = [None, *([layout.local_shape({**here, PATCH: patch}) for layout in cut for here in ranks]
                      for patch in range(spec.patches)), None]
    around = [shapes[patch:patch + 3] for patch in range(spec.patches)]
    return {patch: around.index(mine) for patch, mine in enumerate(around)}


def _kept(program: Program) -> tuple[object, ...]:
    holders = program.main.graph.find_nodes(op="placeholder")
    return tuple((tuple(n.meta["val"].shape), n.meta["val"].dtype) for n, i in zip(
        holders, program.inputs, strict=True) if i.kind == "cache")


def _flowing_from(program: Program, sizes: Mapping[str, int], batch: Seeds) -> set[str]:
    """Where the flow begins when there are no patches: where it would with two of them, or in all features."""
    assert program.spec is not None
    try:
        return set(patch_seeds(program, {**sizes, PATCH: 2, SEQUENCE: 1}, batch))
    except SpecError:
        return {n.name for n in arguments(program)}


def _given(stage: Stage, samples: Mapping[str, Layout], layouts: Mapping[str, Layout]) -> dict[str, Layout]:
    """How the inputs of the stage's body come, where they are not whole."""
    given = {}
    for node, what in zip(stage.body.main.graph.find_nodes(op="placeholder"), stage.body.inputs, strict=True):
        found = (samples if what.kind == "argument" else layouts if what.kind in ("once", "received") else {}).get(
            node.name)
        if found is not None:
            given[node.name] = found
    return given


def _leave(stage: Stage, once: bool = False) -> Leave:
    """What a stage sends stays as it is laid out; results of the model are whole on all ranks, patch by patch."""
    kept = len(stage.held) if once else len(stage.sends)

    def leave(s: FunctionInterpreter, index: int, value: Value) -> Value:
        value = s.summed(value)
        if index < kept:
            return value
        cut = [i for i, d in enumerate(value.dims) if PATCH in d.axes]
        for i, dim in enumerate(value.dims):
            pieces = dim.gathered(SEQUENCE).gathered(TENSOR)
            apart = cut == [i] and pieces.borders(s.sizes[PATCH]) is not None
            value = s.lay(value, i, pieces if apart else Dim.replicated(dim.size))
        return value

    return leave


def _without(dim: Dim, axis: str) -> Dim:
    return Dim.replicated(dim.size) if axis in dim.axes else dim
