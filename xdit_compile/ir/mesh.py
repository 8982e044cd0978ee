"""The grid of ranks: axis names, who stands where, and the logical names process groups go by in graphs."""

from __future__ import annotations

from collections.abc import Mapping

from xdit_compile.ir.layout import BATCH, PATCH, SEQUENCE, TENSOR
from xdit_compile.spec import ShardingSpec

ULYSSES, RING, STAGE, SHARD = "ulysses", "ring", "stage", "shard"


def axis_sizes(spec: ShardingSpec) -> dict[str, int]:
    """Ranks along each axis. ``sequence`` is the whole of ``ring`` x ``ulysses``, Ulysses varying fastest, so that
    its all-to-alls stay between neighbours; ``batch`` is that of ``data`` x ``cfg``, and varies slowest; between them
    are the stages of a pipeline. ``tensor``, along which most is sent, varies fastest of all. Patches are no ranks but
    times. ``shard`` is no axis of its own either: it groups ranks of the others, neighbours that hold shares of the
    same parameters."""
    return {BATCH: spec.batch_degree, STAGE: spec.pipefusion_degree, SEQUENCE: spec.sequence_degree,
            TENSOR: spec.tensor_degree, ULYSSES: spec.ulysses_degree, RING: spec.ring_degree, PATCH: spec.patches,
            SHARD: spec.shard_degree}


def position_of(rank: int, spec: ShardingSpec) -> dict[str, int]:
    """Where ``rank`` stands along each axis."""
    batch, rest = divmod(rank, spec.model_degree)
    stage, rest = divmod(rest, spec.ranks_per_stage)
    sequence, tensor = divmod(rest, spec.tensor_degree)
    return {BATCH: batch, STAGE: stage, SEQUENCE: sequence, TENSOR: tensor, ULYSSES: sequence % spec.ulysses_degree,
            RING: sequence // spec.ulysses_degree,
            SHARD: (batch * spec.sequence_degree + sequence) % spec.shard_degree}


def members(axis: str, rank: int, spec: ShardingSpec) -> list[int]:
    """The ranks that share a group along ``axis`` with ``rank``, in axis order."""
    here = position_of(rank, spec)
    if axis == SHARD:
        alike = [r for r in range(spec.world_size) if all(position_of(r, spec)[a] == here[a] for a in (STAGE, TENSOR))]
        first = alike.index(rank) - here[SHARD]
        return alike[first : first + spec.shard_degree]
    others = [a for a in (BATCH, STAGE, TENSOR, ULYSSES, RING) if a != axis and (
        axis != SEQUENCE or a not in (ULYSSES, RING))]
    return [r for r in range(spec.world_size)
            if all(position_of(r, spec)[a] == here[a] for a in others)]


def group_name(axis: str, sizes: Mapping[str, int]) -> str:
    """The name a graph calls the group by; bound to real processes at run time."""
    # How many a group of neighbours has does not follow from the other sizes.
    many = f"-{sizes[SHARD]}" if axis == SHARD else ""
    tensor = f"x{sizes[TENSOR]}" if sizes[TENSOR] > 1 else ""
    return f"xdit_compile.{axis}{many}.{sizes[ULYSSES]}x{sizes[RING]}x{sizes[BATCH]}{tensor}"
