"""What one operator costs: floating-point operations from shapes alone. Multiply-adds count as two."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

aten = torch.ops.aten

Shape = Sequence[int]


def _contracting(args: Sequence[Any], out: Shape, at: int = 0) -> int:
    return 2 * math.prod(out) * args[at][-1]


def _convolution(args: Sequence[Any], out: Shape) -> int:
    return 2 * math.prod(out) * math.prod(args[1][1:])


def _transposed_convolution(args: Sequence[Any], out: Shape) -> int:
    return 2 * math.prod(args[0]) * math.prod(args[1][1:])


def attention_flops(q: Shape, k: Shape, v: Shape) -> int:
    """Scores and their product with the values: 2 B H Sq Sk (D + Dv); q, k, v are (..., H, S, D)."""
    return 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


FORMULAS = {
    aten.linear.default: _contracting,
    aten.mm.default: _contracting,
    aten._int_mm.default: _contracting,
    aten.bmm.default: _contracting,
    aten.matmul.default: _contracting,
    aten.addmm.default: lambda args, out: _contracting(args, out, 1),
    aten.baddbmm.default: lambda args, out: _contracting(args, out, 1),
    aten.scaled_dot_product_attention.default: lambda args, out: attention_flops(*args[:3]),
    **dict.fromkeys((aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding,
                     aten.conv2d.padding, aten.conv3d.padding), _convolution),
    **dict.fromkeys((aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input),
                    _transposed_convolution),
}


def flops(target: Any, args: Sequence[Any], out: Shape) -> int:
    """Floating-point operations of ``target`` on arguments of these shapes (non-tensors as they are); element-wise
    work counts as none, as in torch.utils.flop_counter."""
    formula = FORMULAS.get(target)
    return formula(args, out) if formula else 0
