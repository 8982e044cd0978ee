"""The table of attention kernels, and the choice of one."""

from __future__ import annotations

import importlib.util
import warnings

import torch

from xdit_compile.errors import SpecError
from xdit_compile.kernels import (
    cudnn_kernel,
    flash_attn_3_kernel,
    flash_attn_4_kernel,
    flash_attn_kernel,
    sage_kernel,
    torch_kernel,
    xformers_kernel,
    yunchang_kernel,
)
from xdit_compile.kernels.base import Kernel, unavailable

KERNELS: dict[str, Kernel] = {
    module.KERNEL.name: module.KERNEL for module in (
        torch_kernel, flash_attn_kernel, flash_attn_3_kernel, flash_attn_4_kernel, cudnn_kernel, sage_kernel,
        xformers_kernel, yunchang_kernel)
}


def resolve(
    requested: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    masked: bool,
) -> str:
    """The name in `KERNELS` of the kernel to use for attention of this kind.

    "auto" is FlashAttention where it is installed and able, else PyTorch's own; an installed but broken
    FlashAttention is passed over with a warning that carries its error.

    Raises:
        SpecError: there is no kernel named `requested`.
        KernelUnavailable: the kernel named explicitly is absent or unable.
    """
    if requested != "auto" and requested not in KERNELS:
        raise SpecError(f"no attention kernel is named {requested!r}: choose from {['auto', *KERNELS]}")
    kernel = KERNELS["flash_attn" if requested == "auto" else requested]
    unable = kernel.supports(device.type, dtype, head_dim, value_dim, masked)
    obstacle = unable or kernel.available()
    if obstacle is None:
        return kernel.name
    if requested != "auto":
        raise unavailable(requested, obstacle)
    if unable is None and importlib.util.find_spec("flash_attn") is not None:
        warnings.warn(f"attention runs on PyTorch's own kernels: {obstacle}", RuntimeWarning, stacklevel=2)
    return "torch"
