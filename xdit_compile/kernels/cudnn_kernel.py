"""cuDNN's attention, which PyTorch brings along."""

from __future__ import annotations

import torch
from torch import Tensor

from xdit_compile.kernels.base import Kernel, flash_problem, like_rows

_cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention.default


def _problem() -> str | None:
    return None if torch.backends.cudnn.is_available() else "this PyTorch has no cuDNN, or there is no GPU"


def _supports(device_type: str, dtype: torch.dtype, head_dim: int, value_dim: int, masked: bool) -> str | None:
    return flash_problem(device_type, dtype, head_dim, value_dim, masked)


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """See `Kernel.forward`. In some versions the log-sum-exp has a last dimension of size one."""
    out, lse, *_ = _cudnn(q, k, v, None, True, scale=scale)
    rows = out.transpose(1, 2).contiguous().transpose(1, 2)  # its layout follows that of the queries
    return rows, (lse.squeeze(-1) if lse.ndim == 4 else lse).contiguous()


KERNEL = Kernel("cudnn", _problem, _supports, forward, like_rows)
