"""Operators that add or repeat rows: padding, up-sampling by copies, pixels made of channels and back."""

from __future__ import annotations

from functools import cache

import torch

from xdit_compile.ir.layout import PATCH, Dim, Layout, Segment
from xdit_compile.passes.rules import rule
from xdit_compile.passes.rules.shape import cat, slice_
from xdit_compile.passes.sharded_value import NoRule, Value

aten = torch.ops.aten


@rule({aten.constant_pad_nd.default: lambda r: (
    r.tensor(2, 5, 4), r.pick([1, 0], [0, 0, 0, 3], [0, 0, 2, 1], [-1, 0, 0, 1]), 0.5)})
def pad(s, x, pads, value=0):
    """A dimension of several segments is padded by concatenation with constant ones."""
    pads = list(pads) + [0] * (2 * x.ndim - len(pads))
    joined = [i for i, d in enumerate(x.dims) if len(d.segments) > 1 or PATCH in d.axes]
    free = [0 if x.ndim - 1 - i // 2 in joined else p for i, p in enumerate(pads)]
    if any(p < 0 and x.dims[x.ndim - 1 - i // 2].sharded for i, p in enumerate(pads)):
        raise NoRule("negative padding of a sharded dimension")
    out = _padded(s, x, free, value)
    for i in joined:
        ends = []
        for n in pads[2 * (x.ndim - 1 - i) :][:2]:
            shape = Layout(out.dims).replace(i, Dim.replicated(n))
            ends.append(s.emit(shape, out, list(shape.local_shape(s.position)), value, target=aten.new_full.default))
        out = cat(s, [ends[0], out, ends[1]], i) if any(pads[2 * (x.ndim - 1 - i) :][:2]) else out
    return out


@rule({aten.pad.default: lambda r: (
    r.tensor(2, 2, 7, 5), r.pick([1, 1, 2, 0], [2, 1, 0, 1]), r.pick("replicate", "reflect", "circular"))})
def pad_alike(s, x, pads, mode="constant", value=None):
    """Padding with what the tensor holds: rows near the ends, which the ranks at the ends have to hold."""
    for i in range(x.ndim - len(pads) // 2, x.ndim):
        most = max(pads[2 * (x.ndim - 1 - i) :][:2])
        x = s.filled(x, [i], max(most, 0) + (mode == "reflect"))
        if most and (len(x.dims[i].segments) > 1 or mode == "circular" or min(pads) < 0):
            x = s.whole(x, i)
    return _padded(s, s.filled(x, range(x.ndim)), list(pads), mode, value)


def _padded(s, x, pads, *how):
    """The padding of a sharded dimension goes to the ranks at its ends, the others do nothing."""
    dims = list(x.dims)
    for i, d in enumerate(x.dims):
        at = 2 * (x.ndim - 1 - i)
        before, after = [*pads[at : at + 2], 0, 0][:2]
        if d.sharded and (before or after):
            (segment,) = d.segments
            dims[i] = Dim.of([Segment((0, *(o + before for o in segment.offsets[1:-1]), d.size + before + after),
                                      segment.axis)])
            place = s.position[segment.axis]
            pads[at : at + 2] = before * (place == 0), after * (place == s.sizes[segment.axis] - 1)
        elif before or after:
            dims[i] = Dim.replicated(d.size + before + after)
    return s.emit(Layout(tuple(dims)), x, pads, *how) if any(pads) else Value(x.node, Layout(tuple(dims)), x.dtype)


def _upsampled(n):
    side = (5, 4, 3)[:n]
    sizes = ([10, 12, 3][:n], [2 * m - 1 for m in side], [2 * m + 1 for m in side])
    return lambda r: (r.tensor(2, 2, *side), *r.pick(*((size, None) for size in sizes), (None, [2.0] * n),
                                                     (None, [2.0, 2.9, 1.4][:n])))


@rule({op.vec: _upsampled(n) for n, ops in enumerate((
    (aten.upsample_nearest1d, aten._upsample_nearest_exact1d),
    (aten.upsample_nearest2d, aten._upsample_nearest_exact2d),
    (aten.upsample_nearest3d, aten._upsample_nearest_exact3d)), 1) for op in ops})
def upsample(s, x, sizes, factors=None):
    """Rows are repeated where they are: a whole number of times each, but for the last, of which some may be cut."""
    x, exact = s.filled(s.whole(x, 1), range(x.ndim)), "exact" in str(s.node.target)
    sizes = s.node.meta["val"].shape[2:]
    for i, size in enumerate(sizes, 2):
        rows = _rows(x.shape[i], size, factors and factors[i - 2], exact)
        if rows != _rows(x.shape[i], size, None, exact):
            x = s.whole(x, *range(2, x.ndim))  # a factor says more than sizes do
        elif rows != [o // -(-size // x.shape[i]) for o in range(size)]:
            x = s.whole(x, i)
    if not any(d.sharded for d in x.dims[2:]):
        same = [None, factors] if factors else [list(sizes), None]
        return s.emit(Layout((*x.dims[:2], *map(Dim.replicated, sizes))), x, *same)
    dims = [d.scale(-(-size // d.size)) if d.sharded else Dim.replicated(size)
            for d, size in zip(x.dims[2:], sizes, strict=True)]
    out = s.emit(Layout((*x.dims[:2], *dims)), x, [d.local_size(s.position) for d in dims], None)
    for i, size in enumerate(sizes, 2):
        out = slice_(s, out, i, 0, size) if out.shape[i] != size else out
    return out


@cache
def _rows(size, out, factor, exact):
    """Which row each row of the result copies."""
    op = aten._upsample_nearest_exact1d.vec if exact else aten.upsample_nearest1d.vec
    rows = torch.arange(size, dtype=torch.float64).view(1, 1, -1)
    return op(rows, None if factor else [out], factor and [factor]).flatten().int().tolist()


@rule({aten.pixel_shuffle.default: lambda r: (r.tensor(2, 8, 3, 5), 2),
       aten.pixel_unshuffle.default: lambda r: (r.tensor(2, 2, 6, 8), 2)})
def pixels(s, x, factor):
    """Channels are whole; each row and column of pixels becomes ``factor`` of them, or as many become one."""
    x, shuffled = s.filled(s.whole(x, -3), range(x.ndim)), s.node.meta["val"].shape
    dims = [*x.dims[:-3], Dim.replicated(shuffled[-3]), *(d.scale(factor) for d in x.dims[-2:])]
    if s.node.target is aten.pixel_unshuffle.default:
        for i in (-2, -1):
            dims[i] = Dim.of(seg.map(lambda o: o // factor) for seg in x.dims[i].segments)
            # Shares end between groups of pixels, and none is empty.
            x = s.lay(x, i, dims[i].scale(factor)) if dims[i].size == shuffled[i] else s.whole(x, i)
            x = s.filled(x, [i])
            dims[i] = dims[i] if x.dims[i].sharded else Dim.replicated(shuffled[i])
    return s.emit(Layout(tuple(dims)), x, factor)


def _resampled(n):
    return lambda r: (r.tensor(2, 2, *[5, 4, 3][:n]), [7, 8, 4][:n], r.pick(False, True), None)


@rule({aten.upsample_linear1d.vec: _resampled(1), aten.upsample_bilinear2d.vec: _resampled(2),
       aten.upsample_bicubic2d.vec: _resampled(2), aten.upsample_trilinear3d.vec: _resampled(3),
       aten._upsample_bilinear2d_aa.vec: _resampled(2), aten._upsample_bicubic2d_aa.vec: _resampled(2)})
def resample(s, x, *how):
    """Weights over neighbours, which depend on global positions: space is whole, channels and the batch are free."""
    x = s.filled(s.whole(x, *range(2, x.ndim)), (0, 1))
    return s.emit(Layout((*x.dims[:2], *map(Dim.replicated, s.node.meta["val"].shape[2:]))), x, *how)


@rule({aten.grid_sampler_2d.default: lambda r: (r.tensor(2, 2, 5, 4), r.tensor(2, 6, 3, 2), 0, r.pick(0, 1), False)})
def grid_sample(s, x, grid, *how):
    """Pictures are whole; of the grid that says where to look, rows and columns are free."""
    x, grid = s.filled(s.whole(x, 2, 3), (0, 1)), s.filled(s.whole(grid, 3), (0, 1, 2))
    batch = x.dims[0] if x.dims[0].sharded else grid.dims[0]
    grid = s.lay(grid, 0, batch)
    taken = {a for d in grid.dims for a in d.axes}
    x = s.whole(x, 1) if x.dims[1].axes & taken else x
    x = s.lay(x, 0, grid.dims[0])
    return s.emit(Layout((grid.dims[0], x.dims[1], *grid.dims[1:3])), x, grid, *how)
