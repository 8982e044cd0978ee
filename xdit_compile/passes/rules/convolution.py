"""Convolutions: channels whole, the batch free; over sharded space each rank fetches the border it is missing."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch

from xdit_compile.ir.layout import PATCH, SEQUENCE, TENSOR, Dim, Layout, Segment, merge
from xdit_compile.passes.rules import rule
from xdit_compile.passes.sharded_value import NoRule, Value

aten = torch.ops.aten


def _examples(n):
    def example(r):
        groups, (inside, made) = r.pick((1, (2, 4)), (1, (4, 3)), (2, (4, 2)), (4, (4, 8)))
        return (r.tensor(2, inside, *[9, 6, 5][:n]), r.tensor(made, inside // groups, *[r.pick(1, 2, 3)] * n),
                r.pick(None, r.tensor(made)), [r.pick(1, 2)] * n, [r.pick(0, 1)] * n, [1] * n, groups)
    return example


@rule({aten.conv1d.default: _examples(1), aten.conv2d.default: _examples(2), aten.conv3d.default: _examples(3)})
def convolution(s, x, weight, bias=None, stride=(1,), padding=(0,), dilation=(1,), groups=1):
    n = weight.ndim - 2
    if x.ndim != n + 2:
        raise NoRule("a convolution without a batch dimension")
    stride, padding, dilation = (list(v) * n if len(v) == 1 else list(v) for v in (stride, padding, dilation))
    x, weight, bias, channels, groups, pending = _channels(s, x, weight, bias, groups)
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True)]
    x, space, padding, finish = _slid(s, x, reach, stride, padding)
    out = Layout((x.dims[0], channels, *space), pending)
    made = s.summed(s.emit(out, x, weight, None if pending else bias, stride, padding, dilation, groups))
    if pending and bias is not None:
        column = Layout((channels, *[Dim.replicated(1)] * n))
        bias = s.emit(column, bias, list(column.shape), target=aten.reshape.default)
        made = s.emit(made.layout, made, bias, target=aten.add.Tensor)
    return finish(made)


def _channels(s, x, weight, bias, groups):
    """Channels whole, but those that tensor ranks share: of inputs, whose products are summed, or which are groups by
    themselves; or of outputs. Returns the operands, the channels of the result, how many groups of them this rank has,
    and the axis that a sum is pending over."""
    inside, (made, per) = x.dims[1], weight.shape[:2]
    taken = {axis for i, d in enumerate(x.dims) if i != 1 for axis in d.axes}
    weight = s.whole(weight, *range(2, weight.ndim))
    if groups == 1 and not inside.sharded and TENSOR not in taken and _of_tensor_ranks(s, weight.dims[1]):
        inside = weight.dims[1]
        x = s.lay(x, 1, inside)
    if _of_tensor_ranks(s, inside) and groups == 1:
        return x, s.lay(s.whole(weight, 0), 1, inside), bias and s.whole(bias), Dim.replicated(made), 1, TENSOR
    weight = s.whole(weight, 1)
    if _of_tensor_ranks(s, inside) and all(o % per == 0 for seg in inside.segments for o in seg.offsets):
        out = Dim.of(seg.map(lambda o: o // per * (made // groups)) for seg in inside.segments)
        mine = inside.local_size(s.position) // per
        return x, s.lay(weight, 0, out), bias and s.lay(bias, 0, out), out, mine, None
    x = s.whole(x, 1)
    out = weight.dims[0] if groups == 1 and _of_tensor_ranks(s, weight.dims[0]) and TENSOR not in taken else (
        Dim.replicated(made))
    return x, s.lay(weight, 0, out), bias and s.lay(bias, 0, out), out, groups, None


def _of_tensor_ranks(s, dim):
    """Whether each tensor rank has some of it, and none has what another has."""
    return dim.axes == {TENSOR} and all(seg.axis for seg in dim.segments) and all(
        map(dim.local_size, s.positions(dim)))


def _pooled(n):
    return lambda r: (r.tensor(2, 2, *[9, 6, 5][:n]), [r.pick(2, 3)] * n, [r.pick(1, 2)] * n, [r.pick(0, 1)] * n)


@rule({aten.avg_pool1d.default: _pooled(1), aten.avg_pool2d.default: _pooled(2), aten.avg_pool3d.default: _pooled(3)})
def average(s, x, kernel, stride=(), padding=(0,), ceil_mode=False, count_padding=True, divisor=None):
    n = _spatial(s, x)
    kernel, stride, padding = (list(v) * n if len(v) == 1 else list(v) for v in (kernel, stride or kernel, padding))
    rest = () if divisor is None else (divisor,)
    if ceil_mode or (not count_padding and any(padding)):
        # A mean over fewer values at the border.
        x = s.filled(s.whole(x, *range(2, x.ndim)), (0, 1))
        space = map(Dim.replicated, s.node.meta["val"].shape[2:])
        return s.emit(Layout((*x.dims[:2], *space)), x, kernel, stride, padding, ceil_mode, count_padding, *rest)
    x, space, padding, finish = _slid(s, s.filled(x, (0, 1)), kernel, stride, padding)
    return finish(s.emit(Layout((*x.dims[:2], *space)), x, kernel, stride, padding, ceil_mode, count_padding, *rest))


def _spatial(s, x):
    """How many dimensions a pool slides over, for each of which one number may stand."""
    n = int(str(s.node.target).partition("_pool")[2][0])
    if x.ndim != n + 2:
        raise NoRule("a pool without a batch dimension")
    return n


def _largest(n):
    return lambda r: (r.tensor(2, 2, *[9, 6, 5][:n]), [r.pick(2, 3)] * n, [r.pick(1, 2)] * n, [r.pick(0, 1)] * n,
                      [1] * n, r.pick(False, False, True))


@rule({aten.max_pool1d.default: _largest(1), aten.max_pool2d.default: _largest(2),
       aten.max_pool3d.default: _largest(3)})
def largest(s, x, kernel, stride=(), padding=(0,), dilation=(1,), ceil_mode=False):
    n = _spatial(s, x)
    kernel, stride, padding, dilation = (list(v) * n if len(v) == 1 else list(v)
                                         for v in (kernel, stride or kernel, padding, dilation))
    x = s.filled(x, (0, 1))
    if ceil_mode:
        x = s.whole(x, *range(2, x.ndim))
        space = map(Dim.replicated, s.node.meta["val"].shape[2:])
        return s.emit(Layout((*x.dims[:2], *space)), x, kernel, stride, padding, dilation, True)
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    x, space, padding, finish = _slid(s, x, reach, stride, padding, -math.inf)
    return finish(s.emit(Layout((*x.dims[:2], *space)), x, kernel, stride, padding, dilation, False))


@rule({op: lambda r: (r.tensor(2, 2, 6, 5), [3, 2]) for op in (
    aten._adaptive_avg_pool2d.default, aten.adaptive_max_pool2d.default)})
def adaptive(s, x, size):
    """Windows that begin anywhere: space is whole, channels and the batch are free."""
    x, made = s.filled(s.whole(x, -2, -1), range(x.ndim)), s.node.meta["val"]
    out = Layout((*x.dims[:-2], *map(Dim.replicated, size)))
    return s.emit(out, x, size) if isinstance(made, torch.Tensor) else s.emit_many([out, out], x, size)


@rule({aten.im2col.default: lambda r: (r.tensor(2, 2, 9, 6), [r.pick(2, 3)] * 2, [1, 1], [r.pick(0, 1)] * 2,
                                       [r.pick(1, 2)] * 2)})
def columns(s, x, kernel, dilation, padding, stride):
    """``F.unfold``: a window's values are channels, windows follow each other as one dimension."""
    if x.ndim != 4:
        raise NoRule("a picture without a batch dimension")
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    x = s.whole(x, 1, *(i for i in (2, 3) if PATCH in x.dims[i].axes))
    held, space, left, finish = _slid(s, x, reach, stride, padding)
    tokens = merge(space)
    if tokens is None:
        raise NoRule(f"windows laid out as {' x '.join(map(str, space))}")
    channels = Dim.replicated(s.node.meta["val"].shape[1])
    return finish(s.emit(Layout((x.dims[0], channels, tokens)), held, kernel, dilation, left, stride))


