"""The grid of ranks: axis names, who stands where, and the logical names process groups go by in graphs."""

from __future__ import annotations

from collections.abc import Mapping

from xdit_compile.layout import BATCH, SEQUENCE
from xdit_compile.spec import ShardingSpec

ULYSSES, RING = "ulysses", "ring"


def axis_sizes(spec: ShardingSpec) -> dict[str, int]:
    """Ranks along each axis. ``sequence`` is the whole of ``ring`` x ``ulysses``, Ulysses varying fastest, so that
    its all-to-alls stay between neighbours; ``batch`` is that of ``data`` x ``cfg``, and varies slowest."""
    return {BATCH: spec.batch_degree, SEQUENCE: spec.sequence_degree, ULYSSES: spec.ulysses_degree,
            RING: spec.ring_degree}


def position_of(rank: int, spec: ShardingSpec) -> dict[str, int]:
    """Where ``rank`` stands along each axis."""
    batch, sequence = divmod(rank, spec.sequence_degree)
    return {BATCH: batch, SEQUENCE: sequence, ULYSSES: sequence % spec.ulysses_degree,
            RING: sequence // spec.ulysses_degree}


def members(axis: str, rank: int, spec: ShardingSpec) -> list[int]:
    """The ranks that share a group along ``axis`` with ``rank``, in axis order."""
    here = position_of(rank, spec)
    others = [BATCH] if axis == SEQUENCE else [a for a in (BATCH, ULYSSES, RING) if a != axis]
    return [r for r in range(spec.world_size)
            if all(position_of(r, spec)[a] == here[a] for a in others)]


def group_name(axis: str, sizes: Mapping[str, int]) -> str:
    """The name a graph calls the group by; bound to real processes at run time."""
    return f"xdit_compile.{axis}.{sizes[ULYSSES]}x{sizes[RING]}x{sizes[BATCH]}"
