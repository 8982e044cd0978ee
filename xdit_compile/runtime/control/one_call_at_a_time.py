"""One parallel call at a time in a process: calls from several threads would meet those of other ranks in any order."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from xdit_compile.errors import XditError

_lock = threading.RLock()


@contextmanager
def alone(timeout: float) -> Iterator[None]:
    """Within, no other thread of this process is in a parallel call; a call within a call is part of it.

    Raises:
        XditError: another thread is in one for longer than ``timeout`` seconds.
    """
    if not _lock.acquire(timeout=timeout):
        raise XditError(f"another thread of this process has been in a parallel call for {timeout:g} s; parallel calls "
                        "are made one after the other, in the same order on every rank")
    try:
        yield
    finally:
        _lock.release()
