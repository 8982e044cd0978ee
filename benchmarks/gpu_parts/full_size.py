"""FLUX and blocks of Wan: compiled by us, by torch.compile, and as they are; with and without CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gpu_parts import models
from gpu_parts.models import Measured
from gpu_parts.run import Figures, Run, difference
from gpu_parts.steps import steps_of, timed
from xdit_compile import explain, parallelize

TARGET_MS = 154.0
"""A step of FLUX.1-dev on one H100: 4.30 s for 28 steps were published."""


def flux_of(run: Run) -> Measured:
    return models.image_model(models.SMALL_FLUX if run.tiny else models.FLUX, run.device, run.dtype, run.own)


def wan_of(run: Run) -> Measured:
    return models.video_model(models.SMALL_WAN if run.tiny else models.WAN, run.device, run.dtype, run.own)


def flux(run: Run) -> Figures:
    """One step of FLUX.1-dev: ours against the plain model and ``torch.compile`` of it; host time and memory."""
    run.put("target_ms", TARGET_MS)
    compared(run, flux_of(run), seconds=100)
    ours = run.figures.get("ours", {})
    run.put("target_met", None if run.tiny or "step_ms" not in ours else ours["step_ms"] <= TARGET_MS)
    return run.figures


def wan(run: Run) -> Figures:
    """One step of two blocks of Wan 14B at 720p, ours against the others."""
    models.image_model.cache_clear()
    run.free()
    return compared(run, wan_of(run), seconds=40)


def graphs(run: Run) -> Figures:
    """FLUX with CUDA graphs, against the same without."""
    found = flux_of(run)
    run.put("model", found.name)
    for name, mode in {"off": "default", "on": "reduce-overhead"}.items():
        spec = f"ulysses=1,backend=inductor,mode={mode}" if run.on_gpu else "ulysses=1"

        def measured(spec: str = spec) -> Figures:
            torch._dynamo.reset()
            return timed(run, steps_of(parallelize(found.model, spec), found.inputs))

        run.attempt(name, measured)
        run.free()
    if not run.on_gpu:
        run.put("note", "CUDA graphs need CUDA: both are the same here")
    return run.figures


@torch.no_grad()
def compared(run: Run, found: Measured, seconds: float) -> Figures:
    """``ours``, ``eager``, ``plain`` and ``whole`` of one model, how far results are apart, and the memory foretold.

    Args:
        seconds: that compiling the whole model is expected to take.
    """
    run.put("model", found.name)
    run.put("parameters", sum(p.numel() for p in found.model.parameters()))
    results: dict[str, torch.Tensor] = {}
    ways: dict[str, Callable[[], Callable[..., Any]]] = {
        "ours": lambda: parallelize(found.model, f"ulysses=1,backend={run.backend}"),
        "eager": lambda: parallelize(found.model, "ulysses=1"),
        "plain": lambda: found.model,
        "whole": lambda: torch.compile(found.model, fullgraph=True, backend=run.backend),
    }
    for name, make in ways.items():
        def measured(name: str = name, make: Callable[[], Callable[..., Any]] = make) -> Figures:
            step = steps_of(make(), found.inputs)
            figures = timed(run, step)
            results[name] = step(5)[0].cpu()
            return figures

        run.attempt(name, measured, seconds if name == "whole" and not run.tiny else 0.0)
        run.free()
    if "plain" in results:
        run.put("difference", {name: difference(r, results["plain"]) for name, r in results.items() if name != "plain"})
    run.attempt("foretold_bytes", lambda: explain(found.model, "ulysses=1", found.inputs).local.activations)
    return run.figures
