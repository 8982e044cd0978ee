"""What a rank takes of its device's memory under a spec: its model, and what else a pipeline keeps there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xdit_compile.driver.compile_call import compile_program
from xdit_compile.driver.compile_stage import staged
from xdit_compile.ir.parameter_groups import ParameterGroup
from xdit_compile.ir.program import Program
from xdit_compile.passes.pipefusion import plan_pipeline
from xdit_compile.planner.work import Staged, Whole, Work
from xdit_compile.report.memory import rank_memory
from xdit_compile.spec import ShardingSpec

MARGIN = 1.25
"""An estimate of memory may be wrong by so much; nearer to what a device has, programs are made to know."""

COMING = 0.08
"""Of all parameters, what two blocks are that are there at a time."""

ROOM = 1.5
"""Buffers of exchanges, over values that are computed."""


@dataclass(frozen=True)
class Beside:
    """Bytes of a pipeline's components beside the model that is planned, where they stay on its device.

    Attributes:
        denoisers: of those that run at each step too, and are shared out as it is; encoders: of each encoder.
        others: of what every rank holds whole.
    """

    denoisers: int = 0
    encoders: tuple[int, ...] = ()
    others: int = 0

    def on_rank(self, spec: ShardingSpec) -> float:
        """What a rank holds of them under ``spec``; of ranks that hold different encoders, that which holds most."""
        held, world = self.encoders, spec.world_size
        if spec.encoders == "shard":
            encoders = sum(held) / world + max(held, default=0) * COMING
        elif spec.encoders == "spread":
            encoders = max(sum(held[rank::world]) for rank in range(world))
        else:
            encoders = sum(held)
        return held_parameters(self.denoisers, spec) + encoders + self.others

    def fetched(self, spec: ShardingSpec) -> int:
        """What a rank is sent of encoders' parameters in each call of the pipeline."""
        return sum(self.encoders) * (spec.world_size - 1) // spec.world_size if spec.encoders == "shard" else 0


ALONE = Beside()
"""Of a model that is in no pipeline."""


def held_parameters(nbytes: float, spec: ShardingSpec) -> float:
    """What a rank has on its device of so many bytes of parameters, those that come for a while included."""
    held = 0.0 if spec.offload != "none" else (
        nbytes / spec.tensor_degree / spec.pipefusion_degree / spec.shard_degree)
    coming = nbytes / spec.tensor_degree * COMING if spec.shard_degree > 1 or spec.offload != "none" else 0.0
    return held + coming


def estimated_memory(work: Work | Staged, whole: Whole, spec: ShardingSpec) -> float:
    """Bytes that a rank takes on its device for a call, nearly."""
    stale = max((u.stale for us in work.units for u in us.values()), default=0) if isinstance(work, Staged) else 0
    values = whole.activations / spec.sequence_degree / spec.batch_degree * ROOM
    return held_parameters(whole.parameters, spec) + values + stale + whole.arguments


def counted_memory(captured: Program, spec: ShardingSpec, groups: Sequence[ParameterGroup]) -> int:
    """Bytes that a rank takes on its device for a call, from the programs it runs; of stages, that which takes most."""
    if spec.pipefusion_degree == 1:
        compiled = compile_program(captured, spec, 0, groups=groups if spec.parts else ())
        return rank_memory([compiled.body]).device
    pipeline = plan_pipeline(captured, spec)
    stages = [staged(pipeline, stage * spec.ranks_per_stage, groups=groups if spec.parts else ())[1]
              for stage in range(spec.pipefusion_degree)]
    return max(rank_memory([s.once, *s.units.values()], [s.once]).device for s in stages)
