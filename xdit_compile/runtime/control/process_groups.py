"""Process groups under the logical names that graphs call them by.

A graph says ``xdit_compile.ulysses.2x1x1``; which processes that means is decided here, when the program is about
to run, so that one program serves any ranks of the right shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, cast

import torch.distributed as dist
from torch._C._distributed_c10d import _register_process_group, _unregister_process_group
from torch.distributed import ProcessGroup, Store
from torch.distributed.distributed_c10d import _new_process_group_helper, _world

from xdit_compile.ir.layout import BATCH, SEQUENCE, TENSOR
from xdit_compile.ir.mesh import RING, SHARD, ULYSSES, axis_sizes, group_name, members
from xdit_compile.runtime.control.control_plane import ControlPlane
from xdit_compile.runtime.control.full_duplex import full_duplex
from xdit_compile.runtime.control.group_cache import cached
from xdit_compile.runtime.control.store import own_connection
from xdit_compile.spec import ShardingSpec

_bound: dict[str, tuple[ProcessGroup, ProcessGroup]] = {}
"""What a name means, and what graphs talk over, which the registry does not keep alive."""


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
            if name in _bound and _bound[name][0] is group:
                continue
            if name in _bound:
                _unregister_process_group(cast(Any, name))
            _bound[name] = group, full_duplex(group)
            _register_process_group(cast(Any, name), _bound[name][1])
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
    def make(store: Store, unique: str) -> ProcessGroup:
        # Its own connection: who gives up waiting for a rank leaves behind a thread that still waits for its key, and
        # while it does nobody is served on that connection.
        own = own_connection(store)
        own.set_timeout(timedelta(seconds=control.timeout))
        group, _ = control.patiently(f"making the group {name}", lambda: _new_process_group_helper(
            len(ranks), ranks.index(dist.get_rank()), list(ranks), dist.get_backend(), own, cast(Any, unique),
            timeout=timedelta(seconds=control.timeout), group_desc=name))
        _world.pg_group_ranks[group] = {r: i for i, r in enumerate(ranks)}
        return group

    return cached(name, ranks, make)
