"""Operators that see one dimension whole and treat the others as a batch."""

from __future__ import annotations

import torch

from xdit_compile.ir.layout import Dim, Layout
from xdit_compile.passes.rules import rule

aten = torch.ops.aten


@rule({
    aten.softmax.int: lambda r: (r.tensor(2, 6, 4), r.pick(1, -1)),
    aten._softmax.default: lambda r: (r.tensor(2, 6, 4), r.pick(1, -1), False),
    aten.log_softmax.int: lambda r: (r.tensor(2, 6, 4), r.pick(1, -1)),
    aten._log_softmax.default: lambda r: (r.tensor(2, 6, 4), r.pick(1, -1), False),
    aten._safe_softmax.default: lambda r: (r.tensor(2, 6, 4), r.pick(1, -1)),
    aten.cumsum.default: lambda r: (r.tensor(2, 6, 4), r.pick(0, 1, -1)),
    aten.cumprod.default: lambda r: (r.tensor(2, 6, 4), r.pick(0, 1, -1)),
    aten.logcumsumexp.default: lambda r: (r.tensor(2, 6, 4), r.pick(0, 1, -1)),
    aten.glu.default: lambda r: (r.tensor(2, 6, 4), r.pick(1, -1)),
    aten.argmax.default: lambda r: (r.tensor(2, 6, 4), r.pick(1, -1, None), r.pick(False, True)),
    aten.argmin.default: lambda r: (r.tensor(2, 6, 4), r.pick(1, -1, None), r.pick(False, True)),
})
def along(s, x, dim=None, *args, **kwargs):
    """The dimension is gathered; its new size is whatever the operator makes of it."""
    if dim is None and s.node.target is not aten.glu.default:
        return s.emit(Layout.replicated(s.node.meta["val"].shape), s.whole(x), dim, *args, **kwargs)
    dim = (-1 if dim is None else dim) % x.ndim
    x = s.whole(x, dim)
    return s.emit(_result(x, dim, s.node.meta["val"].shape), x, dim, *args, **kwargs)


@rule({
    aten.sort.default: lambda r: (r.tensor(2, 6, 4), r.pick(1, -1)),
    aten.max.dim: lambda r: (r.tensor(2, 6, 4), r.pick(1, -1)),
    aten.min.dim: lambda r: (r.tensor(2, 6, 4), r.pick(1, -1), True),
    aten.median.dim: lambda r: (r.tensor(2, 6, 4), r.pick(1, -1), r.pick(False, True)),
    aten.nanmedian.dim: lambda r: (r.tensor(2, 6, 4), r.pick(1, -1), r.pick(False, True)),
    aten.mode.default: lambda r: (r.tensor(2, 6, 4), r.pick(1, -1), r.pick(False, True)),
    aten.cummax.default: lambda r: (r.tensor(2, 6, 4), r.pick(1, -1)),
    aten.cummin.default: lambda r: (r.tensor(2, 6, 4), r.pick(1, -1)),
})
def along_many(s, x, dim=-1, *args, **kwargs):
    dim %= x.ndim
    x = s.whole(x, dim)
    return s.emit_many([_result(x, dim, out.shape) for out in s.node.meta["val"]], x, dim, *args, **kwargs)


@rule({
    aten.topk.default: lambda r: (r.tensor(2, 6, 4), 2, r.pick(1, -1)),
    aten.kthvalue.default: lambda r: (r.tensor(2, 6, 4), 2, r.pick(1, -1), r.pick(False, True)),
})
def chosen(s, x, count, dim=-1, *args, **kwargs):
    dim %= x.ndim
    x = s.whole(x, dim)
    return s.emit_many([_result(x, dim, out.shape) for out in s.node.meta["val"]], x, count, dim, *args, **kwargs)


@rule({aten.sort.stable: lambda r: (r.tensor(2, 6, 4), {"stable": True, "dim": r.pick(1, -1), "descending": True})})
def stable_sort(s, x, *, dim=-1, **kwargs):
    x = s.whole(x, dim)
    return s.emit_many([x.layout] * 2, x, dim=dim, **kwargs)


@rule({aten.linalg_cross.default: lambda r: (r.tensor(2, 6, 3), r.tensor(2, 6, 3))})
def cross(s, a, b, *, dim=-1):
    (a, b), dims = s.broadcast(s.whole(a, dim), s.whole(b, dim))
    return s.emit(Layout(dims), a, b, dim=dim)


@rule({
    aten._fft_r2c.default: lambda r: (r.tensor(2, 6, 4), r.pick([1], [2], [1, 2]), 0, r.pick(False, True)),
    aten._fft_c2c.default: lambda r: (torch.complex(r.tensor(2, 6, 4), r.tensor(2, 6, 4)), r.pick([1], [0, 2]), 0,
                                      True),
    aten._fft_c2r.default: lambda r: (torch.complex(r.tensor(2, 6, 4), r.tensor(2, 6, 4)), r.pick([1], [2]), 0, 6),
})
def fourier(s, x, dims, *args):
    """A transform reads all of its dimensions; the last may come out longer or shorter."""
    x = s.filled(s.whole(x, *dims), range(x.ndim))
    out = [Dim.replicated(n) if i in dims else d for i, (d, n) in enumerate(
        zip(x.dims, s.node.meta["val"].shape, strict=True))]
    return s.emit(Layout(tuple(out)), x, dims, *args)


@rule({op: lambda r: (r.tensor(2, 4, 4) + 8 * torch.eye(4),) for op in (
    aten.linalg_inv.default, aten.inverse.default, aten.linalg_inv_ex.default, aten.linalg_matrix_exp.default)})
def matrices(s, x, *args, **kwargs):
    """Of matrices in the last two dimensions, whole each; the others are a batch."""
    x, made = s.whole(x, -2, -1), s.node.meta["val"]
    layouts = [Layout((*x.dims[:-2], *map(Dim.replicated, out.shape[x.ndim - 2 :])))
               for out in (made if isinstance(made, (tuple, list)) else [made])]
    if isinstance(made, torch.Tensor):
        return s.emit(*layouts, x, *args, **kwargs)
    return s.emit_many(layouts, x, *args, **kwargs)


def _result(x, dim, shape):
    kept = [Dim.replicated(shape[dim])] if len(shape) == x.ndim else []
    return Layout((*x.dims[:dim], *kept, *x.dims[dim + 1 :]))


@rule({
    aten.flip.default: lambda r: (r.tensor(2, 6, 4), [r.pick(0, 1, -1)]),
    aten.roll.default: lambda r: (r.tensor(2, 6, 4), [2], [r.pick(0, 1)]),
})
def reordered(s, x, *args):
    """The reordered dimensions are gathered, the others stay as they are."""
    dims = args[-1] if len(args) > (s.node.target is aten.roll.default) else range(x.ndim)
    x = s.whole(x, *dims)
    return s.emit(x.layout, x, *args)