def _transposed(n):
    return lambda r: (r.tensor(2, 2, *[9, 6, 5][:n]), r.tensor(2, 4, *[r.pick(1, 2, 3, 4)] * n),
                      r.pick(None, r.tensor(4)), *r.pick(([1] * n, [0] * n, [0] * n), ([2] * n, [1] * n, [1] * n),
                                                         ([2] * n, [0] * n, [0] * n), ([3] * n, [0] * n, [1] * n)),
                      1, [r.pick(1, 2)] * n)


@rule({aten.conv_transpose1d.default: _transposed(1), aten.conv_transpose2d.input: _transposed(2),
       aten.conv_transpose3d.input: _transposed(3)})
def transposed_convolution(s, x, weight, bias=None, stride=(1,), padding=(0,), extra=(0,), groups=1, dilation=(1,)):
    """Each rank makes the outputs over its own rows, and fetches the rows of others that reach into them."""
    n = weight.ndim - 2
    if x.ndim != n + 2:
        raise NoRule("a convolution without a batch dimension")
    stride, padding, extra, dilation = (list(v) * n if len(v) == 1 else list(v)
                                        for v in (stride, padding, extra, dilation))
    x, weight, bias = s.whole(x, 1), s.whole(weight), bias and s.whole(bias)
    sizes, cuts = s.node.meta["val"].shape, dict[int, Any]()
    spans = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    dims = [x.dims[0], Dim.replicated(weight.shape[1] * groups)]
    for i, (by, spare, span) in enumerate(zip(stride, padding, spans, strict=True), 2):
        follows = x.dims[i].sharded and PATCH not in x.dims[i].axes and not any(d.sharded for d in dims[2:])
        out = _spread(x.dims[i], sizes[i], by, (span + 1 - by) // 2 - spare) if follows else None
        dims.append(out or Dim.replicated(sizes[i]))
    for i, d in enumerate(dims[2:], 2):
        x = x if d.sharded else s.whole(x, i)
    for i, d in enumerate(dims[2:], 2):
        if d.sharded:
            x, cuts[i] = _reached(s, x, i, d, stride[i - 2], padding[i - 2], spans[i - 2])
            padding[i - 2] = extra[i - 2] = 0
    out = Layout(tuple(dims))
    made = s.emit(out, x, weight, bias, stride, padding, extra, groups, dilation) if not cuts else Value(s.local(
        s.node.target, x, weight, bias, stride, padding, extra, groups, dilation), out, x.dtype)
    for i, (first, size) in cuts.items():
        made = s.emit(out, made, i, first, first + size, target=aten.slice.Tensor)
    return made


def _reached(s, x, i, out, by, spare, span):
    """The rows of dimension ``i`` that reach this rank's outputs, and where these begin in what is made of them, and
    how many they are."""
    (axis,) = out.axes
    spans = [out.spans({**s.position, axis: rank})[0] for rank in range(s.sizes[axis])]
    # Rows that reach any of the outputs a .. b - 1, and enough that all of these are made.
    rows = [(min(-((span - spare - a) // by), (a + spare) // by),
             max((b - 1 + spare) // by, -((span - spare - b + 1) // by)) + 1) for a, b in spans]
    (a, b), (first, _) = spans[s.position[axis]], rows[s.position[axis]]
    x = _with_halo(s, x, i, out, [[r] for r in rows], f"border of a transposed convolution reaching {span + 1}")
    return x, (a - (first * by - spare), b - a)


def _spread(dim, size, stride, shift):
    """Who makes which outputs of a transposed convolution: those nearest to its rows."""
    if len(dim.segments) != 1:
        return None
    (segment,) = dim.segments
    cuts = [min(max(o * stride + shift, 0), size) for o in segment.offsets]
    cuts[0], cuts[-1] = 0, size
    return Dim.of([Segment(tuple(cuts), segment.axis)]) if all(a < b for a, b in pairwise(cuts)) else None


def _slid(s, x, reach, stride, padding, filling=0):
    """For an operator whose output ``o`` reads inputs ``o * stride - padding`` and so on, ``reach`` of them: what this
    rank reads, how the outputs are laid out, the padding that is left to the operator, and what is to be done with its
    result. Windows on aligned shares (patch embedding) need nothing from neighbours; else the missing rows are
    exchanged and only the ends of the whole tensor are padded."""
    if x.ndim != len(reach) + 2:
        raise NoRule("a convolution without a batch dimension")
    space, source, left, relaid = [], x, list(padding), {}
    for i, dim in enumerate(x.dims[2:]):
        size = (x.shape[2 + i] + 2 * padding[i] - reach[i]) // stride[i] + 1
        filled = all(map(dim.local_size, s.positions(dim)))
        alone = reach[i] == stride[i] == 1 and not padding[i] and filled
        if alone or not dim.sharded:
            space.append(dim if alone else Dim.replicated(size))
            continue
        if PATCH in dim.axes:
            borders = {o for seg in dim.segments for o in seg.offsets}
            if filled and reach[i] == stride[i] and not padding[i] and all(o % stride[i] == 0 for o in borders):
                space.append(Dim.of(seg.map(lambda o, by=stride[i]: o // by) for seg in dim.segments))
                continue
            source = s.whole(source, 2 + i)
            if size == dim.size and stride[i] == 1 and filled and len(dim.spans(s.position)) == 1:
                source = _padded_window(s, source, 2 + i, dim, padding[i], reach[i], filling)
                left[i] = 0
                space.append(dim)
                continue
            # Of scattered rows, or rows that come out otherwise, all are computed.
            space.append(Dim.replicated(size))
            if size == dim.size:
                relaid[2 + i] = dim
            continue
        out = _shares(dim, size, stride[i], padding[i] - (reach[i] - 1) // 2 if stride[i] == 1 else 0)
        if out is None or source is not x:
            raise NoRule(f"space laid out as {x.layout}")
        space.append(out)
        (axis,) = out.axes
        spans = [out.spans({**s.position, axis: rank}) for rank in range(s.sizes[axis])]
        rows = [[(a * stride[i] - padding[i], (b - 1) * stride[i] - padding[i] + reach[i]) for a, b in w]
                for w in spans]
        source = _with_halo(s, x, 2 + i, out, rows,
                            f"border of a convolution reading {reach[i]} with stride {stride[i]}",
                            filling)
        left[i] = 0

    def finish(out):
        for at, dim in relaid.items():
            out = s.lay(out, at, dim)
        return out

    return source, space, left, finish


def _padded_window(s, x, i, out, padding, reach, filling):
    """The rows of dimension ``i`` of ``x``, all of which are here, that this position's outputs read, padded at the
    ends of the whole."""
    (low, high), = [(a - padding, b - 1 - padding + reach) for a, b in out.spans(s.position)]
    before, after = max(-low, 0), max(high - x.shape[i], 0)
    node = s.local(aten.slice.Tensor, x, i, low + before, high - after)
    if node is not None and (before or after):
        node = s.local(aten.constant_pad_nd.default, node, [0, 0] * (x.ndim - 1 - i) + [before, after],
                       *([filling] if filling else []))
    return Value(node, x.layout.replace(i, out), x.dtype)


def _shares(dim, size, stride, shift):
    """Who computes which outputs: of stride 1, those in the middle of whose window lies a row of its share, so that
    padding given to the ranks at the ends leaves with the windows that read it; else one in ``stride`` of its rows."""
    if len(dim.segments) != 1:
        return None
    (segment,) = dim.segments
    cuts = [min(max(-(-(o + shift) // stride), 0), size) for o in segment.offsets]
    cuts[0], cuts[-1] = 0, size
    # A rank without outputs would convolve nothing, which PyTorch refuses.
    return Dim.of([Segment(tuple(cuts), segment.axis)]) if all(a < b for a, b in pairwise(cuts)) else None


def _with_halo(s, x, i, out, windows, why, filling=0):
    """The rows ``windows[rank]`` of dimension ``i``, which this rank's outputs read; ``filling`` beyond its ends."""
    (axis,) = out.axes
    inside = [[(max(a, 0), min(b, x.shape[i])) for a, b in w] for w in windows]
    held = [x.dims[i].spans({**s.position, axis: r}) for r in range(s.sizes[axis])]
    if all(_covers(h, w) for h, w in zip(held, inside, strict=True)):
        mine = inside[s.position[axis]]
        start = held[s.position[axis]][0][0] if mine else 0
        a, b = mine[0] if mine else (0, 0)
        node = s.local(aten.slice.Tensor, x, i, a - start, b - start)
    else:
        node = s.windows(x, i, inside, why, late=s.displaced and axis == SEQUENCE)
    (low, high), = windows[s.position[axis]] or [(0, 0)]
    before, after = max(-low, 0), max(high - x.shape[i], 0)
    if node is not None and (before or after):
        pads = [0, 0] * (x.ndim - 1 - i) + [before, after]
        node = s.local(aten.constant_pad_nd.default, node, pads, *([filling] if filling else []))
    return Value(node, x.layout, x.dtype)


def _covers(held, wanted):
    return all(any(a <= c and d <= b for a, b in held) for c, d in wanted)
