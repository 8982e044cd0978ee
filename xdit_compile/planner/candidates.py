"""Every spec for so many devices, and the same with less on each of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from xdit_compile.planner.costs import Loop
from xdit_compile.spec import ALL, ShardingSpec


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


def smaller(spec: ShardingSpec, encoders: bool = False) -> Iterator[ShardingSpec]:
    """The same with a pipeline's ``encoders`` cut over ranks, if it has some, which costs least; with weights cut over
    ranks, ever more of them; and at last in the host's memory."""
    if encoders and spec.encoders == "everywhere" and spec.world_size > 1:
        spec = replace(spec, encoders="shard")
        yield spec
    if spec.offload == "none":
        yield from (replace(spec, shard_degree=n) for n in divisors(spec.replicas) if n > spec.shard_degree)
        yield from (replace(spec, shard_degree=n, offload="block") for n in reversed(divisors(spec.replicas)))
