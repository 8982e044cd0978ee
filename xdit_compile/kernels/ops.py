"""The operators through which compiled graphs call an attention kernel.

`xdit_compile::attention_lse(q, k, v, mask, scale, kernel) -> (out, lse)` and
`xdit_compile::attention(...) -> out` are for inference: they have no gradient. With B batch entries, H query
heads and Hkv key heads:

    q (B, H, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv), all of one dtype; H is a multiple of Hkv and query
        head h reads key head h // (H // Hkv). Any strides; fast when the last dimension is contiguous.
    mask: None, boolean (True attends) or additive, broadcastable to (B, H, Sq, Sk).
    scale: factor of the scores, D ** -0.5 if None.
    kernel: a name in `KERNELS`.
    out (B, H, Sq, Dv) in q's dtype; lse (B, H, Sq), float32, the natural logarithm of the sum of exp(scores).

A row with no key to attend to gives out 0 and lse -inf. B, H, Sq and Sk may be 0.

Raises ValueError for shapes that do not fit and for an unknown kernel, and KernelUnavailable for what the
kernel is unable to do, so that a kernel that ignores masks is never given one; also, at its first use, for a kernel
that does not compute what is said here (`probe.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from xdit_compile.kernels.base import unavailable
from xdit_compile.kernels.probe import broken_promise
from xdit_compile.kernels.registry import KERNELS

_ARGUMENTS = "(Tensor q, Tensor k, Tensor v, Tensor? mask, float? scale, str kernel)"


def _attention_lse(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, kernel: str, fake: bool = False
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, mask, kernel)
    # On empty inputs PyTorch's CPU kernel divides by zero, which kills the process, and others differ.
    if q.numel() == 0 or k.numel() == 0:
        return q.new_zeros(*q.shape[:3], v.shape[3]), q.new_full(q.shape[:3], -math.inf, dtype=torch.float32)
    chosen = KERNELS[kernel]
    if fake:
        return chosen.like(q, k, v, mask, scale)
    grouped, masked = q.shape[1] != k.shape[1], mask is not None
    reason = broken_promise(chosen, q.device, q.dtype, q.shape[3], v.shape[3], grouped, masked)
    if reason is not None:
        raise unavailable(kernel, reason)
    return chosen.forward(q, k, v, mask, scale)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, kernel: str, fake: bool = False
) -> Tensor:
    return _attention_lse(q, k, v, mask, scale, kernel, fake)[0]


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kernel: str) -> None:
    if kernel not in KERNELS:
        raise ValueError(f"no attention kernel is named {kernel!r}: choose from {list(KERNELS)}")
    (batch, heads, _, dim), kv_heads = q.shape, k.shape[1]
    fits = k.shape[:3] == v.shape[:3] and k.shape[0] == batch and k.shape[3] == dim
    if not fits or (heads % kv_heads if kv_heads else heads):
        raise ValueError(f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit together")
    reason = KERNELS[kernel].supports(q.device.type, q.dtype, dim, v.shape[3], mask is not None)
    if reason is not None:
        raise unavailable(kernel, reason)


# Plain registration rather than `torch.library.custom_op`, whose wrappers cost more than a small attention.
_library = torch.library.Library("xdit_compile", "FRAGMENT")
# Kernels are fast, and lay out their outputs, by their inputs' strides: a compiler must not change these.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
for _name, _function, _result in (
    ("attention_lse", _attention_lse, "(Tensor, Tensor)"),
    ("attention", _attention, "Tensor"),
):
    _library.define(f"{_name}{_ARGUMENTS} -> {_result}", tags=_TAGS)
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"xdit_compile::{_name}", partial(_function, fake=True), lib=_library)


@register_flop_formula([torch.ops.xdit_compile.attention_lse, torch.ops.xdit_compile.attention])
def _flops(
    q_shape: Sequence[int], k_shape: Sequence[int], v_shape: Sequence[int], *args: object, **kwargs: object
) -> int:
    """Two products, q k^T and weights times v, at two operations per multiply-add."""
    batch, heads, queries, dim = q_shape
    return 2 * batch * heads * queries * k_shape[2] * (dim + v_shape[3])


attention_lse = torch.ops.xdit_compile.attention_lse.default
attention = torch.ops.xdit_compile.attention.default
