"""Operators that move, cut and join dimensions: the layout moves with them."""

from __future__ import annotations

import sys
from itertools import accumulate, pairwise

import torch

from xdit_compile.ir.layout import TENSOR, Dim, Layout, concatenate, length, reshape
from xdit_compile.passes.rules import rule
from xdit_compile.passes.sharded_value import NoRule

aten = torch.ops.aten


@rule({aten.reshape.default: lambda r: r.pick(
    (r.tensor(2, 6, 4), [12, 4]), (r.tensor(12, 4), [2, 6, 2, 2]), (r.tensor(6, 4), [4, 6]), (r.tensor(1, 8), [8, 1]))})
def reshape_(s, x, shape):
    dims = reshape(x.dims, shape)
    if dims is None:
        # Some dimension cannot be followed: gather the innermost sharded ones until the rest can.
        for i in reversed([i for i, d in enumerate(x.dims) if d.sharded]):
            x = s.whole(x, i)
            dims = reshape(x.dims, shape)
            if dims is not None:
                break
    assert dims is not None
    return s.emit(Layout(dims), x, [d.local_size(s.position) for d in dims])


@rule({aten.permute.default: lambda r: (r.tensor(2, 3, 4), r.pick([2, 0, 1], [0, -1, 1]))})
def permute(s, x, order):
    return s.emit(Layout(tuple(x.dims[i] for i in order)), x, order)


@rule({aten.transpose.int: lambda r: (r.tensor(2, 3, 4), 0, r.pick(1, -1))})
def transpose(s, x, a, b):
    dims = list(x.dims)
    dims[a], dims[b] = dims[b], dims[a]
    return s.emit(Layout(tuple(dims)), x, a, b)


@rule({aten.t.default: lambda r: (r.tensor(3, 4),)})
def t(s, x):
    return s.emit(Layout(x.dims[::-1]), x)


@rule({aten.unsqueeze.default: lambda r: (r.tensor(3, 4), r.pick(0, 1, -1))})
def unsqueeze(s, x, dim):
    dims = list(x.dims)
    dims.insert(dim % (x.ndim + 1), Dim.replicated(1))
    return s.emit(Layout(tuple(dims)), x, dim)


@rule({aten.squeeze.dim: lambda r: (r.tensor(3, 1, 4), r.pick(0, 1)),
       aten.squeeze.dims: lambda r: (r.tensor(3, 1, 4, 1), [1, 3]),
       aten.squeeze.default: lambda r: (r.tensor(3, 1, 4, 1),)})
def squeeze(s, x, dims=None):
    # Named dimensions only, and only those of global size one: a share of one is no dimension of one.
    named = range(x.ndim) if dims is None else dims if isinstance(dims, (list, tuple)) else [dims]
    gone = [d % x.ndim for d in named if x.shape[d] == 1]
    return s.emit(Layout(tuple(d for i, d in enumerate(x.dims) if i not in gone)), x, gone, target=aten.squeeze.dims)


@rule({aten.expand.default: lambda r: (r.tensor(3, 1, 4), [2, 3, 5, 4])})
def expand(s, x, sizes, **kwargs):
    new = [Dim.replicated(n) for n in sizes[: len(sizes) - x.ndim]]
    dims = new + [d if d.size != 1 or n == -1 else Dim.replicated(n)
                  for d, n in zip(x.dims, sizes[len(new):], strict=True)]
    return s.emit(Layout(tuple(dims)), x, [d.local_size(s.position) for d in dims])


@rule({aten.repeat.default: lambda r: (r.tensor(3, 4), r.pick([2, 1], [2, 2, 3]))})
def repeat(s, x, times):
    dims = [Dim.replicated(1)] * (len(times) - x.ndim) + list(x.dims)
    return s.emit(Layout(tuple(d.repeat(n) for d, n in zip(dims, times, strict=True))), x, times)


@rule({aten.repeat_interleave.self_int: lambda r: (r.tensor(3, 4), 2, r.pick(0, 1))})
def repeat_interleave(s, x, times, dim=None, output_size=None):
    if dim is None:
        raise NoRule("repeat_interleave of the flattened tensor")
    return s.emit(Layout(x.layout.replace(dim, x.dims[dim].scale(times)).dims), x, times, dim)


