"""Ending the collectives of process groups from outside, so that no rank stays blocked in one."""

from __future__ import annotations

import os
import re
import socket
import stat
import struct
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import count
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroup, Store

Ends = tuple[tuple[Any, ...], tuple[Any, ...]]
"""The two addresses of a connection, this process's first."""

_PEER_LOST = re.compile(
    r"Connection (closed|reset) by peer|Socket closed|Broken pipe|Timed out waiting|Application timeout"
    r"|NCCL communicator was aborted|ncclRemoteError|ncclSystemError|remote process exited"
)


def is_peer_loss(error: BaseException) -> bool:
    """Whether `error` says that a collective ended because of a peer, not because of this rank.

    The backends raise plain RuntimeErrors for this, so their text has to tell.
    """
    return isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError) or (
        isinstance(error, RuntimeError) and _PEER_LOST.search(str(error)) is not None
    )


class Connections:
    """What it takes to `abort` one process group later.

    All is found out at construction: when a rank fails, the store may be gone; and when a group is, the system gives
    its port to another one, so that connections go by both their ends, as long as they live.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group: ProcessGroup | None = group
        self.nccl: list[dist.ProcessGroupNCCL] = []
        published: list[bytes] = []
        for device in group._device_types:
            backend = group._get_backend(device)
            if dist.is_nccl_available() and isinstance(backend, dist.ProcessGroupNCCL):
                self.nccl.append(backend)
            elif isinstance(backend, dist.ProcessGroupGloo):
                store = dist.distributed_c10d._world.pg_map[group][1]
                published += _published(PrefixStore(f"{device}/", store), group.size())
        self.gloo = _between(published)

    @classmethod
    def of_gloo(cls, store: Store, size: int) -> Connections:
        """Those of a bare ProcessGroupGloo of `size` ranks that was made on `store`."""
        made = cls.__new__(cls)
        made.group, made.nccl, made.gloo = None, [], _between(_published(store, size))
        return made

    def lost(self) -> bool:
        """Whether one of gloo's has ended."""
        return len(self.gloo & _alive()) < len(self.gloo)


def missing_connections(group: ProcessGroup) -> int:
    """How many of a gloo group's connections to its peers have ended: one for each process that is gone. Zero where it
    has none of its own, or makes them at first use."""
    backends = {group._get_backend(device) for device in group._device_types}
    if not all(isinstance(one, dist.ProcessGroupGloo) for one in backends) or os.environ.get("TORCH_GLOO_LAZY_INIT"):
        return 0
    return (group.size() - 1) * len(backends) - len(Connections(group).gloo & _alive())


def _alive() -> frozenset[Ends]:
    """The connections that are open at both ends."""
    found = set()
    for ends, connection in open_connections():
        with connection, suppress(OSError):
            if not _hung_up(connection):
                found.add(ends)
    return frozenset(found)


def _hung_up(connection: socket.socket) -> bool:
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False


def abort(connections: Sequence[Connections]) -> None:
    """Make every running and later collective of these groups fail, here and on the ranks connected to us.

    NCCL has an abort of its own. ProcessGroupGloo has none that works (its `abort` and `shutdown` do
    nothing in torch 2.13), so its TCP connections are shut down: on both ends gloo then sees a peer that
    hung up, which wakes whoever waits. Where the open sockets cannot be listed (not Linux or macOS), gloo
    groups are left alone and their own timeout has to end the wait.
    """
    nccl = [backend for one in connections for backend in one.nccl]
    if nccl:
        # Within one NCCL group: communicators aborted one after the other can wait for each other.
        nccl[0]._group_start()
        for backend in nccl:
            backend.abort()
        nccl[0]._group_end()
    ours = {ends for one in connections for ends in one.gloo}
    for ends, connection in open_connections() if ours else ():
        with connection:
            if ends in ours:
                with suppress(OSError):  # closed meanwhile
                    connection.shutdown(socket.SHUT_RDWR)


def _between(published: Sequence[bytes]) -> frozenset[Ends]:
    """The connections that are open now, one end of which is among the addresses that were published."""
    found = set()
    for ends, connection in open_connections() if published else ():
        with connection:
            if any((end := _packed(address)) and end in text for address in ends for text in published):
                found.add(ends)
    return frozenset(found)


def _published(store: Store, size: int) -> list[bytes]:
    """What gloo wrote to the store: per rank, the address on which it accepted this group's connections."""
    found: list[bytes] = []
    for interface in count():
        keys = [f"{interface}/{rank}" for rank in range(size)]
        if not store.check(keys):
            return found
        found += store.multi_get(keys)
    return found


def open_connections() -> Iterator[tuple[Ends, socket.socket]]:
    """Duplicates of all connected internet sockets this process has open, with both their ends."""
    folder = "/proc/self/fd" if sys.platform == "linux" else "/dev/fd"
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        try:
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            found = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue  # closed meanwhile
        if found.family in (socket.AF_INET, socket.AF_INET6):
            with suppress(OSError):  # listening, or closed meanwhile
                yield (found.getsockname(), found.getpeername()), found
                continue
        found.close()


def _packed(address: tuple[Any, ...]) -> bytes:
    """The start of the sockaddr of an internet address: how gloo writes it to the store."""
    host, port = address[:2]
    if len(address) == 2:
        return struct.pack("=H", socket.AF_INET) + struct.pack(">H", port) + socket.inet_aton(host)
    packed = socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
    return struct.pack("=H", socket.AF_INET6) + struct.pack(">H", port) + bytes(4) + packed
