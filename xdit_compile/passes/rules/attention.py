"""Attention: local where its keys are whole or its batch is what is sharded, distributed otherwise."""

from __future__ import annotations

import math

import torch

from xdit_compile.ir.layout import BATCH, PATCH, SEQUENCE, TENSOR, Dim, Layout
from xdit_compile.ir.mesh import ULYSSES
from xdit_compile.passes.attention_plan import local_heads, plan_attention, sharded_attention
from xdit_compile.passes.rules import rule

aten = torch.ops.aten


def _example(r):
    tokens = r.pick(6, 6, 3, 2)
    if r.pick(False, False, False, True):  # without heads, or with frames beside the batch
        outer = r.pick((4,), (2, 3, 4))
        return *(r.tensor(*outer, n, 8) for n in (tokens, 5, 5)), r.pick(None, r.tensor(tokens, 5))
    if r.pick(False, False, False, True):  # groups of query heads that share one of keys and values
        heads, group = r.pick((4, 2), (2, 2), (3, 2), (2, 3), (1, 4))
        k, v = r.tensor(2, heads, 5, 8), r.tensor(2, heads, 5, 8)
        return r.tensor(2, heads * group, tokens, 8), k, v, None, 0.0, False, {"enable_gqa": True}
    q = r.tensor(2, 4, tokens, 8)
    k, v = r.pick((r.tensor(2, 4, 6, 8), r.tensor(2, 4, 6, 8)), (r.tensor(2, 4, 5, 8), r.tensor(2, 4, 5, 8)))
    n = k.shape[2]
    mask = r.pick(None, r.tensor(tokens, n), r.tensor(2, 1, 1, n), r.tensor(2, 4, tokens, n),
                  r.tensor(2, 1, tokens, n) > -1)
    return q, k, v, mask, 0.0, mask is None and n == tokens and r.pick(False, True)


