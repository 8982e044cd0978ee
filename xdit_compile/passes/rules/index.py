"""Look-ups: the indices may be sharded freely, the table they look into is whole along the looked-up dimension."""

from __future__ import annotations

import torch

from xdit_compile.layout import Layout
from xdit_compile.passes.rules import rule

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
