"""Matrix products: free dimensions keep their layouts; over a sharded contraction each rank has a summand."""

from __future__ import annotations

import torch

from xdit_compile.ir.layout import PATCH, TENSOR, Layout
from xdit_compile.passes.rules import rule

aten = torch.ops.aten


def contract(s, a, b, at):
    """Lay out ``a``'s last and ``b``'s ``at`` dimension alike; returns them and the axis a sum is pending over.

    Both sharded alike: a partial sum. One sharded: the other is sliced to it if replicated. A mixed dimension
    (replicated text beside sharded image) is gathered, or its replicated part would be summed once per rank. Patches
    are gathered too: what is kept of those of the step before are their values, not their sums.
    """
    for x, i in ((a, -1), (b, at)):
        dim = x.dims[i]
        if dim.sharded and not all(seg.axis for seg in dim.segments):
            a, b = s.whole(a, -1), s.whole(b, at)
    dim = a.dims[-1] if a.dims[-1].sharded else b.dims[at]
    free = {axis for d in (*a.dims[:-1], *(d for i, d in enumerate(b.dims) if i != at % b.ndim)) for axis in d.axes}
    if len(dim.axes) > 1 or dim.axes & (free | {PATCH}):
        return s.whole(a, -1), s.whole(b, at), None
    return s.lay(a, -1, dim), s.lay(b, at, dim), next(iter(dim.axes), None)


@rule({aten.linear.default: lambda r: (r.tensor(2, 6, 4), r.tensor(3, 4), r.pick(None, r.tensor(3)))})
def linear(s, x, weight, bias=None):
    """Features that tensor ranks share are contracted by each with its columns of the weight: a sum is pending."""
    if TENSOR in (x.dims[-1].axes | weight.dims[1].axes) and x.dims[-1].axes <= {TENSOR}:
        x, weight, partial = contract(s, x, weight, 1)
        if partial:
            weight = s.whole(weight, 0) if weight.dims[0].sharded else weight
            out = s.emit(Layout((*x.dims[:-1], weight.dims[0]), partial), x, weight)
            total = out if bias is None else s.summed(out)
            return total if bias is None else s.emit(total.layout, total, bias, target=aten.add.Tensor)
    x, weight = s.whole(x, -1), s.whole(weight, 1)
    if set().union(*(d.axes for d in x.dims)) & weight.dims[0].axes:
        weight = s.whole(weight, 0)
    bias = bias and s.lay(bias, 0, weight.dims[0])
    return s.emit(Layout((*x.dims[:-1], weight.dims[0])), x, weight, bias)


@rule({aten.addmm.default: lambda r: (
           r.pick(r.tensor(3), r.tensor(6, 1), r.tensor(1, 3)), r.tensor(6, 4), r.tensor(4, 3)),
       aten.baddbmm.default: lambda r: (
           r.pick(r.tensor(2, 6, 3), r.tensor(1, 6, 1)), r.tensor(2, 6, 4), r.tensor(2, 4, 3))})
def addmm(s, bias, a, b, **kwargs):
    a, b = s.whole(a, -1), s.whole(b, -2)
    if a.dims[-2].axes & b.dims[-1].axes:
        b = s.whole(b, -1)
    if a.ndim > 2:
        dim = a.dims[0] if a.dims[0].sharded else b.dims[0]
        a, b = s.lay(a, 0, dim), s.lay(b, 0, dim)
    out = (*a.dims[:-1], b.dims[-1])
    for i in range(-bias.ndim, 0):
        if bias.shape[i] != 1:
            bias = s.lay(bias, i, out[i])
    return s.emit(Layout(out), bias, a, b, **kwargs)


@rule({aten.mm.default: lambda r: (r.tensor(6, 4), r.tensor(4, 3)),
       aten._int_mm.default: lambda r: (r.tensor(6, 4).to(torch.int8), r.tensor(4, 3).to(torch.int8)),
       aten.bmm.default: lambda r: (r.tensor(2, 6, 4), r.tensor(2, 4, 3)),
       aten.matmul.default: lambda r: (r.tensor(2, 5, 6, 4), r.pick(r.tensor(4, 3), r.tensor(2, 5, 4, 3)))})
def matmul(s, a, b):
    a, b, partial = contract(s, a, b, -2)
    batch = max(a.ndim, b.ndim) - 2
    for i in range(-batch - 2, -2):
        if -i <= a.ndim and -i <= b.ndim and a.shape[i] == b.shape[i]:
            dim = a.dims[i] if a.dims[i].sharded else b.dims[i]
            a, b = s.lay(a, i, dim), s.lay(b, i, dim)
    taken = {axis for x in (a, b) for d in x.dims[:-2] for axis in d.axes}
    a = s.whole(a, -2) if a.dims[-2].axes & taken else a
    # Both free dimensions are sharded alike (scores of tokens by tokens): the second one is needed whole.
    b = s.whole(b, -1) if b.dims[-1].axes & (taken | a.dims[-2].axes) else b
    longer = a if a.ndim >= b.ndim else b
    outer = [next((x.dims[i] for x in (a, b) if -i <= x.ndim and x.shape[i] != 1), longer.dims[i])
             for i in range(-batch - 2, -2)]
    return s.emit(Layout((*outer, a.dims[-2], b.dims[-1]), partial), a, b)


@rule({aten.outer.default: lambda r: (r.tensor(5), r.tensor(4))})
def outer(s, a, b):
    if a.dims[0].axes & b.dims[0].axes:
        b = s.whole(b)
    return s.emit(Layout((a.dims[0], b.dims[0])), a, b)
