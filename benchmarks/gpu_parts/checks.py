"""What must hold on a GPU, in one process: attention kernels are right, and artifacts come back as what they were.

Each check returns figures and raises AssertionError where something is not as it must be.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend

import xdit_compile
from gpu_parts import models
from gpu_parts.run import Figures, Run, difference
from xdit_compile.kernels import KERNELS, attention_lse
from xdit_compile.runtime.compilation.cuda_graphs import GraphedFunction

c10d = torch.ops._c10d_functional

ENOUGH = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest differences over largest values that rounding explains."""

KINDS = ((1, 4, 4, 100, 100, 64, False), (2, 4, 2, 33, 77, 128, False), (1, 2, 2, 40, 56, 64, True))
"""Batch, heads, heads of keys, queries, keys, width, whether masked."""


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
              mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(q k^T) v and the log-sum-exp in float64."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def kernels(run: Run) -> Figures:
    """Each attention kernel of the registry on this device, in all types it takes."""
    found: Figures = {}
    for name, kernel in KERNELS.items():
        if reason := kernel.available():
            found[name] = {"absent": reason}
            continue
        found[name] = {"worst": {}, "unable": []}
        for dtype, enough in ENOUGH.items():
            for batch, heads, kv, queries, keys, width, masked in KINDS:
                if reason := kernel.supports(run.device, dtype, width, width, masked):
                    found[name]["unable"].append(f"{dtype}, {'masked' if masked else 'no mask'}: {reason}")
                    continue
                q, k, v = (models.random(i, batch, *shape, width).to(run.device, dtype)
                           for i, shape in enumerate(((heads, queries), (kv, keys), (kv, keys))))
                mask = models.random(9, queries, keys).to(run.device) > -0.5 if masked else None
                actual = attention_lse(q, k, v, mask, None, name)
                error = max(map(difference, actual, reference(q, k, v, mask)))
                assert error <= enough, f"{name} in {dtype}, queries {tuple(q.shape)}, keys {tuple(k.shape)}: {error}"
                found[name]["worst"][str(dtype)] = max(error, found[name]["worst"].get(str(dtype), 0.0))
    return found


def grouped(run: Run) -> Figures:
    """Which of its kernels PyTorch takes where several query heads read one key head. The one that holds all scores in
    memory (MATH) must not be it, where there is another."""
    found: Figures = {}
    for dtype in (run.dtype, torch.float32):
        for batch, heads, kv, queries, keys, width, masked in KINDS[1:]:
            q, k, v = (models.random(i, batch, *shape, width).to(run.device, dtype)
                       for i, shape in enumerate(((heads, queries), (kv, keys), (kv, keys))))
            mask = models.random(9, queries, keys).to(run.device) > -0.5 if masked else None
            choice = torch._fused_sdp_choice(q, k, v, mask, 0.0, False, scale=None, enable_gqa=heads != kv)
            name = f"{dtype}, {heads} heads over {kv}, {'a mask' if masked else 'no mask'}"
            found[name] = SDPBackend(choice).name if choice >= 0 else "none"
            assert masked or not run.on_gpu or dtype not in (torch.float16, torch.bfloat16) or (
                found[name] != "MATH"), f"{name}: all scores are held in memory"
    return found


def communicators(run: Run) -> Figures:
    """Collectives of two groups, each with a communicator of its own, in one CUDA graph."""
    if not run.on_gpu:
        return {"skipped": "CUDA graphs and NCCL need a GPU"}
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        groups = [dist.new_group([0]) for _ in range(2)]

        def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            for group in groups:
                x = c10d.wait_tensor(c10d.all_reduce(x, "sum", group.group_name)) * 2
            return (x,)

        call, first = GraphedFunction(function, [False]), None
        for i in range(5):
            x = torch.full((1024,), float(i), device=run.device)
            (result,) = call(x)
            assert torch.equal(result, x * 4), i
            first = result if first is None else first
        assert not first.any(), "a later replay has written into the results of a call before"
        return {"difference": 0.0}
    finally:
        dist.destroy_process_group()


def artifact(run: Run, native: bool = False) -> Figures:
    """Exported on this device and loaded again, the model gives the same."""
    model, inputs = small(run.device)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        expected = model(**inputs)[0]
        path = xdit_compile.export(model, "ulysses=1", inputs, Path(folder) / "model.xdit", weights="included",
                                   native=native)
        loaded = xdit_compile.load(path, native=native, device=run.device)
        error = difference(loaded(**inputs)[0], expected)
    assert error <= ENOUGH[torch.float32], error
    return {"difference": error}


def native(run: Run) -> Figures:
    """The same, compiled ahead by AOTInductor."""
    return artifact(run, native=True)


def compiled(run: Run) -> Figures:
    """Compiled by inductor, the model gives the same; three steps of it."""
    model, inputs = small(run.device)
    with torch.no_grad():
        parallel = xdit_compile.parallelize(model, "ulysses=1,backend=inductor")
        errors = [difference(parallel(**call)[0], model(**call)[0])
                  for call in ({**inputs, "timestep": inputs["timestep"] * f} for f in (1.0, 0.5, 0.1))]
    assert max(errors) <= ENOUGH[torch.float32], errors
    return {"difference": max(errors)}


def small(device: str, batch: int = 1) -> tuple[torch.nn.Module, Figures]:
    """A model small enough to be compared in float32, equal in all processes, and arguments for it."""
    torch.manual_seed(0)
    model = models.own_image_model(models.SMALL_FLUX).eval().requires_grad_(False).to(device)
    return model, models.image_inputs(models.SMALL_FLUX, device, torch.float32, batch)


CHECKS: dict[str, Callable[[Run], Figures]] = {
    "kernels": kernels, "grouped heads": grouped, "two communicators in one graph": communicators, "artifact": artifact}
COMPILING: dict[str, Callable[[Run], Figures]] = {"compiled": compiled, "native": native}
"""Those that take a compiler's time."""


def checks(run: Run) -> Figures:
    """Attention kernels against float64; an artifact, written and read."""
    for name, check in CHECKS.items():
        run.attempt(name, lambda check=check: check(run))  # type: ignore[misc]
    return run.figures


def compiling(run: Run) -> Figures:
    """Functions of inductor and of AOTInductor, against the model as it is."""
    for name, check in COMPILING.items():
        run.attempt(name, lambda check=check: check(run), 0 if run.tiny else 30)  # type: ignore[misc]
    return run.figures