@rule({aten.scaled_dot_product_attention.default: _example})
def attention(s, q, k, v, mask=None, dropout=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    """softmax(q k^T * scale + mask) v over tensors (..., heads, tokens, width)."""
    q, k, v = s.whole(q, -1), s.whole(k, -1), s.whole(v, -1)
    q, k, v = (s.whole(x, -2) if TENSOR in x.dims[-2].axes else x for x in (q, k, v))
    # Tokens that hold the samples of a batch: each attends for its own, to all. Where positions alone are cut by it, it
    # is no batch.
    packed = all(BATCH in x.dims[-2].axes for x in (q, k, v))
    q, k, v = (s.whole(x, -2) if BATCH in x.dims[-2].axes and not (packed and x is q) else x for x in (q, k, v))
    if enable_gqa and q.shape[-3] != k.shape[-3]:
        q, k, v, enable_gqa = _grouped(s, q, k, v)
    for i in range(-q.ndim, -2):
        if i == -3 and enable_gqa and q.shape[i] != k.shape[i]:
            continue
        if q.shape[i] == k.shape[i] == v.shape[i]:
            dim = next((x.dims[i] for x in (q, k, v) if x.dims[i].sharded), q.dims[i])
            q, k, v = s.lay(q, i, dim), s.lay(k, i, dim), s.lay(v, i, dim)
        else:
            q, k, v = s.whole(q, i), s.whole(k, i), s.whole(v, i)
    batch_axes = {a for d in q.dims[:-2] for a in d.axes}
    tokens = next((x.dims[-2] for x in (k, v) if x.dims[-2].sharded), k.dims[-2])
    if tokens.axes & batch_axes:
        tokens = Dim.replicated(tokens.size)
    k, v = s.lay(k, -2, tokens), s.lay(v, -2, tokens)
    held = q.dims[-2].axes
    if held & batch_axes or (BATCH in held and (len(held) > 1 or k.dims[-2].sharded)):
        q = s.whole(q, -2)
    q, k, v = _within_reach(s, q, k, v, mask)
    if is_causal and (q.dims[-2].sharded or k.dims[-2].sharded):
        mask, is_causal = _causal(s, q, k), False
    out = Layout((*q.dims[:-1], v.dims[-1]))
    if k.dims[-2].sharded:
        return _distributed(s, q, k, v, mask, scale, out)
    if mask is not None:
        rows = (*q.dims[:-1], k.dims[-2])
        for i in range(-mask.ndim, 0):
            mask = s.lay(mask, i, rows[i]) if mask.shape[i] != 1 else mask
    if q.dims[-2].sharded:
        s.note("attention", f"local: queries [{q.dims[-2]}] attend to whole keys [{k.dims[-2]}]")
    return s.emit(out, q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)


def _grouped(s, q, k, v):
    """Fewer heads of keys and values than of queries: a rank that has some groups of query heads takes theirs. Where a
    cut is inside a group, each query head is given one of its own. The last result is whether heads still differ."""
    group = q.shape[-3] // k.shape[-3]
    held = next((x.dims[-3] for x in (k, v) if x.dims[-3].sharded), None)
    heads = q.dims[-3] if q.dims[-3].sharded else held and held.scale(group)
    if not heads:
        return q, k, v, True
    if heads.axes != {TENSOR}:
        return s.whole(q, -3), s.whole(k, -3), s.whole(v, -3), True
    if all(o % group == 0 for seg in heads.segments for o in seg.offsets):
        fewer = Dim.of(seg.map(lambda o: o // group) for seg in heads.segments)
        return s.lay(q, -3, heads), s.lay(k, -3, fewer), s.lay(v, -3, fewer), True
    k, v = s.whole(k, -3), s.whole(v, -3)
    k, v = (s.emit(x.layout.replace(-3, Dim.replicated(q.shape[-3])), x, group, x.ndim - 3,
                   target=aten.repeat_interleave.self_int) for x in (k, v))
    return q, k, v, False


def _within_reach(s, q, k, v, mask):
    """Keys and values whole where attention over pieces of them cannot be distributed; queries cut if they are."""
    tokens = k.dims[-2]
    if not tokens.sharded:
        return q, k, v
    # Of ranks that hold other samples too: all of them decide alike.
    heads = min(local_heads(q, position) for position in s.positions(q.dims[-3])) if q.ndim > 2 else 1
    parts = max(len(seg.offsets) - 1 for seg in tokens.segments if seg.cut)
    if s.displaced and tokens.axes == {SEQUENCE} and q.shape[-2] >= parts:
        s.cost.attentions += 1
        q = q if q.dims[-2].sharded else s.lay(q, -2, Dim.even(q.shape[-2], parts, SEQUENCE))
        k, v = _both_late(s, k, v)
    elif PATCH in tokens.axes and SEQUENCE not in tokens.axes & q.dims[-2].axes:
        # Of this step what has come already, of the step before what has not: all of it is here.
        s.cost.attentions += 1
        k, v = s.whole(k, -2), s.whole(v, -2)
    elif mask is not None and _by_rows(mask, q, k, v):
        # A bias of each pair of tokens, of which a rank has the rows of its queries, is more than all keys and values.
        s.cost.attentions += 1
        k, v = s.whole(k, -2), s.whole(v, -2)
    elif heads < s.spec.ulysses_degree:
        s.note("attention", f"{heads} heads are fewer than ulysses_degree={s.spec.ulysses_degree}: "
               "keys and values are gathered")
        k, v = s.whole(k, -2), s.whole(v, -2)
    elif not q.dims[-2].sharded:
        if q.shape[-2] >= parts:
            q = s.lay(q, -2, Dim.even(q.shape[-2], parts, *tokens.axes))
        else:
            k, v = s.whole(k, -2), s.whole(v, -2)
    return q, k, v


def _both_late(s, k, v):
    """All keys and values, those of other ranks as they were a step before: one exchange for both."""
    if k.dtype != v.dtype or k.dims[:-1] != v.dims[:-1]:
        return s.displaced_whole(k, -2), s.displaced_whole(v, -2)
    wide = Dim.replicated(k.shape[-1] + v.shape[-1])
    both = s.displaced_whole(s.emit(k.layout.replace(-1, wide), [k, v], -1, target=aten.cat.default), -2)
    cuts = ((0, k.shape[-1]), (k.shape[-1], wide.size))
    k, v = (s.emit(both.layout.replace(-1, x.dims[-1]), both, -1, *cut, target=aten.slice.Tensor)
            for x, cut in zip((k, v), cuts, strict=True))
    return k, v


def _by_rows(mask, q, k, v):
    return mask.ndim > 1 and mask.dims[-2] == q.dims[-2] and mask.dims[-2].axes == {SEQUENCE} and (
        math.prod(mask.shape) * mask.dtype.itemsize > sum(math.prod(x.shape) * x.dtype.itemsize for x in (k, v)))


def _distributed(s, q, k, v, mask, scale, out):
    if mask is not None:
        # The mask is cut by token order of the exchanged keys later, so its token dimensions are whole here.
        mask = s.whole(mask, *range(-min(mask.ndim, 2), 0))
        for i in range(-mask.ndim, -2):
            mask = s.lay(mask, i, q.dims[i]) if mask.shape[i] != 1 else mask
    plan = plan_attention(q, k, v, s.spec, s.position)
    s.attend(plan)
    caches = []
    if PATCH in k.dims[-2].axes:
        kept = (plan.batch, (lambda a, b: b - a)(*plan.kv_range(s.position[ULYSSES])), k.shape[-2])
        caches = [s.cache((*kept, x.shape[-1]), x.dtype) for x in (k, v)]
    value = s.emit(out, q, k, v, mask, scale, *caches, target=sharded_attention)
    if value.node is not None:
        value.node.meta["attention"] = plan
    return value


def _causal(s, q, k):
    """The triangle that ``is_causal`` means, as a mask: positions must survive the re-ordering of tokens."""
    shape = (q.shape[-2], k.shape[-2])
    whole = Layout.replicated(shape)
    ones = s.emit(whole, q, list(shape), 1, dtype=torch.bool, target=aten.new_full.default)
    return s.emit(whole, ones, target=aten.tril.default)
