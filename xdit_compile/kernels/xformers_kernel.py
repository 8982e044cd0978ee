"""Memory-efficient attention (Rabe and Staats 2021, arXiv:2112.05682) of the package `xformers`."""

from __future__ import annotations

import torch
from torch import Tensor

from xdit_compile.kernels.base import HALF_DTYPES, Kernel, like_rows, package_problem


def _problem() -> str | None:
    return package_problem("xformers", "__version__", "xformers") or package_problem(
        "xformers.ops", "memory_efficient_attention_forward_requires_grad", "xformers")


def _supports(device_type: str, dtype: torch.dtype, head_dim: int, value_dim: int, masked: bool) -> str | None:
    if device_type != "cuda":
        return f"it runs on CUDA devices only, not on {device_type!r}"
    if dtype not in (*HALF_DTYPES, torch.float32):
        return f"it computes in float16, bfloat16 or float32, not in {dtype}"
    return "it is not given masks" if masked else None


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """See `Kernel.forward`; the package's layout is (B, S, H, D), and its rows of the log-sum-exp are padded."""
    from xformers.ops import memory_efficient_attention_forward_requires_grad

    group = q.shape[1] // k.shape[1]
    k, v = (t if group == 1 else t.repeat_interleave(group, 1) for t in (k, v))
    out, lse = memory_efficient_attention_forward_requires_grad(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale)
    return out.transpose(1, 2), lse[..., : q.shape[2]].contiguous()


KERNEL = Kernel("xformers", _problem, _supports, forward, like_rows)
