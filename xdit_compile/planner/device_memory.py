"""What a rank takes of its device's memory under a spec: its model, and what else a pipeline keeps there."""

from __future__ import annotations

from collections.abc import Sequence

from xdit_compile.driver.compile_call import compile_program
from xdit_compile.driver.compile_stage import staged
from xdit_compile.ir.beside import Beside
from xdit_compile.ir.parameter_groups import ParameterGroup
from xdit_compile.ir.program import Program
from xdit_compile.passes.pipefusion import plan_pipeline
from xdit_compile.planner.work import Staged, Whole, Work
from xdit_compile.report.memory import rank_memory
from xdit_compile.spec import ShardingSpec

MARGIN, STAGED_MARGIN = 1.25, 2.0
"""An estimate of memory may be wrong by so much; nearer to what a device has, programs are made to know. Stages differ
in what they hold outside of blocks."""

COMING = 0.08
"""Of all parameters, what two blocks are that are there at a time."""

ROOM = 1.5
"""Buffers of exchanges, over values that are computed."""


def beside_held(beside: Beside, spec: ShardingSpec) -> float:
    """What a rank holds of other components at all times; of ranks that hold different encoders, that which holds
    most."""
    world, sizes = spec.world_size, [e.nbytes for e in beside.encoders]
    if spec.encoders == "shard":
        encoders = sum(e.nbytes - e.cut + e.cut / world for e in beside.encoders)
    elif spec.encoders == "spread":
        encoders = max(sum(sizes[rank::world]) for rank in range(world))
    else:
        encoders = sum(sizes)
    return held_parameters(beside.denoisers, spec) + encoders + beside.others


def beside_coming(beside: Beside, spec: ShardingSpec) -> float:
    """What is there beside that for a while, when an encoder runs: before the steps, or after them."""
    return max((e.coming for e in beside.encoders), default=0) if spec.encoders == "shard" else 0


def held_parameters(nbytes: float, spec: ShardingSpec) -> float:
    """What a rank has on its device of so many bytes of parameters, those that come for a while included."""
    held = 0.0 if spec.offload != "none" else (
        nbytes / spec.tensor_degree / spec.pipefusion_degree / spec.shard_degree)
    coming = nbytes / spec.tensor_degree * COMING if spec.shard_degree > 1 or spec.offload != "none" else 0.0
    return held + coming


def estimated_values(work: Work | Staged, whole: Whole, spec: ShardingSpec, groups: int = 1) -> float:
    """Bytes beside parameters that a rank takes on its device for a call, nearly; ``groups`` cut the batch."""
    stale = max((u.stale for us in work.units for u in us.values()), default=0) if isinstance(work, Staged) else 0
    room = ROOM if spec.sequence_degree * spec.tensor_degree * spec.pipefusion_degree > 1 else 1.0
    return whole.activations / spec.sequence_degree / groups * room + stale + whole.arguments


def counted_memory(captured: Program, spec: ShardingSpec, groups: Sequence[ParameterGroup]) -> int:
    """Bytes that a rank takes on its device for a call, from the programs it runs; of stages, that which takes most."""
    if spec.pipefusion_degree == 1:
        compiled = compile_program(captured, spec, 0, groups=groups if spec.parts else ())
        return rank_memory([compiled.body]).device
    pipeline = plan_pipeline(captured, spec)
    stages = [staged(pipeline, stage * spec.ranks_per_stage, groups=groups if spec.parts else ())[1]
              for stage in range(spec.pipefusion_degree)]
    return max(rank_memory([s.once, *s.units.values()], [s.once]).device for s in stages)
