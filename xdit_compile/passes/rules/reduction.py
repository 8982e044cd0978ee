"""Reductions: over whole dimensions they are local, over sharded ones each rank has a summand."""

from __future__ import annotations

import math

import torch

from xdit_compile.ir.layout import PATCH, SEQUENCE, TENSOR, Dim, Layout
from xdit_compile.passes.rules import rule
from xdit_compile.passes.sharded_value import Value

aten = torch.ops.aten


def _dims(x, dims):
    return sorted(range(x.ndim) if dims is None or dims == [] else
                  (d % x.ndim for d in (dims if isinstance(dims, (list, tuple)) else [dims])))


def _reduced(x, dims, keepdim):
    kept = [Dim.replicated(1) if i in dims else d for i, d in enumerate(x.dims) if keepdim or i not in dims]
    return tuple(kept)


def _shared(x, over):
    """The axes that cut the reduced dimensions, if all of each is cut by one, among ranks; else None."""
    cut = [x.dims[i] for i in over if x.dims[i].sharded]
    one = all(len(d.axes) == 1 and all(seg.axis for seg in d.segments) for d in cut)
    axes = {a for d in cut for a in d.axes}
    return axes if one and PATCH not in axes else None


@rule({aten.sum.dim_IntList: lambda r: (r.tensor(2, 6, 4), [r.pick(0, 1, -1)], r.pick(False, True)),
       aten.sum.default: lambda r: (r.tensor(2, 6, 4),),
       aten.nansum.default: lambda r: (r.tensor(2, 6, 4), r.pick(None, [1], [-1]), r.pick(False, True)),
       aten.count_nonzero.default: lambda r: (r.tensor(2, 6, 4) > 0, r.pick(None, 1)),
       aten.count_nonzero.dim_IntList: lambda r: (r.tensor(2, 6, 4) > 0, r.pick([1], [0, -1])),
       aten.mean.default: lambda r: (r.tensor(2, 6, 4),),
       aten.mean.dim: lambda r: (r.tensor(2, 6, 4), r.pick([1], [-1], [0, 1]), r.pick(False, True))})
def sums(s, x, dims=None, keepdim=False, **dtype):
    over = _dims(x, dims)
    axes = _shared(x, over)
    if axes is None or len(axes) > 1:
        x, axes = s.whole(x, *over), set()
    out = Layout(_reduced(x, over, keepdim), next(iter(axes), None))
    mean = s.node.target in (aten.mean.dim, aten.mean.default)
    if axes and mean:
        # The mean divides by the global count, which no rank's own mean knows.
        total = s.emit(out, x, over, keepdim, **dtype, target=aten.sum.dim_IntList)
        return s.emit(out, total, math.prod(x.shape[i] for i in over), target=aten.div.Tensor)
    if s.node.target in (aten.count_nonzero.default, aten.count_nonzero.dim_IntList):
        return s.emit(out, x, over, target=aten.count_nonzero.dim_IntList)
    named = aten.mean.dim if mean else aten.nansum.default if "nansum" in str(s.node.target) else aten.sum.dim_IntList
    return s.emit(out, x, over, keepdim, **dtype, target=named)


def _staged(s, x, over, empty, reduce):
    """A reduction that may be made in two steps: of each rank's share, and of what these give, one value from each.

    ``reduce(x, layout, keepdim)`` emits one step; ``empty`` says whether a share may be."""
    if any(x.dims[i].sharded for i in over):
        axes = _shared(x, over)
        held = all(x.dims[i].local_size(p) for i in over for p in s.positions(x.dims[i]))
        if axes and (empty or held):
            cut = [Dim.even(s.sizes[a], s.sizes[a], a) if (a := next(iter(d.axes), None)) and i in over else d
                   for i, d in enumerate(x.dims)]
            first = tuple(d if i not in over or x.dims[i].sharded else Dim.replicated(1) for i, d in enumerate(cut))
            x = reduce(x, Layout(first), True)
        x = s.whole(x, *over)
    return x


