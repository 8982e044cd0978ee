"""What ranks would take under other specs, found by making their programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from xdit_compile.diagnostics.fit import Fit, Trial
from xdit_compile.driver.compile_call import Compiled, compile_program
from xdit_compile.driver.compile_stage import staged
from xdit_compile.errors import XditError
from xdit_compile.ir.parameter_groups import ParameterGroup
from xdit_compile.ir.program import Program
from xdit_compile.passes.pipefusion import plan_pipeline
from xdit_compile.report.memory import RankMemory, rank_memory
from xdit_compile.runtime.pipefusion.stage_executor import StageProgram
from xdit_compile.spec import ShardingSpec


def memory_of(compiled: Compiled) -> RankMemory:
    """What a rank takes that runs this."""
    lasting = [compiled.invariant] if compiled.invariant else []
    return rank_memory([compiled.body, *lasting], lasting)


def memory_of_stage(stage: StageProgram) -> RankMemory:
    """What a rank of a stage takes."""
    lasting = [p for p in (stage.invariant, stage.once) if p]
    return rank_memory([*lasting, *stage.units.values()], lasting)


def fits(program: Program, spec: ShardingSpec, rank: int, changes: Mapping[int, str],
         groups: Sequence[ParameterGroup], memory: RankMemory, device_memory: int) -> Fit:
    """Whether ``memory``, of ``rank`` under ``spec``, fits; if not, what other words would take."""
    found = Fit(device_memory, memory)
    if found.fits:
        return found
    return Fit(device_memory, memory, tuple(
        _trial(program, other, rank, changes, groups) for other in _others(spec)))


def _others(spec: ShardingSpec) -> Iterator[ShardingSpec]:
    """Specs for the same processes that take less."""
    shards = [n for n in range(2, spec.replicas + 1) if spec.replicas % n == 0 and n > spec.shard_degree]
    for shard in shards:
        yield replace(spec, shard_degree=shard)
    if spec.offload == "none":
        yield replace(spec, offload="block")
        if shards:
            yield replace(spec, offload="block", shard_degree=shards[-1])
    if spec.pipefusion_degree == 1 and spec.ring_degree == 1 and spec.ulysses_degree > 1:
        # The same ranks as stages.
        yield replace(spec, ulysses_degree=1, exchange="together", pipefusion_degree=spec.ulysses_degree,
                      shard_degree=1)


def _trial(program: Program, spec: ShardingSpec, rank: int, changes: Mapping[int, str],
           groups: Sequence[ParameterGroup]) -> Trial:
    try:
        if spec.pipefusion_degree == 1:
            return Trial(str(spec), memory_of(compile_program(program, spec, rank, None, changes, groups)))
        pipeline = plan_pipeline(program, spec)
        # The stage that takes most.
        stages = [staged(pipeline, r, None, changes, groups)[1] for r in range(
            0, spec.model_degree, spec.sequence_degree)]
        return Trial(str(spec), max(map(memory_of_stage, stages), key=lambda m: m.device))
    except XditError as error:
        return Trial(str(spec), None, f"{type(error).__name__}: {error}"[:200])
