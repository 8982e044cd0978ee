"""FlashAttention-2 from the `flash-attn` package (Dao 2023, arXiv:2307.08691)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from xdit_compile.kernels.base import Kernel, flash_problem, package_problem


def problem() -> str | None:
    """None if `flash-attn` can be imported, else the reason."""
    return package_problem("flash_attn", "flash_attn_func", "flash-attn")


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """See `Kernel.forward`; the package's layout is (B, S, H, D) and its log-sum-exp (B, H, Sq), natural."""
    from flash_attn import flash_attn_func

    # With no dropout `return_attn_probs` materialises no probabilities: it only lets the log-sum-exp out.
    out, lse, _ = flash_attn_func(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), softmax_scale=scale, return_attn_probs=True
    )
    return out.transpose(1, 2), lse


def like(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """See `Kernel.like`. The package (read in 2.8.3) pads the head dimension to a multiple of 8, makes the last
    dimension contiguous, and lays out its result as the queries it then has."""
    rows = F.pad(q.transpose(1, 2), (0, -q.shape[-1] % 8)) if q.shape[-1] % 8 else q.transpose(1, 2)
    out = torch.empty_like(rows if rows.stride(-1) == 1 else rows.contiguous())
    # Not by an index, for which PyTorch asks after the device, which may not be here.
    return out.narrow(-1, 0, v.shape[-1]).transpose(1, 2), q.new_empty(q.shape[:3], dtype=torch.float32)


KERNEL = Kernel("flash_attn", problem, flash_problem, forward, like)
