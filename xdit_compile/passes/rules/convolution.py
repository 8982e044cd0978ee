"""Convolutions: channels whole, the batch free; over sharded space each rank fetches the border it is missing."""

from __future__ import annotations

from itertools import pairwise

import torch

from xdit_compile.ir.layout import PATCH, Dim, Layout, Segment
from xdit_compile.passes.rules import rule
from xdit_compile.passes.sharded_value import NoRule, Value

aten = torch.ops.aten


def _examples(n):
    side = [9, 6, 5][:n]
    return lambda r: (r.tensor(2, 2, *side), r.tensor(4, 2, *[r.pick(1, 2, 3)] * n), r.pick(None, r.tensor(4)),
                      [r.pick(1, 2)] * n, [r.pick(0, 1)] * n, [1] * n, 1)


@rule({aten.conv1d.default: _examples(1), aten.conv2d.default: _examples(2), aten.conv3d.default: _examples(3)})
def convolution(s, x, weight, bias=None, stride=(1,), padding=(0,), dilation=(1,), groups=1):
    n = weight.ndim - 2
    stride, padding, dilation = (list(v) * n if len(v) == 1 else list(v) for v in (stride, padding, dilation))
    x, weight, bias = s.whole(x, 1), s.whole(weight), bias and s.whole(bias)
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True)]
    x, space, padding, finish = _slid(s, x, reach, stride, padding)
    out = Layout((x.dims[0], Dim.replicated(weight.shape[0]), *space))
    return finish(s.emit(out, x, weight, bias, stride, padding, dilation, groups))


def _pooled(n):
    return lambda r: (r.tensor(2, 2, *[9, 6, 5][:n]), [r.pick(2, 3)] * n, [r.pick(1, 2)] * n, [r.pick(0, 1)] * n)


@rule({aten.avg_pool1d.default: _pooled(1), aten.avg_pool2d.default: _pooled(2), aten.avg_pool3d.default: _pooled(3)})
def average(s, x, kernel, stride=(), padding=(0,), ceil_mode=False, count_padding=True, divisor=None):
    n = len(kernel)
    stride, padding = list(stride) or list(kernel), list(padding) * n if len(padding) == 1 else list(padding)
    if ceil_mode or not count_padding:
        raise NoRule("a mean over fewer values at the border")
    x, space, padding, finish = _slid(s, s.whole(x, 1), kernel, stride, padding)
    rest = () if divisor is None else (divisor,)
    return finish(s.emit(Layout((*x.dims[:2], *space)), x, kernel, stride, padding, ceil_mode, count_padding, *rest))


def _slid(s, x, reach, stride, padding):
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
                source = _padded_window(s, source, 2 + i, dim, padding[i], reach[i])
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
        source = _with_halo(s, x, 2 + i, out, stride[i], padding[i], reach[i])
        left[i] = 0

    def finish(out):
        for at, dim in relaid.items():
            out = s.lay(out, at, dim)
        return out

    return source, space, left, finish


def _padded_window(s, x, i, out, padding, reach):
    """The rows of dimension ``i`` of ``x``, all of which are here, that this position's outputs read, padded at the
    ends of the whole."""
    (low, high), = [(a - padding, b - 1 - padding + reach) for a, b in out.spans(s.position)]
    before, after = max(-low, 0), max(high - x.shape[i], 0)
    node = s.local(aten.slice.Tensor, x, i, low + before, high - after)
    if node is not None and (before or after):
        node = s.local(aten.constant_pad_nd.default, node, [0, 0] * (x.ndim - 1 - i) + [before, after])
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


def _with_halo(s, x, i, out, stride, padding, reach):
    """The rows of dimension ``i`` that this rank's outputs read, with the tensor's own zero padding at its ends."""
    (axis,) = out.axes
    windows = []
    for rank in range(s.sizes[axis]):
        spans = out.spans({**s.position, axis: rank})
        windows.append([(a * stride - padding, (b - 1) * stride - padding + reach) for a, b in spans])
    inside = [[(max(a, 0), min(b, x.shape[i])) for a, b in w] for w in windows]
    held = [x.dims[i].spans({**s.position, axis: r}) for r in range(s.sizes[axis])]
    if all(_covers(h, w) for h, w in zip(held, inside, strict=True)):
        mine = inside[s.position[axis]]
        start = held[s.position[axis]][0][0] if mine else 0
        a, b = mine[0] if mine else (0, 0)
        node = s.local(aten.slice.Tensor, x, i, a - start, b - start)
    else:
        node = s.windows(x, i, inside, f"border of a convolution reading {reach} with stride {stride}")
    (low, high), = windows[s.position[axis]] or [(0, 0)]
    before, after = max(-low, 0), max(high - x.shape[i], 0)
    if node is not None and (before or after):
        pads = [0, 0] * (x.ndim - 1 - i) + [before, after]
        node = s.local(aten.constant_pad_nd.default, node, pads)
    return Value(node, x.layout, x.dtype)


def _covers(held, wanted):
    return all(any(a <= c and d <= b for a, b in held) for c, d in wanted)
