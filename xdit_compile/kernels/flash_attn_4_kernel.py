"""FlashAttention-4 for Hopper and Blackwell, written in CuTe DSL: `flash_attn.cute`, of the package `flash-attn-4`."""

from __future__ import annotations

import torch
from torch import Tensor

from xdit_compile.kernels.base import Kernel, flash_problem, like_rows, package_problem


def _problem() -> str | None:
    # The folder flash_attn may be that of FlashAttention-2, which has no cute.
    return next((problem for package, attribute in (("flash_attn", "__path__"), ("flash_attn.cute", "flash_attn_func"))
                 if (problem := package_problem(package, attribute, install="pip install flash-attn-4"))), None)


def _supports(device_type: str, dtype: torch.dtype, head_dim: int, value_dim: int, masked: bool) -> str | None:
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 9:
        return "it needs a Hopper or Blackwell GPU (compute capability 9.0 or newer)"
    return flash_problem(device_type, dtype, head_dim, value_dim, masked)


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """See `Kernel.forward`; the package's layout is (B, S, H, D)."""
    from flash_attn.cute import flash_attn_func

    out, lse, *_ = flash_attn_func(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), softmax_scale=scale, return_lse=True)
    return out.transpose(1, 2), lse


KERNEL = Kernel("flash_attn_4", _problem, _supports, forward, like_rows)
