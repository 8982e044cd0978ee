"""The store that ranks find each other by: on loopback where one machine is all, and never waited on for ever."""

from __future__ import annotations

import os
import socket
import struct
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore

from xdit_compile.runtime.control.abort import open_connections

LOOPBACK = "127.0.0.1"

# Seconds after which a store that does not answer counts as lost.
STORE_TIMEOUT = 5.0


def listening_store(port: int = 0, world_size: int | None = None, timeout: float = 300.0) -> TCPStore:
    """A store that this process serves on loopback, at `port` or whatever is free.

    Torch's own server listens on all interfaces, whatever address it is given, and asks nobody who they are; a socket
    that is bound already it takes as it is.
    """
    listener = socket.create_server((LOOPBACK, port))
    return TCPStore(LOOPBACK, listener.getsockname()[1], world_size, is_master=True, wait_for_workers=False,
                    timeout=timedelta(seconds=timeout), master_listen_fd=listener.detach())


def loopback_interface() -> str:
    """The name that this system has for the interface of 127.0.0.1."""
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in names if name in ("lo", "lo0")), names[0])


def stay_on_loopback() -> None:
    """Have gloo and NCCL listen on loopback only, in groups made from now on, unless the user chose an interface."""
    for library in ("GLOO", "NCCL"):
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", loopback_interface())


def never_wait_long(store: Store, seconds: float = STORE_TIMEOUT) -> None:
    """Have every request to the server of `store` from this process fail after `seconds` without an answer.

    Torch's client waits for the answer to most requests in a plain `recv`, with no limit: where the process that
    serves is stopped, for ever. Waits for a key to be set are not limited by this: they poll.
    """
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    if not isinstance(store, TCPStore):
        return
    whole, part = divmod(seconds, 1)
    limit = struct.pack("@ll", int(whole), int(part * 1e6))
    for (_, peer), connection in open_connections():
        with connection:
            if peer[1] == store.port:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


def own_connection(store: Any) -> Store:
    """A connection of its own to the same store: someone else's long wait must not hold it up."""
    made: Store = store.clone()
    made.set_timeout(timedelta(seconds=STORE_TIMEOUT))
    never_wait_long(made)
    return made


def attempt(store: Store, name: str, rank: int) -> int:
    """Which time it is that these ranks come together as ``name``. Counted in the store, not in this process, so that
    a rank that failed to come as often as the others is in step with them again."""
    counter = f"{name}/attempt"
    while True:
        now: int = store.add(counter, 0)
        # One that has failed already, because this rank did not come, is not joined any more: the others begin anew.
        if store.add(f"{name}/{now}/joined{rank}", 1) == 1 and not store.check([f"{name}/{now}/verdict"]):
            return now
        store.compare_set(counter, str(now), str(now + 1))
