"""What ranks do in the tests of a newcomer's mistakes."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from models import TinyDiT

import xdit_compile
from xdit_compile.errors import RankFailure, SpecError
from xdit_compile.progress import VARIABLE
from xdit_compile.runtime.uncaught import told_once


@contextlib.contextmanager
def heard(patience: str = "off") -> Iterator[io.StringIO]:
    """What is said on the standard error meanwhile."""
    before, os.environ[VARIABLE] = os.environ.get(VARIABLE, ""), patience
    try:
        with contextlib.redirect_stderr(io.StringIO()) as text:
            yield text
    finally:
        os.environ[VARIABLE] = before


def uncaught(kind: str) -> str:
    """What this rank prints of an exception that ends it."""
    before = sys.excepthook
    sys.excepthook = sys.__excepthook__
    try:
        with heard() as text:
            told_once()
            try:
                _raise(kind)
            except BaseException:
                sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        return text.getvalue()
    finally:
        sys.excepthook = before


def _raise(kind: str) -> None:
    rank = dist.get_rank()
    if kind == "alike":
        raise SpecError(f"the same on every rank of {os.getppid()}")
    if kind == "own":
        raise ZeroDivisionError("of rank 1") if rank == 1 else RankFailure(1, "failed: ZeroDivisionError: of rank 1")
    if kind == "killed":
        raise RankFailure(3, f"is gone (its connections have ended) {os.getppid()}")
    raise KeyboardInterrupt


def late(seconds: float) -> str:
    """What rank 0 says while it waits for rank 1, which comes late to the second call of a model."""
    model, inputs = TinyDiT().eval(), {"x": torch.ones(1, 8, 16)}
    parallel = xdit_compile.parallelize(model, "ulysses=2", ranks=[0, 1])
    with torch.no_grad():
        parallel(**inputs)
        with heard("0.4") as text:
            if dist.get_rank() == 1:
                time.sleep(seconds)
            parallel(**inputs)
            parallel.parallel_group.settle_comparisons() if hasattr(parallel, "parallel_group") else None
    return text.getvalue()


def timeline_of_one(seconds: float) -> Any:
    """Rank 0 alone asks for the timeline; rank 1 goes away."""
    torch.manual_seed(0)
    model = TinyDiT().eval()
    parallel = xdit_compile.parallelize(model, "pipefusion=2,patches=2", ranks=[0, 1])
    with torch.no_grad():
        for step in range(3):
            torch.as_tensor(parallel(x=torch.ones(1, 8, 16) * (1 + step)))
    group = parallel.runners["forward"].group
    if dist.get_rank() == 1:
        time.sleep(seconds)
        group.control.close()
        return ""
    try:
        with heard("0.4") as text:
            xdit_compile.timeline(parallel)
    except RankFailure as error:
        return text.getvalue(), str(error)
    return None
