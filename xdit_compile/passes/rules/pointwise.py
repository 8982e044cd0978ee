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
    aten.add.Tensor: lambda r: (*_two(r), {"alpha": r.pick(1, 2)}),
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
    aten.masked_fill.Tensor: lambda r: (r.tensor(2, 6), r.tensor(6) > 0, r.tensor()),
    aten.fill.Scalar: lambda r: (r.tensor(2, 6), 0.5),
    aten.fill.Tensor: lambda r: (r.tensor(2, 6), r.tensor()),
    aten.zero.default: lambda r: (r.tensor(2, 6),),
    aten.rsub.Tensor: lambda r: (r.tensor(2, 6, 4), r.tensor(6, 4), {"alpha": 2}),
    aten.floor_divide.default: lambda r: (r.tensor(2, 6, 4), 0.3),
    aten.hardswish.default: lambda r: (r.tensor(2, 6, 4),),
    aten.log_sigmoid.default: lambda r: (r.tensor(2, 6, 4),),
    aten._prelu_kernel.default: lambda r: (r.tensor(2, 6, 4), r.tensor(1, 6, 1)),
    aten.complex.default: lambda r: (r.tensor(2, 6), r.tensor(6)),
    aten.polar.default: lambda r: (r.tensor(2, 6), r.tensor(6)),
    aten._conj.default: lambda r: (torch.complex(r.tensor(2, 6), r.tensor(2, 6)),),
    aten._neg_view.default: lambda r: (r.tensor(2, 6),),
    aten.frexp.Tensor: lambda r: (r.tensor(2, 6),),
})
def pointwise(s, *args, **kwargs):
    """Any operator tagged element-wise, and some that are not; non-tensor arguments are passed on."""
    tensors = [i for i, a in enumerate(args) if isinstance(a, Value)]
    laid, dims = s.broadcast(*(args[i] for i in tensors))
    args = list(args)
    for i, value in zip(tensors, laid, strict=True):
        args[i] = value
    made = s.node.meta["val"]
    if isinstance(made, (tuple, list)):
        return s.emit_many([Layout(dims)] * len(made), *args, **kwargs)
    return s.emit(Layout(dims), *args, **kwargs)


@rule({aten.new_zeros.default: lambda r: (r.tensor(2, 6), [3, 4]),
       aten.new_ones.default: lambda r: (r.tensor(2, 6), [3, 4]),
       aten.new_full.default: lambda r: (r.tensor(2, 6), [3, 4], 0.5)})
def fresh(s, x, size, *value, **kwargs):
    """A constant that has no more of ``x`` than its type."""
    return s.emit(Layout.replicated(size), x, size, *value, **kwargs)
