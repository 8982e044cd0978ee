"""Reductions: over whole dimensions they are local, over sharded ones each rank has a summand."""

from __future__ import annotations

import math

import torch

from xdit_compile.ir.layout import PATCH, Dim, Layout
from xdit_compile.passes.rules import rule
from xdit_compile.passes.sharded_value import Value

aten = torch.ops.aten


def _dims(x, dims):
    return sorted(range(x.ndim) if dims is None or dims == [] else
                  (d % x.ndim for d in (dims if isinstance(dims, (list, tuple)) else [dims])))


def _reduced(x, dims, keepdim):
    kept = [Dim.replicated(1) if i in dims else d for i, d in enumerate(x.dims) if keepdim or i not in dims]
    return tuple(kept)


@rule({aten.sum.dim_IntList: lambda r: (r.tensor(2, 6, 4), [r.pick(0, 1, -1)], r.pick(False, True)),
       aten.mean.dim: lambda r: (r.tensor(2, 6, 4), r.pick([1], [-1], [0, 1]), r.pick(False, True))})
def sums(s, x, dims=None, keepdim=False, *, dtype=None):
    over = _dims(x, dims)
    axes = {a for i in over for a in x.dims[i].axes}
    mixed = any(x.dims[i].sharded and not all(seg.axis for seg in x.dims[i].segments) for i in over)
    if len(axes) > 1 or PATCH in axes or mixed:
        x, axes = s.whole(x, *over), set()
    out = Layout(_reduced(x, over, keepdim), next(iter(axes), None))
    if not axes or s.node.target is aten.sum.dim_IntList:
        return s.emit(out, x, over, keepdim, dtype=dtype)
    # The mean divides by the global count, which no rank's own mean knows.
    total = s.emit(out, x, over, keepdim, dtype=dtype, target=aten.sum.dim_IntList)
    return s.emit(out, total, math.prod(x.shape[i] for i in over), target=aten.div.Tensor)


@rule({aten.amax.default: lambda r: (r.tensor(2, 6, 4), [1], r.pick(False, True)),
       aten.amin.default: lambda r: (r.tensor(2, 6, 4), [-1], r.pick(False, True)),
       aten.any.dim: lambda r: (r.tensor(2, 6, 4) > 0, 1, r.pick(False, True)),
       aten.linalg_vector_norm.default: lambda r: (r.tensor(2, 6, 4), 2.0, [-1], True)})
def whole_reduction(s, x, *args, **kwargs):
    """Reductions that no sum can finish: the reduced dimensions are gathered."""
    norm = s.node.target is aten.linalg_vector_norm.default
    order, rest = (args[:1], args[1:]) if norm else ((), args)
    dims, keepdim = [*rest, None, False][:2] if len(rest) < 2 else rest[:2]
    over = _dims(x, dims)
    x = s.whole(x, *over)
    return s.emit(Layout(_reduced(x, over, keepdim)), x, *order, *rest, **kwargs)


@rule({aten.layer_norm.default: lambda r: (r.tensor(2, 6, 4), [4], r.tensor(4), r.tensor(4)),
       aten.rms_norm.default: lambda r: (r.tensor(2, 6, 4), [4], r.pick(None, r.tensor(4)), 1e-6)})
def last_dims_norm(s, x, shape, *rest):
    x = s.whole(x, *range(x.ndim - len(shape), x.ndim))
    return s.emit(x.layout, x, shape, *(s.whole(r) if isinstance(r, Value) else r for r in rest))


@rule({aten.group_norm.default: lambda r: (
    r.tensor(2, 4, 6, 3), 2, r.pick(None, r.tensor(4)), r.pick(None, r.tensor(4)), 1e-5)})
def group_norm(s, x, groups, weight=None, bias=None, eps=1e-5, cudnn=True):
    """Over sharded space the moments are summed over ranks: mean first, then squares about it (no cancellation)."""
    x, weight, bias = s.whole(x, 1), weight and s.whole(weight), bias and s.whole(bias)
    axes = {a for d in x.dims[2:] for a in d.axes}
    mixed = any(d.sharded and not all(seg.axis for seg in d.segments) for d in x.dims)
    if not axes:
        return s.emit(x.layout, x, groups, weight, bias, eps, cudnn)
    if len(axes) > 1 or mixed or PATCH in axes:
        x = s.whole(x, *range(2, x.ndim))
        return s.emit(x.layout, x, groups, weight, bias, eps, cudnn)
    batch, channels, *space = x.dims
    grouped = (batch, Dim.replicated(groups), Dim.replicated(channels.size // groups), *space)
    wide = {"dtype": torch.promote_types(x.dtype, torch.float32)}
    y = s.emit(Layout(grouped), x, [d.local_size(s.position) for d in grouped], target=aten.reshape.default)
    over, count = list(range(2, len(grouped))), channels.size // groups * math.prod(d.size for d in space)
    flat = Layout((*grouped[:2], *[Dim.replicated(1)] * len(over)), next(iter(axes)))

    def mean(v):
        total = s.summed(v)
        return s.emit(total.layout, total, count, target=aten.div.Tensor)

    centre = mean(s.emit(flat, y, over, True, **wide, target=aten.sum.dim_IntList))
    # One kernel sums the squares: no tensor of squares beside that of differences.
    root = s.emit(flat, s.emit(y.layout, y, centre, target=aten.sub.Tensor), 2.0, over, True, **wide,
                  target=aten.linalg_vector_norm.default)
    scale = mean(s.emit(flat, root, root, target=aten.mul.Tensor))
    scale = s.emit(scale.layout, scale, eps, target=aten.add.Tensor)
    scale = s.emit(scale.layout, scale, target=aten.rsqrt.default)
    columns = Layout((batch, *grouped[1:3], *flat.dims[3:]))
    shape = [1, *(d.size for d in columns.dims[1:])]
    if weight is not None:
        weight = s.emit(Layout((Dim.replicated(1), *columns.dims[1:])), weight, shape, target=aten.reshape.default)
        scale = s.emit(columns, scale, weight, target=aten.mul.Tensor)
    shift = s.emit(scale.layout, scale, centre, target=aten.mul.Tensor)
    shift = s.emit(shift.layout, shift, target=aten.neg.default)
    if bias is not None:
        bias = s.emit(Layout((Dim.replicated(1), *columns.dims[1:])), bias, shape, target=aten.reshape.default)
        shift = s.emit(columns, shift, bias, target=aten.add.Tensor)
    y = s.emit(y.layout, shift, y, scale, target=aten.addcmul.default)
    y = s.emit(x.layout, y, [d.local_size(s.position) for d in x.dims], target=aten.reshape.default)
    return y if x.dtype == wide["dtype"] else s.emit(x.layout, y, dtype=x.dtype, target=aten._to_copy.default)
