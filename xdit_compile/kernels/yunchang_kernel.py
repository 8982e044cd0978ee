"""Kernels chosen by `yunchang` (Fang and Zhao 2024, USP, arXiv:2405.07719): FlashAttention-3 or -2.

Of the implementations behind `select_flash_attn_impl` (read in 0.6.4) only these two give a log-sum-exp that
can be merged. TORCH_MATH, the one that runs on a CPU, and TORCH_CUDNN return zeros for it; TORCH_FLASH and
TORCH_EFFICIENT round it to q's dtype; FLASHINFER takes one batch entry; the SAGE ones quantise.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from xdit_compile.kernels import flash_attn_kernel
from xdit_compile.kernels.base import Kernel, flash_problem, package_problem


def _problem() -> str | None:
    reason = package_problem("yunchang", "set_seq_parallel_pg", "yunchang")
    if reason is None and not _hopper():
        reason = flash_attn_kernel.problem()
        return reason and f"yunchang calls FlashAttention, but {reason}"
    return reason


def _supports(
    device_type: str, dtype: torch.dtype, head_dim: int, value_dim: int, masked: bool
) -> str | None:
    if head_dim % 8:  # the entry that yunchang calls lies below the one that pads
        return f"it needs a head dimension that is a multiple of 8, not {head_dim}"
    return flash_problem(device_type, dtype, head_dim, value_dim, masked)


def _hopper() -> bool:
    """Whether yunchang found FlashAttention-3 and this is the GPU generation it is for."""
    from yunchang.globals import HAS_FLASH_ATTN_HOPPER

    return HAS_FLASH_ATTN_HOPPER and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """See `Kernel.forward`; yunchang's layout is (B, S, H, D) and its log-sum-exp (B, H, Sq), natural."""
    from yunchang.kernels import AttnType, select_flash_attn_impl

    attend = select_flash_attn_impl(AttnType.FA3 if _hopper() else AttnType.FA, stage="fwd-only")
    # Every argument is given: FA3 has no defaults, and the default softcap None is refused further down.
    out, lse = attend(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        dropout_p=0.0,
        softmax_scale=q.shape[-1] ** -0.5 if scale is None else scale,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        return_softmax=False,
    )
    return out.transpose(1, 2), lse


def like(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """See `Kernel.like`. FlashAttention-3 lays out its result by rows, whatever the queries' strides are."""
    out, lse = flash_attn_kernel.like(q, k, v, mask, scale)
    if importlib.util.find_spec("yunchang") is not None and _hopper():
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
    return out, lse


KERNEL = Kernel("yunchang", _problem, _supports, forward, like)
