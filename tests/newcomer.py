"""What ranks do in the tests of a newcomer's mistakes."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import calls
import cases
import displaced
import pipefusion_runs
import pipelines
import torch
import torch.distributed as dist

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
        raise RankFailure(7, f"is gone (its connections have ended) {os.getppid()}")
    raise KeyboardInterrupt


def late(seconds: float) -> str:
    """What this rank says while rank 1 comes late to the second call of a model."""
    model, inputs = calls.Tiny().eval(), {"x": torch.ones(1, 8, 6), "step": torch.ones(1)}
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    parallel = xdit_compile.parallelize(model, "ulysses=2", ranks=[0, 1])
    with torch.no_grad():
        parallel(**inputs)
        with heard("0.4") as text:
            if dist.get_rank() == 1:
                time.sleep(seconds)
            parallel(**inputs | {"shift": torch.ones(1, 8, 6)})
    return text.getvalue()


def timeline_of_one() -> tuple[str, str] | None:
    """Rank 0 alone asks for the timeline, and rank 1 goes away."""
    entry = displaced.MODELS["dit"]
    parallel = xdit_compile.parallelize(cases.made(entry.case), "pipefusion=2,patches=2", ranks=[0, 1])
    pipefusion_runs.materialize(pipefusion_runs.loop(parallel, entry, entry.case.inputs(1, False), 3))
    group = parallel.runners["forward"].group
    if dist.get_rank() == 1:
        time.sleep(1.5)
        group.control.close()
        return None
    try:
        with heard("0.4") as text:
            xdit_compile.timeline(parallel)
    except RankFailure as error:
        return text.getvalue(), str(error)
    return None


def in_a_pipeline(folder: str, name: str, artifact: str) -> torch.Tensor:
    """What a pipeline gives whose transformer was exported, on two ranks."""
    pipe = pipelines.load(Path(folder) / name)
    pipe.transformer = xdit_compile.load(
        artifact, weights=Path(folder) / name / "transformer", ranks=range(2), timeout=120)
    return pipelines.run(pipe, pipelines.PIPELINES[name], num_inference_steps=2)
