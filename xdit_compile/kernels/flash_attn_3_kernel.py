"""FlashAttention-3 for Hopper (Shah et al. 2024, arXiv:2407.08608), from the package `flash_attn_interface`."""

from __future__ import annotations

import torch
from torch import Tensor

from xdit_compile.kernels.base import Kernel, flash_problem, like_rows, package_problem


def _problem() -> str | None:
    return package_problem("flash_attn_interface", "flash_attn_func",
                           install="build it from the folder hopper of FlashAttention's repository")


def _supports(device_type: str, dtype: torch.dtype, head_dim: int, value_dim: int, masked: bool) -> str | None:
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9:
        return "it needs a Hopper GPU (compute capability 9.x)"
    return flash_problem(device_type, dtype, head_dim, value_dim, masked)


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """See `Kernel.forward`; the package's layout is (B, S, H, D)."""
    from flash_attn_interface import flash_attn_func

    out, lse, *_ = flash_attn_func(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), softmax_scale=scale, return_attn_probs=True)
    return out.transpose(1, 2), lse


KERNEL = Kernel("flash_attn_3", _problem, _supports, forward, like_rows)
