"""How long a step of a denoising loop takes, how long the host is busy with it, and the memory it takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from gpu_parts.run import Figures, Run

Step = Callable[[int], Any]
"""The n-th step of a loop."""


def steps_of(call: Callable[..., Any], inputs: dict[str, Any], count: int = 64) -> Step:
    """Calls that differ in their times, as those of a loop do. The times are there before."""
    times = [inputs["timestep"] * (1 - i / count) for i in range(count)]
    return lambda i: call(**{**inputs, "timestep": times[i % count]})


def timed(run: Run, step: Step) -> Figures:
    """The first call, then steps in a loop, then steps one at a time.

    ``step_ms`` is of the loop, at whose end alone the device is waited for; ``alone_ms`` of a step after which it is,
    ``host_ms`` of that until the call returns, while the device may still be at work.
    """
    before = time.perf_counter()
    step(0)
    run.synchronize()
    found: Figures = {"first_call_s": time.perf_counter() - before}
    loop, single = (2, 2) if run.tiny else (10, 5)
    for i in range(1, 3):
        step(i)
    run.synchronize()
    before = time.perf_counter()
    for i in range(loop):
        step(i + 3)
    returned = time.perf_counter() - before
    run.synchronize()
    found |= {"step_ms": (time.perf_counter() - before) / loop * 1e3, "loop_returned_ms": returned / loop * 1e3}
    host, alone = [], []
    for i in range(single):
        run.synchronize()
        before = time.perf_counter()
        step(i)
        host.append(time.perf_counter() - before)
        run.synchronize()
        alone.append(time.perf_counter() - before)
    host_ms, alone_ms = statistics.median(host) * 1e3, statistics.median(alone) * 1e3
    found |= {"host_ms": host_ms, "alone_ms": alone_ms, "host_share": host_ms / alone_ms}
    if not run.on_gpu:
        found["host_share"] = None  # the host is the device
    return found | peak(run, step)


def peak(run: Run, step: Step) -> Figures:
    """Bytes that one step takes at its worst moment beyond what is held before it."""
    if not run.on_gpu:
        return {"peak_bytes": None}
    run.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    step(1)
    run.synchronize()
    return {"peak_bytes": torch.cuda.max_memory_allocated() - held, "held_bytes": held}