@rule({aten.cat.default: lambda r: ([r.tensor(2, 3, 4), r.tensor(2, 5, 4)], r.pick(1, -2))})
def cat(s, tensors, dim=0):
    tensors = [x for x in tensors if x.shape != (0,)]
    dim %= tensors[0].ndim
    # Along other dimensions the parts agree; along the joined one every part keeps its own layout.
    # Of two as large, the one whose shares are more even is followed.
    largest = max((x for x in tensors if x.sharded), key=lambda x: (max(x.shape), -_most(x)))
    axes = {a for x in tensors for a in x.dims[dim].axes}
    dims = [Dim.replicated(d.size) if d.axes & axes else d for d in largest.dims]
    laid = [s.like(x, [d for i, d in enumerate(dims) if i != dim], [i for i in range(x.ndim) if i != dim])
            for x in tensors]
    dims[dim] = concatenate(x.dims[dim] for x in laid)
    return s.emit(Layout(tuple(dims)), laid, dim, target=aten.cat.default)


def _most(x):
    return max((b - a for d in x.dims for seg in d.segments if seg.axis for a, b in pairwise(seg.offsets)), default=0)


@rule({aten.stack.default: lambda r: ([r.tensor(2, 3), r.tensor(2, 3)], r.pick(0, 1, -1))})
def stack(s, tensors, dim=0):
    laid, dims = s.broadcast(*tensors)
    new = list(dims)
    new.insert(dim % (len(dims) + 1), Dim.replicated(len(tensors)))
    return s.emit(Layout(tuple(new)), laid, dim)


@rule({aten.slice.Tensor: lambda r: (
    r.tensor(2, 9), r.pick(1, -1), r.pick(None, 0, 1, 2, 3, 5, -7, -4), r.pick(None, -1, 7, 8, 2, sys.maxsize),
    r.pick(1, 2, 2, 3, 4))})
def slice_(s, x, dim=0, start=None, stop=None, step=1):
    old = x.dims[dim]
    start, stop, step = slice(start, stop, step).indices(old.size)
    stop = max(start, stop)
    if not old.sharded:
        out = x.layout.replace(dim, Dim.replicated(len(range(start, stop, step))))
        return s.emit(out, x, dim, start, stop, step, target=aten.slice.Tensor)
    if (step != 1 and len(old.segments) > 1) or _lopsided(s, old.slice(start, stop)):
        x = s.whole(x, dim)
        return slice_(s, x, dim, start, stop, step)
    # What this rank holds of the range is one run of its piece, because pieces are in global order.
    first = length([(a, min(b, start)) for a, b in old.spans(s.position) if a < start])
    held = old.slice(start, stop).local_size(s.position)
    if step != 1:
        (a, _), = old.spans(s.position) or [(0, 0)]
        lead = -(max(a, start) - start) % step
        first, last = first + min(lead, held), first + held
    else:
        last = first + held
    out = x.layout.replace(dim, old.slice(start, stop, step))
    return _not_alone(s, dim, s.emit(out, x, dim, first, last, step, target=aten.slice.Tensor))


@rule({aten.slice_scatter.default: lambda r: (r.tensor(2, 5, 8), r.tensor(2, 5, 4), -1, r.pick(0, 1), 8, 2)})
def slice_scatter(s, x, part, dim=0, *where):
    """A strided write (others are concatenations by now): whole along the written dimension, alike elsewhere."""
    x, part = s.whole(x, dim), s.whole(part, dim)
    for i in range(x.ndim):
        if i != dim % x.ndim:
            best = next((v.dims[i] for v in (part, x) if v.dims[i].sharded), x.dims[i])
            x, part = s.lay(x, i, best), s.lay(part, i, best)
    return s.emit(x.layout, x, part, dim, *where)


@rule({aten.split_with_sizes.default: lambda r: (r.tensor(2, 9), [2, 4, 3], r.pick(1, -1)),
       aten.split.Tensor: lambda r: r.pick((r.tensor(2, 9), 4, 1), (r.tensor(9, 2), 2))})
def split(s, x, sizes, dim=0):
    old = x.dims[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, old.size - at) for at in range(0, old.size, sizes)]
    borders = [0, *accumulate(sizes)]
    parts = [old.slice(a, b) for a, b in pairwise(borders)]
    if any(_lopsided(s, part) for part in parts):
        x = s.whole(x, dim)
        parts = [x.dims[dim].slice(a, b) for a, b in pairwise(borders)]
    local = [p.local_size(s.position) for p in parts]
    made = s.emit_many([x.layout.replace(dim, p) for p in parts], x, local, dim,
                       target=aten.split_with_sizes.default)
    return tuple(_not_alone(s, dim, part) for part in made)


def _lopsided(s, part):
    """Whether some tensor rank has nothing of a part of features that is enough for all: the cut is not one of parts.
    All are gathered at once then, rather than one part after the other."""
    return part.axes == {TENSOR} and part.size >= s.sizes[TENSOR] and not all(
        part.local_size({**s.position, TENSOR: i}) for i in range(s.sizes[TENSOR]))


