"""Look-ups: the indices may be sharded freely, the table they look into is whole along the looked-up dimension."""

from __future__ import annotations

import torch

from xdit_compile.ir.layout import Layout
from xdit_compile.passes.rules import rule
from xdit_compile.passes.sharded_value import NoRule, Value

aten = torch.ops.aten


@rule({aten.embedding.default: lambda r: (r.tensor(7, 4), r.indices(7, 2, 5))})
def embedding(s, table, indices, *args):
    table = s.whole(table, 0)
    if table.dims[1].axes & {axis for d in indices.dims for axis in d.axes}:
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


def _alike(s, x, others, dim):
    """Tensors that go together everywhere but along ``dim``, where each is whole."""
    x, others = s.whole(x, dim), [s.whole(o, dim) for o in others]
    for i in range(x.ndim):
        if i == dim % x.ndim:
            continue
        if all(o.shape[i] == x.shape[i] for o in others):
            best = next((v.dims[i] for v in (x, *others) if v.dims[i].sharded), x.dims[i])
            x, others = s.lay(x, i, best), [s.lay(o, i, best) for o in others]
        else:
            x, others = s.whole(x, i), [s.whole(o, i) for o in others]
    return x, others


def _scattered(r, *value):
    return r.tensor(2, 6, 4), r.pick(1, -1), r.indices(4, 2, r.pick(3, 6), 4), *value


@rule({aten.scatter.src: lambda r: _scattered(r, r.tensor(2, 6, 4)),
       aten.scatter.value: lambda r: _scattered(r, 0.5),
       aten.scatter_add.default: lambda r: _scattered(r, r.tensor(2, 6, 4)),
       aten.scatter_reduce.two: lambda r: (*_scattered(r, r.tensor(2, 6, 4)), r.pick("amax", "sum"))})
def scatter(s, x, dim, index, value, *how, **kwargs):
    x, (index, *source) = _alike(s, x, [index, value] if isinstance(value, Value) else [index], dim)
    return s.emit(x.layout, x, dim, index, *(source or [value]), *how, **kwargs)


@rule({aten.index_add.default: lambda r: (r.tensor(2, 6, 4), 1, r.indices(6, 3), r.tensor(2, 3, 4)),
       aten.index_copy.default: lambda r: (r.tensor(2, 6, 4), -2, torch.tensor([5, 0, 3]), r.tensor(2, 3, 4))})
def index_write(s, x, dim, index, source, **kwargs):
    x, (source,) = _alike(s, x, [source], dim)
    return s.emit(x.layout, x, dim, s.whole(index), source, **kwargs)


@rule({aten.index_fill.int_Scalar: lambda r: (r.tensor(2, 6, 4), r.pick(1, -1), r.indices(4, 2), 0.5)})
def index_fill(s, x, dim, index, value):
    x = s.whole(x, dim)
    return s.emit(x.layout, x, dim, s.whole(index), value)


def _several(indices):
    """Which dimensions are looked into, and where the dimensions of the indices go: at the first, if they are
    neighbours, else to the front."""
    dims = [i for i, given in enumerate(indices) if given is not None]
    if any(indices[i].dtype in (torch.bool, torch.uint8) for i in dims):
        raise NoRule("a mask")
    return dims, dims[0] if dims == list(range(dims[0], dims[-1] + 1)) else 0


@rule({aten.index.Tensor: lambda r: (r.tensor(2, 6, 4), r.pick(
    [None, r.indices(6, 3)], [r.indices(2, 5)], [None, None, r.indices(4, 2, 3)], [r.indices(2, 3), r.indices(6, 3)],
    [r.indices(2, 3), None, r.indices(4, 2, 1)], [None, r.indices(6, 2, 1), r.indices(4, 3)]))})
def index(s, x, indices):
    """``x[:, indices]``: the dimensions of the indices take the place of those that they look into."""
    dims, at = _several(indices)
    x = s.whole(x, *dims)
    given = [s.whole(indices[i]) if x.sharded else indices[i] for i in dims]
    given, new = s.broadcast(*given)
    kept = [d for i, d in enumerate(x.dims) if i not in dims]
    places = dict(zip(dims, given, strict=True))
    return s.emit(Layout((*kept[:at], *new, *kept[at:])), x, [places.get(i) for i in range(len(indices))])


@rule({aten.index_put.default: lambda r: (r.tensor(2, 6, 4), *r.pick(
    ([None, torch.tensor([5, 0, 3])], r.tensor(2, 3, 4)), ([None, r.indices(6, 3)], r.tensor()),
    ([r.indices(2, 3), r.indices(6, 3)], r.tensor(1)), ([None, None, torch.tensor([3, 1])], r.tensor(6, 2))))})
def index_put(s, x, indices, values, accumulate=False):
    """``x[:, indices] = values``: whole where they look, and the values like what is written into elsewhere."""
    dims, at = _several(indices)
    x = s.whole(x, *dims)
    rank = max(indices[i].ndim for i in dims)
    kept = [d for i, d in enumerate(x.dims) if i not in dims]
    places = [*kept[:at], *[None] * rank, *kept[at:]]
    for i in range(-values.ndim, 0):
        if places[i] is None:
            values = s.whole(values, i)
        elif values.shape[i] != 1:
            values = s.lay(values, i, places[i])
    return s.emit(x.layout, x, [i and s.whole(i) for i in indices], values, accumulate)


@rule({aten.bucketize.Tensor: lambda r: (r.tensor(2, 6), r.tensor(4).sort().values),
       aten.isin.Tensor_Tensor: lambda r: (r.indices(6, 2, 6), r.indices(6, 3))})
def looked_up(s, x, table, **kwargs):
    return s.emit(x.layout, x, s.whole(table), **kwargs)


@rule({aten.searchsorted.Tensor: lambda r: r.pick(
    (r.tensor(4).sort().values, r.tensor(2, 6)), (r.tensor(2, 4).sort().values, r.tensor(2, 6)),
    (table := r.tensor(4), r.tensor(2, 6), {"sorter": table.argsort()}))})
def searched(s, table, x, **kwargs):
    if table.ndim > 1 or kwargs.get("sorter") is not None:
        raise NoRule("several tables, or one that is not sorted")
    return s.emit(x.layout, s.whole(table), x, **kwargs)