@rule({aten.amax.default: lambda r: (r.tensor(2, 6, 4), r.pick([1], [0, 1]), r.pick(False, True)),
       aten.amin.default: lambda r: (r.tensor(2, 6, 4), r.pick([1], [-1], []), r.pick(False, True)),
       aten.any.dim: lambda r: (r.tensor(2, 6, 4) > 1, 1, r.pick(False, True)),
       aten.all.dim: lambda r: (r.tensor(2, 6, 4) > -1, -2, r.pick(False, True)),
       aten.any.dims: lambda r: (r.tensor(2, 6, 4) > 1, r.pick([1], [0, 2]), r.pick(False, True)),
       aten.all.dims: lambda r: (r.tensor(2, 6, 4) > -1, r.pick([1], [0, 2]), r.pick(False, True)),
       aten.logsumexp.default: lambda r: (r.tensor(2, 6, 4), r.pick([1], [-1], [0, 1]), r.pick(False, True)),
       aten.prod.dim_int: lambda r: (r.tensor(2, 6, 4), r.pick(1, -1), r.pick(False, True))})
def staged(s, x, dims=None, keepdim=False, **kwargs):
    over = _dims(x, dims)
    named = over[0] if s.node.target in (aten.any.dim, aten.all.dim, aten.prod.dim_int) else over
    empty = s.node.target not in (aten.amax.default, aten.amin.default)
    x = _staged(s, x, over, empty, lambda y, layout, keep: s.emit(layout, y, named, keep, **kwargs))
    return s.emit(Layout(_reduced(x, over, keepdim)), x, named, keepdim, **kwargs)


_BY_DIMS = {aten.max.default: aten.amax.default, aten.min.default: aten.amin.default,
            aten.any.default: aten.any.dims, aten.all.default: aten.all.dims}


@rule({aten.max.default: lambda r: (r.tensor(2, 6, 4),), aten.min.default: lambda r: (r.tensor(2, 6, 4),),
       aten.any.default: lambda r: (r.tensor(2, 6, 4) > 1,), aten.all.default: lambda r: (r.tensor(2, 6, 4) > -1,)})
def of_all(s, x):
    """Over all dimensions."""
    over, target = list(range(x.ndim)), _BY_DIMS[s.node.target]
    x = _staged(s, x, over, target in (aten.any.dims, aten.all.dims),
                lambda y, layout, keep: s.emit(layout, y, over, keep, target=target))
    return s.emit(Layout(()), x)


@rule({aten.linalg_vector_norm.default: lambda r: (
    r.tensor(2, 6, 4), r.pick(2.0, 1.0, 0.0, math.inf), r.pick([-1], [1], None), r.pick(False, True)),
    aten.norm.ScalarOpt_dim: lambda r: (r.tensor(2, 6, 4), r.pick(2.0, 1.0), r.pick([-1], [1]), r.pick(False, True))})
def vector_norm(s, x, order=2.0, dims=None, keepdim=False, **kwargs):
    """The norm of the norms of the parts, which counting (order 0) has not."""
    over, order = _dims(x, dims), 2.0 if order is None else order
    if order > 0:
        x = _staged(s, x, over, order < math.inf,
                    lambda y, layout, keep: s.emit(layout, y, order, over, keep, **kwargs))
    x = s.whole(x, *over)
    return s.emit(Layout(_reduced(x, over, keepdim)), x, order, over, keepdim, **kwargs)


@rule({aten.aminmax.default: lambda r: (r.tensor(2, 6, 4), {"dim": r.pick(None, 1, -1),
                                                            "keepdim": r.pick(False, True)})})
def extremes(s, x, *, dim=None, keepdim=False):
    over = _dims(x, dim)
    x = s.whole(x, *over)
    return s.emit_many([Layout(_reduced(x, over, keepdim))] * 2, x, dim=dim, keepdim=keepdim)


def _varied(r):
    return r.tensor(2, 6, 4), r.pick([-1], [1], [0, 1], None), {"correction": r.pick(None, 0, 1, 5), "keepdim": r.pick(
        False, True)}


@rule(dict.fromkeys((aten.var.correction, aten.std.correction, aten.var_mean.correction, aten.std_mean.correction),
                    _varied))
