"""What ranks would take under other specs, found by making their programs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from xdit_compile.diagnostics.fit import Fit, Trial
from xdit_compile.driver.compile_call import compile_program
from xdit_compile.driver.compile_stage import staged
from xdit_compile.errors import XditError
from xdit_compile.ir.parameter_groups import ParameterGroup
from xdit_compile.ir.program import Program
from xdit_compile.passes.pipefusion import plan_pipeline
from xdit_compile.pipelines.memory import memory_of, memory_of_stage
from xdit_compile.report.memory import RankMemory
from xdit_compile.spec import ShardingSpec


def fits(program: Program, spec: ShardingSpec, rank: int, changes: Mapping[int, str],
         groups: Sequence[ParameterGroup], memory: RankMemory, device_memory: int) -> Fit:
    """Whether ``memory``, of ``rank`` under ``spec``, fits; if not, what other words would take."""
    found = Fit(device_memory, memory)
    if found.fits:
        return found
    trials = [_trial(program, other, rank, changes, groups) for other in _others(spec)]
    # Each of these takes a search: until one fits.
    for other in _shared_out(spec):
        trials.append(_trial(program, other, rank, changes, groups))
        if (taken := trials[-1].memory) is not None and taken.device <= device_memory:
            break
    return Fit(device_memory, memory, tuple(trials))


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


def _shared_out(spec: ShardingSpec) -> Iterator[ShardingSpec]:
    """Specs for the same processes, more and more of which share out the work of weights in place of tokens."""
    for more in range(2, spec.ulysses_degree + 1):
        if spec.ulysses_degree % more == 0:
            tensor = replace(spec, shard_degree=1, ulysses_degree=spec.ulysses_degree // more,
                             tensor_degree=spec.tensor_degree * more)
            yield replace(tensor, shard_degree=math.gcd(spec.shard_degree, tensor.replicas))


def _trial(program: Program, spec: ShardingSpec, rank: int, changes: Mapping[int, str],
           groups: Sequence[ParameterGroup]) -> Trial:
    try:
        if spec.pipefusion_degree == 1:
            return Trial(str(spec), memory_of(compile_program(program, spec, rank, None, changes, groups)))
        pipeline = plan_pipeline(program, spec)
        # The stage that takes most.
        stages = [staged(pipeline, r, None, changes, groups)[1] for r in range(
            0, spec.model_degree, spec.ranks_per_stage)]
        return Trial(str(spec), max(map(memory_of_stage, stages), key=lambda m: m.device))
    except XditError as error:
        return Trial(str(spec), None, f"{type(error).__name__}: {error}"[:200])
