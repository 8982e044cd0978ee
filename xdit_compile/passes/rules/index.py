"""Look-ups: the indices may be sharded freely, the table they look into is whole along the looked-up dimension."""

from __future__ import annotations

import torch

from xdit_compile.ir.layout import Layout
from xdit_compile.passes.rules import rule
from xdit_compile.passes.sharded_value import NoRule

aten = torch.ops.aten


@rule({aten.embedding.default: lambda r: (r.tensor(7, 4), r.indices(7, 2, 5))})
def embedding(s, table, indices, *args):
    table = s.whole(table)
    return s.emit(Layout((*indices.dims, *table.dims[1:])), table, indices, *args)


@rule({aten.index_select.default: lambda r: (r.tensor(2, 6, 4), 1, r.indices(6, 3))})
def index_select(s, x, dim, index):
    x = s.whole(x, dim)
    if x.sharded:
        index = s.whole(index)
    return s.emit(x.layout.replace(dim, index.dims[0]), x, dim, index)


@rule({aten.gather.default: lambda r: (r.tensor(2, 6, 4), 1, r.indices(6, 2, 3, 4))})
def gather(s, x, dim, index, **kwargs):
    """Along the gathered dimension the indices may be sharded; elsewhere both are cut alike."""
    x = s.whole(x, dim)
    for i in range(x.ndim):
        if i != dim % x.ndim:
            if x.shape[i] == index.shape[i] and not x.dims[i].axes & index.dims[dim].axes:
                best = x.dims[i] if x.dims[i].sharded else index.dims[i]
                x, index = s.lay(x, i, best), s.lay(index, i, best)
            else:
                x, index = s.whole(x, i), s.whole(index, i)
    return s.emit(index.layout, x, dim, index, **kwargs)


@rule({aten.index.Tensor: lambda r: (r.tensor(2, 6, 4), r.pick([None, r.indices(6, 3)], [r.indices(2, 5)],
                                                               [None, None, r.indices(4, 2, 3)]))})
def index(s, x, indices):
    """``x[:, indices]``: the dimensions of one index take the place of the one that it looks into."""
    (dim, one), *more = [(i, given) for i, given in enumerate(indices) if given is not None]
    if more or one.dtype in (torch.bool, torch.uint8):
        raise NoRule("several indices, or a mask")
    x = s.whole(x, dim)
    one = s.whole(one) if x.sharded else one
    return s.emit(Layout((*x.dims[:dim], *one.dims, *x.dims[dim + 1 :])), x, [*indices[:dim], one])
