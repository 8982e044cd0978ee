"""Element-wise operators: operands are laid out alike, the result is laid out as they are."""

from __future__ import annotations

import torch

from xdit_compile.ir.layout import Layout
from xdit_compile.passes.rules import rule
from xdit_compile.passes.sharded_value import Value

aten = torch.ops.aten


def _two(r):
    return r.tensor(2, 6, 4), r.pick(r.tensor(6, 4), r.tensor(2, 1, 4), r.tensor(4), 3.0)


@rule({
    aten.add.Tensor: _two,
    aten.mul.Tensor: _two,
    aten.gelu.default: lambda r: (r.tensor(2, 6, 4),),
    aten._to_copy.default: lambda r: (r.tensor(2, 6, 4),),
    aten.clone.default: lambda r: (r.tensor(2, 6, 4),),
    aten.where.self: lambda r: (r.tensor(6, 1) > 0, r.tensor(2, 6, 4), r.tensor(4)),
    aten.full_like.default: lambda r: (r.tensor(2, 6), 3.0),
    aten.zeros_like.default: lambda r: (r.tensor(2, 6),),
    aten.ones_like.default: lambda r: (r.tensor(2, 6),),
    aten.masked_fill.Scalar: lambda r: (r.tensor(2, 6), r.tensor(6) > 0, 0.5),
    aten.__and__.Tensor: lambda r: (r.tensor(2, 6) > 0, r.tensor(6) > 0),
    aten.__or__.Tensor: lambda r: (r.tensor(2, 6) > 0, r.tensor(6) > 0),
})
def pointwise(s, *args, **kwargs):
    """Any operator tagged element-wise; non-tensor arguments are passed on."""
    tensors = [i for i, a in enumerate(args) if isinstance(a, Value)]
    laid, dims = s.broadcast(*(args[i] for i in tensors))
    args = list(args)
    for i, value in zip(tensors, laid, strict=True):
        args[i] = value
    return s.emit(Layout(dims), *args, **kwargs)


@rule({aten.new_zeros.default: lambda r: (r.tensor(2, 6), [3, 4]),
       aten.new_ones.default: lambda r: (r.tensor(2, 6), [3, 4]),
       aten.new_full.default: lambda r: (r.tensor(2, 6), [3, 4], 0.5)})
def fresh(s, x, size, *value, **kwargs):
    """A constant that has no more of ``x`` than its type."""
    return s.emit(Layout.replicated(size), x, size, *value, **kwargs)
