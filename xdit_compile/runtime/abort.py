"""Ending the collectives of process groups from outside, so that no rank stays blocked in one."""

from __future__ import annotations

import os
import re
import socket
import stat
import struct
import sys
from collections.abc import Iterator, Sequence
from itertools import count

import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroup, Store

_PEER_LOST = re.compile(
    r"Connection (closed|reset) by peer|Socket closed|Broken pipe|Timed out waiting|Application timeout"
    r"|NCCL communicator was aborted|ncclRemoteError|ncclSystemError|remote process exited"
)


def is_peer_loss(error: BaseException) -> bool:
    """Whether `error` says that a collective ended because of a peer, not because of this rank.

    The backends raise plain RuntimeErrors for this, so their text has to tell.
    """
    return isinstance(error, dist.DistBackendError | dist.DistNetworkError) or (
        isinstance(error, RuntimeError) and _PEER_LOST.search(str(error)) is not None
    )


class Connections:
    """What it takes to `abort` one process group later.

    Everything that needs the store is read at construction: when a rank fails, the store may be gone too.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.nccl: list[dist.ProcessGroupNCCL] = []
        self.published: list[bytes] = []
        for device in group._device_types:
            backend = group._get_backend(device)
            if dist.is_nccl_available() and isinstance(backend, dist.ProcessGroupNCCL):
                self.nccl.append(backend)
            elif isinstance(backend, dist.ProcessGroupGloo):
                store = dist.distributed_c10d._world.pg_map[group][1]
                self.published += _published(PrefixStore(f"{device}/", store), group.size())

    @classmethod
    def of_gloo(cls, store: Store, size: int) -> Connections:
        """Those of a bare ProcessGroupGloo of `size` ranks that was made on `store`."""
        made = cls.__new__(cls)
        made.nccl, made.published = [], _published(store, size)
        return made


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
    published = [text for one in connections for text in one.published]
    if not published:
        return
    for connection in _open_sockets():
        with connection:
            try:
                ends = [_packed(connection.getsockname()), _packed(connection.getpeername())]
                if any(end in text for end in ends if end for text in published):
                    connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # listening, or closed meanwhile


def _published(store: Store, size: int) -> list[bytes]:
    """What gloo wrote to the store: per rank, the address on which it accepted this group's connections."""
    found: list[bytes] = []
    for interface in count():
        keys = [f"{interface}/{rank}" for rank in range(size)]
        if not store.check(keys):
            return found
        found += store.multi_get(keys)
    return found


def _open_sockets() -> Iterator[socket.socket]:
    """Duplicates of all internet sockets this process has open."""
    folder = "/proc/self/fd" if sys.platform == "linux" else "/dev/fd"
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        try:
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            found = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue  # closed meanwhile
        if found.family in (socket.AF_INET, socket.AF_INET6):
            yield found
        else:
            found.close()


def _packed(address: tuple[str, int] | tuple[str, int, int, int]) -> bytes:
    """The start of the sockaddr of an internet address: how gloo writes it to the store."""
    host, port = address[:2]
    if len(address) == 2:
        return struct.pack("=H", socket.AF_INET) + struct.pack(">H", port) + socket.inet_aton(host)
    packed = socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
    return struct.pack("=H", socket.AF_INET6) + struct.pack(">H", port) + bytes(4) + packed
