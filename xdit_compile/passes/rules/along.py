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
    aten.cumsum.default: lambda r: (r.tensor(2, 6, 4), r.pick(0, 1, -1)),
    aten.glu.default: lambda r: (r.tensor(2, 6, 4), r.pick(1, -1)),
    aten.argmax.default: lambda r: (r.tensor(2, 6, 4), r.pick(1, -1)),
})
def along(s, x, dim, *args, **kwargs):
    """The dimension is gathered; its new size is whatever the operator makes of it."""
    dim %= x.ndim
    x = s.whole(x, dim)
    return s.emit(_result(x, dim, s.node.meta["val"].shape), x, dim, *args, **kwargs)


@rule({
    aten.sort.default: lambda r: (r.tensor(2, 6, 4), r.pick(1, -1)),
    aten.max.dim: lambda r: (r.tensor(2, 6, 4), r.pick(1, -1)),
    aten.min.dim: lambda r: (r.tensor(2, 6, 4), r.pick(1, -1), True),
})
def along_many(s, x, dim=-1, *args, **kwargs):
    dim %= x.ndim
    x = s.whole(x, dim)
    return s.emit_many([_result(x, dim, out.shape) for out in s.node.meta["val"]], x, dim, *args, **kwargs)


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
