"""From a model and a call to what this rank runs of it as a stage of a pipeline. Holds no state and starts nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch

from xdit_compile.driver.compile_call import NONE, Compiled, Dump, split_invariant
from xdit_compile.frontend.gc_pause import gc_paused
from xdit_compile.ir.layout import EVERY, PATCH, Layout
from xdit_compile.ir.mesh import STAGE, position_of
from xdit_compile.ir.parameter_groups import ParameterGroup
from xdit_compile.ir.program import Program, output_args
from xdit_compile.passes import local_groups
from xdit_compile.passes.pipefusion import Pipeline, localize_stage, plan_pipeline
from xdit_compile.runtime.deferred.patch_propagation import Cut
from xdit_compile.runtime.pipefusion.schedule import RESULT, Edge
from xdit_compile.runtime.pipefusion.stage_executor import StageProgram
from xdit_compile.spec import ShardingSpec


def compile_stage(captured: Program, spec: ShardingSpec, rank: int = 0, dump: Dump | None = None,
                  stages: Mapping[str, int] = MappingProxyType({}), changes: Mapping[int, str] = NONE,
                  groups: Sequence[ParameterGroup] = ()) -> Compiled:
    """Rank ``rank``'s stage of the pipeline that ``spec`` asks for. ``dump`` is called with each pass's name and
    result, for the program of all patches together. Blocks in ``stages`` go to these: their weights are there;
    ``changes`` and ``groups`` as for ``compile_program``."""
    with gc_paused():
        pipeline = plan_pipeline(captured, spec, stages, groups)
        groups = local_groups(pipeline.whole, pipeline.seeds, groups, rank)
        local, stage = staged(pipeline, rank, dump, changes, groups)
        return Compiled(captured, pipeline.whole, pipeline.seeds, local, local, None, tuple(changes.values()), stage,
                        groups)


def staged(pipeline: Pipeline, rank: int, dump: Dump | None = None,
           changes: Mapping[int, str] = NONE, groups: Sequence[ParameterGroup] = ()) -> tuple[Program, StageProgram]:
    """The program of ``rank`` for all patches, and all it runs as a stage."""
    spec = pipeline.whole.spec
    assert spec is not None
    local, position = localize_stage(pipeline, rank, dump, groups), position_of(rank, spec)
    index = position[STAGE]
    stage = pipeline.stages[index]
    dtypes, sent = _dtypes(pipeline), _sent(pipeline)

    def shape(name: str, unit: int) -> tuple[int, ...]:
        return pipeline.layouts[name].local_shape({**position, PATCH: unit})

    place = {n.name: int(i.name.removeprefix("arg_")) for n, i in zip(
        pipeline.whole.main.graph.find_nodes(op="placeholder"), pipeline.whole.inputs, strict=True)
        if i.kind == "argument"}
    receives = {a: names for (a, b), names in sent.items() if b == index}
    invariant, once = split_invariant(pipeline.whole, local.once, changes)
    program = StageProgram(
        invariant=invariant, once=once, units=local.units, held=stage.held,
        samples={place[n]: cut for n, lay in pipeline.samples.items() if (cut := _cut(lay, spec.patches))},
        sends={b: names for (a, b), names in sent.items() if a == index}, returns=tuple(stage.sends),
        receives=receives,
        shapes={(n, u): (shape(n, u), dtypes[n]) for names in receives.values() for n in names for u in local.units},
        cuts=tuple(_cut(lay, spec.patches) for lay in pipeline.results), results=stage.results, fixed=stage.fixed,
        edges=stage_edges(pipeline, rank), blocks=tuple(s.blocks for s in pipeline.stages))
    return local.units[EVERY], program


def stage_edges(pipeline: Pipeline, rank: int) -> tuple[Edge, ...]:
    """What stages send each other for every unit, as ``rank`` and those that stand where it does in their stages do."""
    spec = pipeline.whole.spec
    assert spec is not None
    position, last, dtypes = position_of(rank, spec), spec.pipefusion_degree - 1, _dtypes(pipeline)

    def nbytes(names: Sequence[str], unit: int) -> int:
        here = {**position, PATCH: unit}
        return sum(math.prod(pipeline.layouts[n].local_shape(here)) * dtypes[n].itemsize for n in names)

    patches = range(spec.patches)
    edges = [Edge(a, b, tuple(nbytes(names, p) for p in patches), nbytes(names, EVERY),
                  "hidden" if b == a + 1 else "skip") for (a, b), names in _sent(pipeline).items()]
    results = [(lay, n.meta["val"].dtype) for lay, n in zip(
        pipeline.results, output_args(pipeline.whole.main.graph), strict=True)]
    sizes = [sum(math.prod(lay.local_shape({PATCH: p})) * dtype.itemsize for lay, dtype in results
                 if _cut(lay, spec.patches) or p in (EVERY, spec.patches - 1)) for p in (*patches, EVERY)]
    return tuple(edges + [Edge(last, to, tuple(sizes[:-1]), sizes[-1], RESULT) for to in range(last)])


def _sent(pipeline: Pipeline) -> dict[tuple[int, int], tuple[str, ...]]:
    """The names of what one stage sends another, by both."""
    count = len(pipeline.stages)
    sent = {(i, to): tuple(n for n, targets in s.sends.items() if to in targets)
            for i, s in enumerate(pipeline.stages) for to in range(i + 1, count)}
    return {pair: names for pair, names in sent.items() if names}


def _dtypes(pipeline: Pipeline) -> dict[str, torch.dtype]:
    return {name: n.meta["val"].dtype for s in pipeline.stages
            for name, n in zip(s.sends, output_args(s.body.main.graph), strict=False)}


def _cut(layout: Layout, patches: int) -> Cut | None:
    """How a value comes in pieces, if it does."""
    found = [(i - len(layout.dims), d.borders(patches)) for i, d in enumerate(layout.dims) if PATCH in d.axes]
    if len(found) != 1:
        return None
    (dim, borders), = found
    return None if borders is None else Cut(dim, borders)
