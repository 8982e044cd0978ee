"""What a rank prints when it ends with an exception: each is told once, by the rank at fault."""

from __future__ import annotations

import hashlib
import os
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from xdit_compile.errors import RankFailure, XditError
from xdit_compile.progress import say, speaks

HERE = str(Path(__file__).parents[1])

_plain: Any = None
"""How exceptions were printed before ours; PyTorch puts a hook of its own around that."""


def told_once() -> None:
    """From now on, of an exception that ends this process: what all ranks raise alike is printed by one of them, and
    what another rank is at fault for by that one; errors of this package as one line. ``XDIT_COMPILE_LOG=DEBUG`` keeps
    Python's own way."""
    if os.environ.get("XDIT_COMPILE_LOG", "").upper() == "DEBUG" or getattr(sys.excepthook, "tells_once", False):
        return
    global _plain
    _plain = before = _plain or sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> Any:
        if isinstance(error, KeyboardInterrupt):
            if speaks():
                say("interrupted")
        elif is_mine(error):
            if isinstance(error, XditError):
                say(f"{_line(trace)}{kind.__name__}: {error}")
            else:
                before(kind, error, trace)

    hook.tells_once = True  # type: ignore[attr-defined]
    sys.excepthook = hook


def is_mine(error: BaseException) -> bool:
    """Whether this rank is the one to print an error. Asked once of each."""
    if isinstance(error, RankFailure) and error.told:
        return False
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return True
    key = hashlib.blake2b(f"{type(error).__name__}: {error}".encode(), digest_size=16).hexdigest()
    try:
        store: Any = dist.distributed_c10d._get_default_store()
        if isinstance(error, RankFailure):
            if error.rank >= 0 and store.check([f"xdit/tells/{error.rank}"]):
                return False
        else:
            store.set(f"xdit/tells/{dist.get_rank()}", "")
        return store.add(f"xdit/told/{key}", 1) == 1
    except RuntimeError:  # its host is gone
        return True


def _line(trace: TracebackType | None) -> str:
    """The last line of the user's that an error went through."""
    own = [f for f in traceback.extract_tb(trace) if not f.filename.startswith((HERE, "<"))]
    return f"{os.path.relpath(own[-1].filename)}:{own[-1].lineno}: " if own else ""
