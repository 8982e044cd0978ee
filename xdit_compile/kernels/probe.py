"""Whether a kernel keeps its word: a tiny problem before its first use, against the definition.

Packages differ between versions in what they call a log-sum-exp (its base, its layout, whether it is there at all), in
which key head a query head reads, and in what they do with a scale. A kernel that differs would give wrong pictures
under a ring, and nobody would say so.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from xdit_compile.kernels import torch_kernel
from xdit_compile.kernels.base import Kernel

BATCH, HEADS, QUERIES, KEYS = 2, 4, 33, 47
TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Of results and of log-sum-exps, both of which are of the order of one. In float32 a GPU may multiply in TF32."""
ROUGH = 0.15
"""Of kernels that say themselves that they are approximate."""


@functools.cache
def broken_promise(kernel: Kernel, device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int,
                   grouped: bool, masked: bool) -> str | None:
    """None if ``kernel`` computes attention of this kind as `xdit_compile::attention_lse` promises, else what differs.

    Args:
        grouped: whether several query heads read one key head.
    """
    q, k, v, mask = _problem(device, dtype, head_dim, value_dim, grouped, masked)
    for scale in (None, 0.4 * head_dim ** -0.5):
        with torch.no_grad():
            try:
                out, lse = kernel.forward(q, k, v, mask, scale)
            except Exception as error:  # whatever a package raises
                return f"on a small example it fails: {type(error).__name__}: {error}"
            expected, sums = torch_kernel.definition(q, k, v, mask, scale)
            tolerance = ROUGH if kernel.approximate else TOLERANCES[dtype]
            if (differs := _looks(kernel, q, k, v, mask, scale, out, lse)) is not None:
                return differs
            if not _close(out, expected, tolerance):
                return _of_results(out, q, k, v, mask, scale, tolerance)
            if not _close(lse, sums, tolerance):
                return _of_sums(lse, sums, tolerance)
    return None


def _problem(device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int, grouped: bool,
             masked: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    generator, kv_heads = torch.Generator().manual_seed(0), HEADS // 2 if grouped else HEADS
    shapes = (BATCH, HEADS, QUERIES, head_dim), (BATCH, kv_heads, KEYS, head_dim), (BATCH, kv_heads, KEYS, value_dim)
    q, k, v = (torch.randn(s, generator=generator).to(device, dtype) for s in shapes)
    mask = torch.rand(BATCH, 1, QUERIES, KEYS, generator=generator) < 0.7
    mask[0, 0, 3] = False  # a row without keys
    return q, k, v, mask.to(device) if masked else None


def _looks(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, out: Tensor,
           lse: Tensor) -> str | None:
    """What is wrong with types, shapes and strides, for which programs are compiled ahead."""
    likes = None if kernel.like is kernel.forward else kernel.like(
        _meta(q), _meta(k), _meta(v), None if mask is None else _meta(mask), scale)
    for name, made, shape, dtype, like in (
            ("result", out, (*q.shape[:3], v.shape[3]), q.dtype, likes and likes[0]),
            ("log-sum-exp", lse, q.shape[:3], torch.float32, likes and likes[1])):
        if tuple(made.shape) != tuple(shape):
            return f"its {name} has the shape {list(made.shape)}, not {list(shape)}"
        if made.dtype != dtype:
            return f"its {name} is of {made.dtype}, not {dtype}"
        if like is not None and made.stride() != like.stride():
            return f"its {name} lies in memory with the strides {made.stride()}, not {like.stride()}"
    return None


def _meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _of_results(out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None,
                tolerance: float) -> str:
    group = q.shape[1] // k.shape[1]
    turns = [t.repeat(1, group, 1, 1) for t in (k, v)]
    if group > 1 and _close(out, torch_kernel.definition(q, turns[0], turns[1], mask, scale)[0], tolerance):
        return "with fewer key heads than query heads it reads them in another order"
    if scale is not None and _close(out, torch_kernel.definition(q, k, v, mask, None)[0], tolerance):
        return "it does not heed the scale"
    if mask is not None and _close(out, torch_kernel.definition(q, k, v, None, scale)[0], tolerance):
        return "it does not heed the mask"
    worst = (out.double() - torch_kernel.definition(q, k, v, mask, scale)[0].double()).abs().max().item()
    return f"its results differ by {worst:.2g} from the definition, and {tolerance:g} is allowed"


def _of_sums(lse: Tensor, sums: Tensor, tolerance: float) -> str:
    if _close(lse * math.log(2), sums, tolerance):
        return "its log-sum-exp is to base 2, not natural"
    if not lse.nan_to_num().any():
        return "its log-sum-exp is zero"
    return "its log-sum-exp is not that of the scores"


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance)
