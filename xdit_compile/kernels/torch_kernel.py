"""PyTorch's own attention kernels, called where they also give the log-sum-exp that merging needs.

`F.scaled_dot_product_attention` picks among the same operators but drops their log-sum-exp. The choice here
is by the same limits; whatever the fused operators cannot do is computed by `definition`, from the definition.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from xdit_compile.kernels.base import HALF_DTYPES, Kernel, ampere_or_newer, flash_problem

_cpu_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_cuda_flash = torch.ops.aten._scaled_dot_product_flash_attention.default
_cuda_efficient = torch.ops.aten._scaled_dot_product_efficient_attention.default

_FLOAT_DTYPES = (*HALF_DTYPES, torch.float32, torch.float64)
# The memory-efficient kernel loads rows of the bias in vectors of this many elements.
_BIAS_ALIGNMENT = 8


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attention with log-sum-exp, by the fastest operator PyTorch has for these inputs."""
    # The fused kernels read garbage, without an error, where the last dimension is not contiguous.
    if q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:
        device = q.device.type
        if device == "cpu" and q.shape[-1] == v.shape[-1]:
            return _flash_on_cpu(q, k, v, mask, scale)
        if device == "cuda" and _fits_cuda_flash(q, v, mask):
            out, lse, *_ = _cuda_flash(q, k, v, scale=scale)
            return out, lse
        if device == "cuda" and _fits_cuda_efficient(q, v, mask):
            return _efficient(q, k, v, mask, scale)
    return definition(q, k, v, mask, scale)


def _supports(
    device_type: str, dtype: torch.dtype, head_dim: int, value_dim: int, masked: bool
) -> str | None:
    return None if dtype in _FLOAT_DTYPES else f"it computes in floating point of 16 to 64 bits, not {dtype}"


def _flash_on_cpu(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    if mask is None:
        out, lse = _cpu_flash(q, k, v, scale=scale)
        return out, lse.float()
    # Beside 16-bit queries the kernel takes float32 too, to which no bias or finfo.min loses anything. Beside float64
    # it reads float32 as if it were float64.
    bias = mask if mask.dtype == q.dtype else _bias(mask, torch.float64 if q.dtype == torch.float64 else torch.float32)
    out, lse = _cpu_flash(q, k, v, attn_mask=bias.expand(*q.shape[:3], k.shape[2]), scale=scale)
    return out, _mark_empty_rows(lse.float(), bias)


def _efficient(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    k, v = _repeat_heads(q, k, v)
    bias = None if mask is None else _bias(mask, q.dtype)
    aligned = None if bias is None else _align(bias, (*q.shape[:3], k.shape[2]))
    out, lse, *_ = _cuda_efficient(q, k, v, aligned, True, scale=scale)
    lse = lse[..., : q.shape[2]]  # the kernel rounds the number of rows up to its tile
    return out, lse if bias is None else _mark_empty_rows(lse, bias)


def definition(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """The definition, in float32 or wider: softmax(q k^T scale + mask) v, with all scores in memory."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v = _repeat_heads(q, k, v)
    scores = (q.to(wide) * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.to(wide).mT
    if mask is not None:
        scores += _bias(mask, wide)
    lse = scores.logsumexp(-1, keepdim=True)
    # An empty row has lse -inf and -inf - -inf is NaN: any finite shift makes its weights exp(-inf) = 0.
    weights = (scores - lse.masked_fill(lse == -math.inf, 0.0)).exp()
    return (weights @ v.to(wide)).to(q.dtype), lse.squeeze(-1).float()


def _fits_cuda_flash(q: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    head_dim = q.shape[-1]
    problem = flash_problem("cuda", q.dtype, head_dim, v.shape[-1], mask is not None)
    return problem is None and head_dim % 8 == 0 and _flash_is_built()


def _fits_cuda_efficient(q: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    if q.dtype == torch.float64 or (q.dtype == torch.bfloat16 and not ampere_or_newer()):
        return False
    if mask is not None and mask.dtype not in (torch.bool, q.dtype):
        return False  # narrowing the bias could overflow finfo.min to -inf
    vector = 16 // q.itemsize
    return q.shape[-1] % vector == 0 and v.shape[-1] % vector == 0


@functools.cache
def _flash_is_built() -> bool:
    return torch.backends.cuda.is_flash_attention_available()


def _repeat_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v with one head per query head (grouped-query attention), untouched where they have it."""
    group = q.shape[1] // k.shape[1]
    return (k, v) if group == 1 else (k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """`mask` as a term of the scores, in its own shape: a boolean one gives 0 to attend and -inf not to."""
    return (torch.where(mask, 0.0, -math.inf) if mask.dtype == torch.bool else mask).to(dtype)


def _align(bias: Tensor, shape: Sequence[int]) -> Tensor:
    """`bias` expanded to `shape` = (B, H, Sq, Sk) with every row starting at a multiple of the alignment."""
    full = bias.expand(shape)
    *outer, last = full.stride()
    if last == 1 and all(start % _BIAS_ALIGNMENT == 0 for start in (*outer, full.storage_offset())):
        return full
    keys = shape[-1]
    rows = bias.expand(*bias.shape[:-1], keys)
    return F.pad(rows, (0, -keys % _BIAS_ALIGNMENT))[..., :keys].expand(shape)


def _mark_empty_rows(lse: Tensor, bias: Tensor) -> Tensor:
    """Set `lse` (B, H, Sq) to -inf, in place, in the rows where `bias` leaves no key.

    The fused kernels report 0 there, which a merge would take for a weight; their output is already 0.
    """
    return lse.masked_fill_(bias.amax(-1) == -math.inf, -math.inf)


KERNEL = Kernel("torch", lambda: None, _supports, forward, like=forward)
