"""Parts of a campaign that do not end well."""

from __future__ import annotations

import os
import time
from typing import Any


def fails(run: Any) -> None:
    run.put("before", 1)
    run.attempt("inside", lambda: 1 / 0)
    raise ValueError("on purpose")


def dies(run: Any) -> None:
    run.put("before", 2)
    os._exit(7)


def hangs(run: Any) -> None:
    run.put("before", 3)
    time.sleep(600)


def works(run: Any) -> None:
    run.put("late", run.attempt("needs time", lambda: 1, seconds=1e6))
    run.put("after", 4)