def variance(s, x, dims=None, *, correction=None, keepdim=False):
    """Local over whole dimensions; over shared ones ranks sum their moments."""
    over, several = _dims(x, dims), "_mean" in str(s.node.target)
    axes = _shared(x, over)
    if axes is None or len(axes) > 1 or x.dtype.is_complex:
        x, axes = s.whole(x, *over), set()
    out = Layout(_reduced(x, over, keepdim))
    if not axes:
        given = {"correction": correction, "keepdim": keepdim}
        return s.emit_many([out, out], x, over, **given) if several else s.emit(out, x, over, **given)
    count = math.prod(x.shape[i] for i in over)
    centre, spread = _moments(s, x, over, count, count - (1 if correction is None else correction))
    if "std" in str(s.node.target):
        spread = s.emit(spread.layout, spread, target=aten.sqrt.default)
    made = []
    for v in (spread, centre)[: 1 + several]:
        v = v if keepdim else s.emit(out, v, over, target=aten.squeeze.dims)
        made.append(v if v.dtype == x.dtype else s.emit(out, v, dtype=x.dtype, target=aten._to_copy.default))
    return tuple(made) if several else made[0]


def _moments(s, x, over, count, left):
    """Of ``count`` values along ``over``, which ranks share: their mean, and the sum of squares about it over ``left``.
    First the mean, then the squares about it: the difference of two large sums would cancel."""
    wide = {"dtype": torch.promote_types(x.dtype, torch.float32)}
    flat = Layout(_reduced(x, over, True), next(a for i in over for a in x.dims[i].axes))

    def shared(v, by):
        total = s.summed(v)
        return s.emit(total.layout, total, by, target=aten.div.Tensor)

    centre = shared(s.emit(flat, x, over, True, **wide, target=aten.sum.dim_IntList), count)
    # One kernel sums the squares: no tensor of squares beside that of differences.
    root = s.emit(flat, s.emit(x.layout, x, centre, target=aten.sub.Tensor), 2.0, over, True, **wide,
                  target=aten.linalg_vector_norm.default)
    return centre, shared(s.emit(flat, root, root, target=aten.mul.Tensor), max(left, 0))


def _displaced_moments(s, x, over, count, left):
    """As ``_moments``, of what this rank has now and what others had a step before: their means, and the sums of
    squares about these, put together (Chan et al., 1979). So never less than zero, however old."""
    ranks = s.sizes[SEQUENCE]
    wide = {"dtype": torch.promote_types(x.dtype, torch.float32)}
    flat = Layout(_reduced(x, over, True))

    def held(position):
        return math.prod(x.dims[i].local_size(position) for i in over)

    counts = [held({**s.position, SEQUENCE: rank}) for rank in range(ranks)]
    mine = counts[s.position[SEQUENCE]]
    own = s.emit(flat, s.emit(flat, x, over, True, **wide, target=aten.sum.dim_IntList), max(mine, 1),
                 target=aten.div.Tensor)
    root = s.emit(flat, s.emit(x.layout, x, own, target=aten.sub.Tensor), 2.0, over, True, **wide,
                  target=aten.linalg_vector_norm.default)
    squares = s.emit(flat, root, root, target=aten.mul.Tensor)
    rows = Layout((Dim.even(ranks, ranks, SEQUENCE), Dim.replicated(2), *flat.dims))
    pair = s.emit(Layout((Dim.replicated(2), *flat.dims)), [own, squares], target=aten.stack.default)
    moments = s.displaced_whole(s.emit(rows, pair, 0, target=aten.unsqueeze.default), 0)

    def part(rank, which):
        row = s.emit(Layout(moments.dims[1:]), moments, 0, rank, target=aten.select.int)
        return s.emit(flat, row, 0, which, target=aten.select.int)

    def total(values, weights):
        terms = [s.emit(flat, v, w, target=aten.mul.Tensor) for v, w in zip(values, weights, strict=True)]
        for i, term in enumerate(terms[1:], 1):
            terms[i] = s.emit(flat, terms[i - 1], term, target=aten.add.Tensor)
        return terms[-1]

    means = [part(rank, 0) for rank in range(ranks)]
    centre = total(means, [n / count for n in counts])
    apart = [s.emit(flat, m, centre, target=aten.sub.Tensor) for m in means]
    apart = [s.emit(flat, a, a, target=aten.mul.Tensor) for a in apart]
    within = total([part(rank, 1) for rank in range(ranks)], [1.0 / max(left, 1)] * ranks)
    return centre, s.emit(flat, within, total(apart, [n / max(left, 1) for n in counts]), target=aten.add.Tensor)


@rule({aten.layer_norm.default: lambda r: (r.tensor(2, 6, 4), [4], *r.pick(
           (), (None, None, 0.1), (r.tensor(4),), (r.tensor(4), r.tensor(4)), (r.tensor(4), r.tensor(4), 0.2))),
       aten.rms_norm.default: lambda r: (r.tensor(2, 6, 4), [4], r.pick(None, r.tensor(4)), r.pick(None, 1e-6, 0.1))})