def _not_alone(s, dim, x):
    """A single index that one rank holds is given to all: elsewhere a size of one means that it may be repeated."""
    return s.whole(x, dim) if x.shape[dim] == 1 else x


@rule({aten.unbind.int: lambda r: (r.tensor(2, 3, 4), r.pick(0, 1, -1))})
def unbind(s, x, dim=0):
    dim %= x.ndim
    x = s.whole(x, dim)
    layout = Layout(x.dims[:dim] + x.dims[dim + 1 :])
    return s.emit_many([layout] * x.shape[dim], x, dim)


@rule({aten.select.int: lambda r: (r.tensor(2, 3, 4), r.pick(0, 1, -1), r.pick(0, 1, -1))})
def select(s, x, dim, index):
    dim %= x.ndim
    index %= x.shape[dim]
    # Only the one slice that is asked for travels.
    one = s.whole(slice_(s, x, dim, index, index + 1), dim)
    return s.emit(Layout(x.dims[:dim] + x.dims[dim + 1 :]), one, dim, 0)


@rule({aten.view_as_complex.default: lambda r: (r.tensor(3, 4, 2),)})
def view_as_complex(s, x):
    return s.emit(Layout(x.dims[:-1]), s.whole(x, -1))


@rule({aten.view_as_real.default: lambda r: (torch.view_as_complex(r.tensor(3, 4, 2)),)})
def view_as_real(s, x):
    return s.emit(Layout((*x.dims, Dim.replicated(2))), x)


@rule({aten.unfold.default: lambda r: (r.tensor(2, 6, 4), r.pick(1, -1), 2, r.pick(1, 2))})
def unfold(s, x, dim, size, step):
    """Windows along ``dim``, in a dimension of their own."""
    dim %= x.ndim
    x = s.whole(x, dim)
    dims = [*x.layout.replace(dim, Dim.replicated(s.node.meta["val"].shape[dim])).dims, Dim.replicated(size)]
    return s.emit(Layout(tuple(dims)), x, dim, size, step)


@rule({aten.diagonal.default: lambda r: (r.tensor(3, 4, 4), r.pick(0, 1), r.pick(0, 1), 2)})
def diagonal(s, x, offset=0, a=0, b=1):
    x, gone = s.whole(x, a, b), (a % x.ndim, b % x.ndim)
    kept = [d for i, d in enumerate(x.dims) if i not in gone]
    return s.emit(Layout((*kept, Dim.replicated(s.node.meta["val"].shape[-1]))), x, offset, a, b)


@rule({aten.diag_embed.default: lambda r: (r.tensor(3, 4), r.pick(0, 1), r.pick(0, -2), -1)})
def diag_embed(s, x, offset=0, a=-2, b=-1):
    x, shape = s.whole(x, -1), s.node.meta["val"].shape
    kept, new = iter(x.dims[:-1]), (a % len(shape), b % len(shape))
    dims = [Dim.replicated(n) if i in new else next(kept) for i, n in enumerate(shape)]
    return s.emit(Layout(tuple(dims)), x, offset, a, b)


@rule({aten.tril.default: lambda r: (r.tensor(2, 6, 4), r.pick(0, 1, -1)),
       aten.triu.default: lambda r: (r.tensor(2, 6, 4), r.pick(0, 1, -1))})
def triangle(s, x, diagonal=0):
    """What is kept is a matter of global positions: a mask says, of which each rank has its part."""
    if not any(d.sharded for d in x.dims[-2:]):
        return s.emit(x.layout, x, diagonal)
    outside = {aten.tril.default: (aten.triu.default, diagonal + 1),
               aten.triu.default: (aten.tril.default, diagonal - 1)}
    target, beyond = outside[s.node.target]
    mask = Layout.replicated(x.shape[-2:])
    hidden = s.emit(mask, x, list(mask.shape), 1, dtype=torch.bool, target=aten.new_full.default)
    hidden = s.emit(mask, hidden, beyond, target=target)
    for i in (-2, -1):
        hidden = s.lay(hidden, i, x.dims[i])
    return s.emit(x.layout, x, hidden, 0, target=aten.masked_fill.Scalar)


@rule({aten.view.dtype: lambda r: (r.tensor(2, 6, 4), r.pick(torch.int64, torch.int32, torch.complex128))})
def view_dtype(s, x, dtype):
    """The same bytes as other numbers, of which there may be more or fewer in the last dimension."""
    size = s.node.meta["val"].shape[-1]
    if size == x.shape[-1]:
        return s.emit(x.layout, x, dtype)
    x = s.whole(x, -1)
    return s.emit(x.layout.replace(-1, Dim.replicated(size)), x, dtype)
