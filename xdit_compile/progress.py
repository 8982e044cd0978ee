"""What users are told of long work and long waits, on the standard error: nothing of what is quick.

``XDIT_COMPILE_PROGRESS`` is after how many seconds work counts as long (default 5), or ``off``.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

VARIABLE = "XDIT_COMPILE_PROGRESS"
PATIENCE = 5.0
"""Seconds after which work is long, unless the environment says otherwise."""

_under_way: list[str] = []
"""What this process is doing, the innermost last."""


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Around work that may take long. Where it does, rank 0 says so, ever less often, and in the end how long it took;
    of work inside of other work, the innermost. Other ranks that wait for this one say what it does.

    Args:
        what: as in "capturing Model".
    """
    ended, start = threading.Event(), time.monotonic()
    seconds = patience()
    spoken = threading.Event()

    def speak() -> None:
        wait = seconds
        while wait is not None and not ended.wait(wait):
            if _under_way[-1:] == [what]:
                spoken.set()
                say(f"{what}, since {time.monotonic() - start:.0f} s")
            wait *= 2

    if seconds is not None and speaks():
        threading.Thread(target=speak, name="xdit-progress", daemon=True).start()
    _under_way.append(what)
    try:
        yield
    finally:
        _under_way.remove(what)
        ended.set()
    if spoken.is_set():
        say(f"{what} took {time.monotonic() - start:.1f} s")


def doing() -> str:
    """What this process does at the moment, as it said itself; empty if it did not."""
    return _under_way[-1] if _under_way else ""


def speaks() -> bool:
    """Whether this is the process that speaks to the user."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """One line for the user."""
    print(f"xdit_compile: {text}", file=sys.stderr, flush=True)


def patience() -> float | None:
    """Seconds after which work and waits are long; None to say nothing."""
    given = os.environ.get(VARIABLE, "")
    try:
        return None if given == "off" else float(given) if given else PATIENCE
    except ValueError:
        return PATIENCE