def last_dims_norm(s, x, shape, *rest):
    if len(shape) == 1 and x.dims[-1].axes == {TENSOR} and all(seg.axis for seg in x.dims[-1].segments):
        return _norm_of_shares(s, x, *rest)
    x = s.whole(x, *range(x.ndim - len(shape), x.ndim))
    return s.emit(x.layout, x, shape, *(s.whole(r) if isinstance(r, Value) else r for r in rest))


def _norm_of_shares(s, x, weight=None, *given):
    """A norm over features of which each rank has some: ranks sum their moments."""
    centred = s.node.target is aten.layer_norm.default
    bias, eps = (*given, None, None)[:2] if centred else (None, *given, None)[:2]
    if eps is None:
        # As PyTorch's own defaults: 1e-5 of layer_norm; for rms_norm that of the type in which the norm is computed.
        eps = 1e-5 if centred else torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    weight, bias = (p and s.lay(p, 0, x.dims[-1]) for p in (weight, bias))
    wide = x if x.dtype == torch.promote_types(x.dtype, torch.float32) else s.emit(
        x.layout, x, dtype=torch.float32, target=aten._to_copy.default)
    if centred:
        centre, scale = _moments(s, wide, [x.ndim - 1], x.shape[-1], x.shape[-1])
        wide = s.emit(wide.layout, wide, centre, target=aten.sub.Tensor)
    else:
        flat = Layout(_reduced(x, [x.ndim - 1], True), TENSOR)
        squares = s.emit(wide.layout, wide, wide, target=aten.mul.Tensor)
        scale = s.summed(s.emit(flat, squares, [-1], True, target=aten.sum.dim_IntList))
        scale = s.emit(scale.layout, scale, x.shape[-1], target=aten.div.Tensor)
    scale = s.emit(scale.layout, scale, eps, target=aten.add.Tensor)
    wide = s.emit(wide.layout, wide, s.emit(scale.layout, scale, target=aten.rsqrt.default), target=aten.mul.Tensor)
    wide = wide if weight is None else s.emit(wide.layout, wide, weight, target=aten.mul.Tensor)
    wide = wide if bias is None else s.emit(wide.layout, wide, bias, target=aten.add.Tensor)
    return wide if wide.dtype == x.dtype else s.emit(wide.layout, wide, dtype=x.dtype, target=aten._to_copy.default)


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
    y = s.emit(Layout(grouped), x, [d.local_size(s.position) for d in grouped], target=aten.reshape.default)
    over, count = list(range(2, len(grouped))), channels.size // groups * math.prod(d.size for d in space)
    centre, scale = (_displaced_moments if s.displaced and axes == {SEQUENCE} else _moments)(s, y, over, count, count)
    scale = s.emit(scale.layout, scale, eps, target=aten.add.Tensor)
    scale = s.emit(scale.layout, scale, target=aten.rsqrt.default)
    columns = Layout((batch, *grouped[1:3], *[Dim.replicated(1)] * len(space)))
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
    return y if x.dtype == y.dtype else s.emit(x.layout, y, dtype=x.dtype, target=aten._to_copy.default)


@rule({aten._native_batch_norm_legit_no_training.default: lambda r: (
    r.tensor(2, 4, 6), r.tensor(4), r.pick(None, r.tensor(4)), r.tensor(4), r.tensor(4).exp(), 0.1, 1e-5)})
def batch_norm(s, x, *given):
    """With moments that are known: each channel by itself."""
    given = [s.lay(v, 0, x.dims[1]) if isinstance(v, Value) else v for v in given]
    rest = [Layout.replicated(v.shape) for v in s.node.meta["val"][1:]]
    return s.emit_many([x.layout, *rest], x, *given)


@rule({aten.native_layer_norm.default: lambda r: (r.tensor(2, 6, 4), [4], r.tensor(4), r.pick(None, r.tensor(4)),
                                                  1e-5)})
def native_layer_norm(s, x, shape, *rest):
    over = list(range(x.ndim - len(shape), x.ndim))
    x = s.whole(x, *over)
    stats = Layout(_reduced(x, over, True))
    return s.emit_many([x.layout, stats, stats], x, shape, *(s.whole(r) if isinstance(r, Value) else r for r in rest))
