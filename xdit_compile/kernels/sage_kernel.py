"""SageAttention (Zhang et al. 2024, arXiv:2410.02367): keys and queries in 8 bits. Approximate on purpose."""

from __future__ import annotations

import torch
from torch import Tensor

from xdit_compile.kernels.base import HALF_DTYPES, Kernel, ampere_or_newer, like_rows, package_problem


def _problem() -> str | None:
    return package_problem("sageattention", "sageattn", "sage")


def _supports(device_type: str, dtype: torch.dtype, head_dim: int, value_dim: int, masked: bool) -> str | None:
    if device_type != "cuda" or not ampere_or_newer():
        return "it runs on CUDA devices of compute capability 8.0 or newer only"
    if dtype not in HALF_DTYPES:
        return f"it takes float16 or bfloat16, not {dtype}"
    if masked:
        return "it takes no attention mask"
    if head_dim != value_dim or head_dim > 128:
        return f"it needs keys and values of one width up to 128, not {head_dim} and {value_dim}"
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """See `Kernel.forward`."""
    from sageattention import sageattn

    rows = [t.transpose(1, 2).contiguous() for t in (q, k, v)]
    out, lse = sageattn(*rows, tensor_layout="NHD", sm_scale=scale, return_lse=True)
    return out.transpose(1, 2), lse


KERNEL = Kernel("sage", _problem, _supports, forward, like_rows, approximate=True)
