"""Every spec for so many devices, and whether a device's memory holds what it asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from xdit_compile.driver.compile_call import compile_program
from xdit_compile.driver.compile_stage import staged
from xdit_compile.ir.parameter_groups import ParameterGroup
from xdit_compile.ir.program import Program
from xdit_compile.passes.pipefusion import plan_pipeline
from xdit_compile.planner.costs import Loop
from xdit_compile.planner.work import Staged, Whole, Work
from xdit_compile.report.memory import rank_memory
from xdit_compile.spec import ALL, ShardingSpec

MARGIN = 1.25
"""An estimate of memory may be wrong by so much; nearer to what a device has, programs are made to know."""


def candidates(base: ShardingSpec, world: int, loop: Loop, exact: bool,
               samples: bool = False) -> Iterator[ShardingSpec]:
    """All specs for ``world`` devices, as ``base`` in the words that are no degrees: guidance, samples, stages and
    patches, tensor, Ulysses and ring ranks, of any sizes that multiply to it. Those that cut no tokens come first.

    Args:
        exact: without patches, which attend to keys and values of the step before.
        samples: whether there are as many samples as there are groups for them, each as large as the call.
    """
    for batch in divisors(world):
        for cfg in divisors(batch):
            data = batch // cfg
            if not _fits_batch(cfg, data, loop, samples):
                continue
            for stages in divisors(world // batch):
                for tensor in divisors(world // batch // stages):
                    rest = world // batch // stages // tensor
                    for ulysses in divisors(rest):
                        if stages > 1 and ulysses < rest:
                            continue  # stages do not go with a ring
                        for patches in _patches(stages, exact):
                            yield replace(
                                base, cfg_degree=cfg, data_degree=data, pipefusion_degree=stages, tensor_degree=tensor,
                                ulysses_degree=ulysses, ring_degree=rest // ulysses, num_patches=patches)


def divisors(number: int) -> list[int]:
    """From one to the number itself."""
    return [n for n in range(1, number + 1) if number % n == 0]


def _fits_batch(cfg: int, data: int, loop: Loop, samples: bool) -> bool:
    """Whether guidance and samples can be shared out so. Where guidance makes several calls, groups take turns in them
    or, if their batch is large enough, cut it."""
    if samples:
        return cfg <= max(loop.calls, loop.batch)
    return (cfg <= loop.calls and data == 1) or (cfg * data <= loop.batch and (
        loop.batch % 2 == 0 or cfg == 1) and cfg <= 2)


def _patches(stages: int, exact: bool) -> Sequence[int]:
    if stages == 1:
        return [0]
    return [1] if exact else [stages, 2 * stages]


def approximate(spec: ShardingSpec) -> bool:
    """Whether results differ from those of one device by more than rounding."""
    return spec.pipefusion_degree > 1 and spec.patches > 1 and spec.warmup_steps != ALL


def smaller(spec: ShardingSpec) -> Iterator[ShardingSpec]:
    """The same with weights cut over ranks, ever more of them, and at last in the host's memory."""
    if spec.shard_degree > 1 or spec.offload != "none":
        return
    shards = [n for n in divisors(spec.replicas) if n > 1]
    yield from (replace(spec, shard_degree=n) for n in shards)
    yield replace(spec, offload="block", shard_degree=shards[-1] if shards else 1)


def estimated_memory(work: Work | Staged, whole: Whole, spec: ShardingSpec) -> float:
    """Bytes that a rank takes on its device, nearly."""
    parameters = whole.parameters / spec.tensor_degree / spec.pipefusion_degree / spec.shard_degree
    if spec.offload != "none":
        parameters = 0.0
    if spec.shard_degree > 1 or spec.offload != "none":
        parameters += whole.parameters / spec.tensor_degree * COMING
    stale = max((u.stale for us in work.units for u in us.values()), default=0) if isinstance(work, Staged) else 0
    return parameters + whole.activations / spec.sequence_degree / spec.batch_degree * ROOM + stale + whole.arguments


COMING = 0.08
"""Of all parameters, what two blocks are that are there at a time."""

ROOM = 1.5
"""Buffers of exchanges, over values that are computed."""


def counted_memory(captured: Program, spec: ShardingSpec, groups: Sequence[ParameterGroup]) -> int:
    """Bytes that a rank takes on its device, from the programs it runs; of stages, that which takes most."""
    if spec.pipefusion_degree == 1:
        compiled = compile_program(captured, spec, 0, groups=groups if spec.parts else ())
        return rank_memory([compiled.body]).device
    pipeline = plan_pipeline(captured, spec)
    stages = [staged(pipeline, stage * spec.ranks_per_stage, groups=groups if spec.parts else ())[1]
              for stage in range(spec.pipefusion_degree)]
    return max(rank_memory([s.once, *s.units.values()], [s.once]).device for s in stages)
