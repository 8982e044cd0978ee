"""What needs a CUDA device: the checks of `benchmarks/gpu.py`, which runs them without pytest too."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from gpu_parts import checks, ranks
from gpu_parts.run import Figures, Run

if not torch.cuda.is_available():
    pytest.skip("there is no CUDA device", allow_module_level=True)

RUN = Run("cuda", False, True, time.time() + 3600)


@pytest.fixture(scope="module")
def both() -> Iterator[Figures]:
    """What two ranks that share the device have to say."""
    run = Run("cuda", False, True, time.time() + 600)
    yield ranks.ranks(run)


@pytest.mark.parametrize("name", checks.CHECKS | checks.COMPILING)
def test_one_process(name: str) -> None:
    assert (checks.CHECKS | checks.COMPILING)[name](RUN)


@pytest.mark.parametrize("name", ranks.tasks(RUN))
def test_two_ranks_that_share_the_device(both: Figures, name: str) -> None:
    assert "error" not in both[name], both[name]["traceback"]
