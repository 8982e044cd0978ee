"""Process groups under the logical names that graphs call them by.

A graph says ``xdit_compile.ulysses.2x1x1``; which processes that means is decided here, when the program is about
to run, so that one program serves any ranks of the right shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, cast

import torch.distributed as dist
from torch._C._distributed_c10d import _register_process_group, _unregister_process_group
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _get_default_store, _new_process_group_helper, _world

from xdit_compile.ir.layout import BATCH, SEQUENCE, TENSOR
from xdit_compile.ir.mesh import RING, SHARD, ULYSSES, axis_sizes, group_name, members
from xdit_compile.runtime.control.control_plane import ControlPlane
from xdit_compile.runtime.control.store import own_connection
from xdit_compile.spec import ShardingSpec

_made: dict[tuple[ProcessGroup, str, tuple[int, ...], int], ProcessGroup] = {}
_bound: dict[str, ProcessGroup] = {}


class ProcessGroups:
    """The groups of one spec on ``ranks`` (global ranks, in the order of the spec's mesh)."""

    def __init__(self, spec: ShardingSpec, ranks: Sequence[int], control: ControlPlane) -> None:
        self.rank = 0 if len(ranks) == 1 else list(ranks).index(dist.get_rank())
        self._groups: dict[str, ProcessGroup] = {}
        self._names: dict[str, str] = {}
        sizes = axis_sizes(spec)
        for axis in (BATCH, SEQUENCE, TENSOR, ULYSSES, RING, SHARD):
            if sizes[axis] > 1:
                peers = tuple(ranks[i] for i in members(axis, self.rank, spec))
                name = self._names[axis] = group_name(axis, sizes)
                self._groups[name] = make_group(name, peers, control)

    def bind(self) -> tuple[ProcessGroup, ...]:
        """Let the logical names mean these groups, which are returned."""
        for name, group in self._groups.items():
            if _bound.get(name) is not group:
                if name in _bound:
                    _unregister_process_group(cast(Any, name))
                _register_process_group(cast(Any, name), group)
                _bound[name] = group
        return tuple(self._groups.values())

    def along(self, axis: str) -> ProcessGroup | None:
        """That of an axis, if this rank is not alone on it."""
        return self._groups[self._names[axis]] if axis in self._names else None

    def all(self) -> tuple[ProcessGroup, ...]:
        return tuple(self._groups.values())


def make_group(name: str, ranks: tuple[int, ...], control: ControlPlane) -> ProcessGroup:
    """One group per name and ranks, until it fails. Not ``dist.new_group``: it names groups by how many a process
    has made, and ranks that differ in that wait for each other in vain; and it wants every rank of the job.

    Raises:
        RankFailure: one of the ranks of ``control`` is gone before all have made it.
    """
    world = dist.group.WORLD
    assert world is not None
    store = _get_default_store()
    generation = store.add(_generation_key(name, ranks), 0)
    key = (world, name, ranks, generation)
    if key not in _made:
        # Its own connection: who gives up waiting for a rank leaves behind a thread that still waits for its key, and
        # while it does nobody is served on that connection.
        own = own_connection(store)
        own.set_timeout(timedelta(seconds=control.timeout))
        group, _ = control.patiently(f"making the group {name}", lambda: _new_process_group_helper(
            len(ranks), ranks.index(dist.get_rank()), list(ranks), dist.get_backend(), own,
            cast(Any, f"{_generation_key(name, ranks)}.{generation}"), timeout=timedelta(seconds=control.timeout),
            group_desc=name))
        _world.pg_group_ranks[group] = {r: i for i, r in enumerate(ranks)}
        _made[key] = group
    return _made[key]


def forget(groups: Iterable[ProcessGroup]) -> None:
    """Never give out these groups again: a collective on them failed, and nobody knows what is still in flight. Told in
    the store, because some ranks may not have noticed; whoever tells it later tells nothing new."""
    given_up = set(groups)
    for (world, name, ranks, generation), group in list(_made.items()):
        if group in given_up:
            del _made[world, name, ranks, generation]
            with suppress(dist.DistError):  # a lost store: there is no job left to make groups in
                _get_default_store().compare_set(_generation_key(name, ranks), str(generation), str(generation + 1))


def _generation_key(name: str, ranks: tuple[int, ...]) -> str:
    """Where the store counts how often the group had to be given up."""
    return f"{name}.{'-'.join(map(str, ranks))}"
