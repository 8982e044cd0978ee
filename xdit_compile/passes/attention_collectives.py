"""Carry out distributed attention: Ulysses all-to-alls, a ring of keys and values, or both.

Inside a group of ``ulysses`` ranks one all-to-all turns (all heads, my tokens) into (my heads, the group's
tokens) for queries, keys and values together (with ``exchange=apart`` one for each, while the next is still
computed), and another turns the result back (DeepSpeed-Ulysses, arXiv 2309.14509). Across groups, keys and values
travel around a ring while the chunk at hand is attended to, and the partial results are merged by log-sum-exp in
fp32 (Ring Attention, arXiv 2310.01889). Buffers put tokens first, so that what arrives, of however uneven shares,
is the whole sequence without another copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import fx

from xdit_compile import kernels
from xdit_compile.ir.layout import Dim, Spans, length
from xdit_compile.ir.mesh import RING, ULYSSES
from xdit_compile.ir.stale_cache import update_and_read
from xdit_compile.passes.attention_plan import AttentionPlan
from xdit_compile.passes.emitter import Emitter
from xdit_compile.passes.low_bit_wire import WHOLE, decode, encode

aten = torch.ops.aten
ours = torch.ops.xdit_compile


def lower(e: Emitter, node: fx.Node, args: Sequence[fx.Node | None], kernel: str) -> fx.Node:
    """Emit what computes ``node``, a ``sharded_attention``; ``args`` are its arguments in the new graph."""
    plan: AttentionPlan = node.meta["attention"]
    q, k, v, mask, scale, *caches = args
    shape = node.meta["val"].shape
    lead = tuple(q.meta["val"].shape[:-3])
    q, k, v = (_four(e, x) for x in (q, k, v))
    mask = mask and _four_mask(e, mask, len(shape), lead)
    value = _val(q)
    name = kernels.resolve(kernel, device=value.device, dtype=value.dtype, head_dim=plan.head_dim,
                           value_dim=plan.value_dim, masked=mask is not None)
    out = _Lowering(e, plan, mask, scale, name).run(q, k, v, caches)
    return out if len(shape) == 4 else e.call(aten.reshape.default, out, list(shape))


class _Lowering:
    def __init__(self, e: Emitter, plan: AttentionPlan, mask: fx.Node | None, scale: float | None,
                 kernel: str) -> None:
        self.e, self.plan, self.mask, self.scale, self.kernel = e, plan, mask, scale, kernel
        self.u, self.r = e.position[ULYSSES], e.position[RING]
        self.cuts = plan.head_cuts()

    def run(self, q: fx.Node, k: fx.Node, v: fx.Node, caches: Sequence[fx.Node]) -> fx.Node:
        plan, e = self.plan, self.e
        q_fixed, q_moving = self._by_kind(q, plan.queries)
        k_fixed, k_moving = self._by_kind(k, plan.keys)
        v_fixed, v_moving = self._by_kind(v, plan.keys)
        if q_fixed is not None:
            first = sum(length(plan.replicated_share(i)) for i in range(self.r))
            q_fixed = e.narrow(q_fixed, 2, first, first + length(plan.replicated_share(self.r)))
        if plan.ulysses > 1:
            if plan.apart:
                (q_moving,) = self._scatter_heads([q_moving], plan.queries, "q")
                (k_moving,) = self._scatter_heads([k_moving], plan.keys, "k")
                (v_moving,) = self._scatter_heads([v_moving], plan.keys, "v")
            elif plan.queries == plan.keys:
                q_moving, k_moving, v_moving = self._scatter_heads([q_moving, k_moving, v_moving], plan.queries, "qkv")
            else:
                (q_moving,) = self._scatter_heads([q_moving], plan.queries, "q")
                k_moving, v_moving = self._scatter_heads([k_moving, v_moving], plan.keys, "kv")
            q_fixed = q_fixed and e.narrow(q_fixed, 1, *self.cuts[self.u : self.u + 2])
            k_fixed, v_fixed = (x and e.narrow(x, 1, *plan.kv_range(self.u)) for x in (k_fixed, v_fixed))
        queries = e.cat([x for x in (q_fixed, q_moving) if x is not None], 2)
        rows = plan.replicated_share(self.r) + plan.group_spans(plan.queries, self.r)
        if caches:
            spans = plan.replicated(plan.keys) + plan.group_spans(plan.keys, 0)
            k, v = (e.call(update_and_read, cache, self._join(*kinds), 2, spans) for cache, kinds in zip(
                caches, ((k_fixed, k_moving), (v_fixed, v_moving)), strict=True))
            out = self._attend(queries, k, v, rows, [(0, plan.keys.size)])
        elif plan.ring == 1:
            out = self._attend(queries, self._join(k_fixed, k_moving), self._join(v_fixed, v_moving), rows,
                               plan.replicated(plan.keys) + plan.group_spans(plan.keys, 0))
        else:
            out = self._ring(queries, k_fixed, v_fixed, k_moving, v_moving, rows)
        return self._restore(out)

    # Tokens that every rank holds, and tokens that travel

    def _by_kind(self, x: fx.Node, dim) -> tuple[fx.Node | None, fx.Node]:
        if all(s.axis for s in dim.segments):
            return None, x
        fixed, moving = (self.e.take(x, 2, dim.local_spans(self.e.position, kind)) for kind in (False, True))
        return fixed, moving

    def _join(self, fixed: fx.Node | None, moving: fx.Node) -> fx.Node:
        return moving if fixed is None else self.e.cat([fixed, moving], 2)

    # Ulysses

    def _heads(self, which: int, u: int) -> tuple[int, int]:
        """Heads of rank ``u``: of the queries (0), or of keys and values."""
        return self.plan.kv_range(u) if which else (self.cuts[u], self.cuts[u + 1])

    def _scatter_heads(self, tensors: list[fx.Node], dim: Dim, roles: str) -> list[fx.Node]:
        """(B, H, s, D) of my tokens -> (B, h, S, D) of the group's, for all ``tensors`` in one all-to-all.

        ``roles`` says of each whether it is the queries, keys or values (``"qkv"``). The buffer is (rank, token, batch,
        head and width).
        """
        e, n = self.e, self.plan.ulysses
        dtype = _val(tensors[0]).dtype
        forms = [self.plan.wire_keys if role == "k" else self.plan.wire for role in roles]
        tensors = [self._encoded(t, form) for t, form in zip(tensors, forms, strict=True)]
        batch = _val(tensors[0]).shape[0]
        kinds = [int(role != "q") for role in roles]
        mine = _val(tensors[0]).shape[2]
        widths = [[(b - a) * _val(t).shape[3] for t, which in zip(tensors, kinds, strict=True)
                   for a, b in [self._heads(which, u)]] for u in range(n)]
        parts = []
        if self._even(kinds, tensors):
            # One copy: all destinations at once, (n, s, B, h D) of each tensor side by side.
            for t in tensors:
                b, h, s, d = _val(t).shape
                t = e.call(aten.permute.default, t, [2, 0, 1, 3])
                t = e.call(aten.reshape.default, t, [s, b, n, h // n, d])
                parts.append(e.call(aten.permute.default, t, [2, 0, 1, 3, 4]))
            same = len({_val(t).shape[3] for t in tensors}) == 1
            if not same:
                parts = [e.call(aten.reshape.default, p, [n, mine, batch, w]) for p, w in
                         zip(parts, widths[0], strict=True)]
            packed = e.cat(parts, 3)
        else:
            for u in range(n):
                pieces = []
                for t, which, width in zip(tensors, kinds, widths[u], strict=True):
                    piece = e.call(aten.permute.default, e.narrow(t, 1, *self._heads(which, u)), [2, 0, 1, 3])
                    pieces.append(e.call(aten.reshape.default, piece, [mine, batch, width]))
                parts.append(e.call(aten.reshape.default, e.cat(pieces, 2), [mine * batch * sum(widths[u])]))
            packed = e.cat(parts, 0)
        packed = e.call(aten.reshape.default, packed, [mine * batch * sum(map(sum, widths))])
        theirs = [self.plan.moving(dim, u, self.r) for u in range(n)]
        own = sum(widths[self.u])
        got = e.all_to_all(packed, [s * batch * own for s in theirs], [mine * batch * sum(w) for w in widths], ULYSSES)
        got = e.call(aten.reshape.default, got, [sum(theirs), batch, own])
        out, at = [], 0
        for t, which, width in zip(tensors, kinds, widths[self.u], strict=True):
            a, b = self._heads(which, self.u)
            piece = e.narrow(got, 2, at, at + width)
            piece = e.call(aten.reshape.default, piece, [sum(theirs), batch, b - a, _val(t).shape[3]])
            out.append(e.call(aten.permute.default, piece, [1, 2, 0, 3]))
            at += width
        return [self._decoded(x, form, dtype) for x, form in zip(out, forms, strict=True)]

    def _encoded(self, x: fx.Node, form: str) -> fx.Node:
        """As it travels: in bytes, if any of what travels with it has fewer bits."""
        if self.plan.wire == WHOLE:
            return x
        (made,) = self.e.inline(lambda t: (encode(t, form),), x)
        return made

    def _decoded(self, x: fx.Node, form: str, dtype: torch.dtype) -> fx.Node:
        if self.plan.wire == WHOLE:
            return x
        (made,) = self.e.inline(lambda t: (decode(t, form, dtype),), x)
        return made

    def _even(self, kinds: list[int], tensors: list[fx.Node]) -> bool:
        n = self.plan.ulysses
        return all(_val(t).shape[1] % n == 0 and all(
            self._heads(w, u) == (u * _val(t).shape[1] // n, (u + 1) * _val(t).shape[1] // n) for u in range(n))
            for t, w in zip(tensors, kinds, strict=True))

    def _restore(self, out: fx.Node) -> fx.Node:
        """(B, h, rows, D) of the group's tokens -> (B, H, s, D) of mine, replicated rows on every rank."""
        e, plan = self.e, self.plan
        share = length(plan.replicated_share(self.r))
        total = _val(out).shape[2]
        fixed = e.narrow(out, 2, 0, share) if share else None
        if plan.ulysses > 1:
            fixed, moving = self._gather_heads(out, share)
        else:
            moving = e.narrow(out, 2, share, total) if share else out
        if not plan.replicated(plan.queries):
            return moving
        if plan.ring > 1:
            fixed = self._gather_shares(fixed, moving)
        assert fixed is not None
        return self._local_order(fixed, moving)

    def _gather_heads(self, out: fx.Node, share: int) -> tuple[fx.Node | None, fx.Node]:
        e, plan, n = self.e, self.plan, self.plan.ulysses
        dtype, out = _val(out).dtype, self._encoded(out, plan.wire)
        batch, heads, _, width = _val(out).shape
        counts = [plan.moving(plan.queries, u, self.r) for u in range(n)]
        x = e.call(aten.permute.default, out, [2, 0, 1, 3])
        if share:
            starts = [share + sum(counts[:u]) for u in range(n)]
            x = e.cat([piece for u in range(n) for piece in (
                e.narrow(x, 0, 0, share), e.narrow(x, 0, starts[u], starts[u] + counts[u]))], 0)
        rows = share + counts[self.u]
        x = e.call(aten.reshape.default, x, [(share * n + sum(counts)) * batch * heads * width])
        sizes = [b - a for a, b in pairwise(self.cuts)]
        got = e.all_to_all(x, [rows * batch * h * width for h in sizes],
                           [(share + c) * batch * heads * width for c in counts], ULYSSES)
        if len(set(sizes)) == 1:
            got = e.call(aten.reshape.default, got, [n, rows, batch, heads, width])
            got = e.call(aten.permute.default, got, [2, 1, 0, 3, 4])
            got = e.call(aten.reshape.default, got, [batch, rows, plan.heads, width])
        else:
            parts, at = [], 0
            for h in sizes:
                size = rows * batch * h * width
                part = e.call(aten.reshape.default, e.narrow(got, 0, at, at + size), [rows, batch, h, width])
                parts.append(e.call(aten.permute.default, part, [1, 0, 2, 3]))
                at += size
            got = e.cat(parts, 2)
        got = self._decoded(e.call(aten.transpose.int, got, 1, 2), plan.wire, dtype)
        return (e.narrow(got, 2, 0, share) if share else None), (e.narrow(got, 2, share, rows) if share else got)

    def _gather_shares(self, fixed: fx.Node | None, moving: fx.Node) -> fx.Node:
        """The replicated rows that ring groups attended one share each of, on every rank."""
        e, plan = self.e, self.plan
        counts = [length(plan.replicated_share(i)) for i in range(plan.ring)]
        most = max(counts)
        x = fixed if fixed is not None else e.narrow(moving, 2, 0, 0)
        x = e.call(aten.permute.default, x, [2, 0, 1, 3])
        if counts[self.r] < most:
            x = e.call(aten.constant_pad_nd.default, x, [0] * 7 + [most - counts[self.r]])
        full = e.all_gather(x, RING)
        full = e.cat([e.narrow(full, 0, i * most, i * most + c) for i, c in enumerate(counts) if c], 0)
        return e.call(aten.permute.default, full, [1, 2, 0, 3])

    def _local_order(self, fixed: fx.Node, moving: fx.Node) -> fx.Node:
        parts, at = [], {True: 0, False: 0}
        for p in self.plan.queries.pieces(self.e.position):
            size = p.stop - p.start
            parts.append(self.e.narrow(moving if p.sharded else fixed, 2, at[p.sharded], at[p.sharded] + size))
            at[p.sharded] += size
        return self.e.cat(parts, 2)

    # Ring

    def _ring(self, queries: fx.Node, k_fixed: fx.Node | None, v_fixed: fx.Node | None, k: fx.Node, v: fx.Node,
              rows: Spans) -> fx.Node:
        e, plan, n = self.e, self.plan, self.plan.ring
        dtype, sent = _val(k).dtype, [self._encoded(k, plan.wire_keys), self._encoded(v, plan.wire)]
        batch, heads, _, width = _val(sent[0]).shape
        value_width = _val(sent[1]).shape[3]
        sizes = [length(plan.group_spans(plan.keys, i)) for i in range(n)]
        flat = batch * heads
        acc: tuple[fx.Node, fx.Node] | None = None
        chunks = [(e.call(aten.reshape.default, x, [_val(x).numel()]), flat * _val(x).shape[3]) for x in sent]
        if not plan.apart:
            chunks = [(e.call(aten.cat.default, [x for x, _ in chunks], 0), sum(row for _, row in chunks))]
        for step in range(n):
            source = (self.r - step) % n
            arriving = [] if step == n - 1 else [
                (self._shift(chunk, sizes[source] * row, sizes[(source - 1) % n] * row), row) for chunk, row in chunks]
            columns = plan.group_spans(plan.keys, source)
            keys, values = k, v
            if step == 0 and k_fixed is not None:
                keys, values = self._join(k_fixed, k), self._join(v_fixed, v)
                columns = plan.replicated(plan.keys) + columns
            part = self._attend_lse(queries, keys, values, rows, columns)
            acc = part if acc is None else self._merge(acc, part)
            if arriving:
                chunks = [(e.wait(started), row) for started, row in arriving]
                k, v = self._unpack([x for x, _ in chunks], sizes[(source - 1) % n], batch, heads, width, value_width)
                k, v = self._decoded(k, plan.wire_keys, dtype), self._decoded(v, plan.wire, dtype)
        assert acc is not None
        return e.call(aten._to_copy.default, acc[0], dtype=_val(queries).dtype)

    def _shift(self, chunk: fx.Node, sent: int, received: int) -> fx.Node:
        """Start to send ``chunk`` to the next group and to receive that of the one before: an all-to-all in which only
        one neighbour is given anything."""
        n = self.plan.ring
        send, receive = [0] * n, [0] * n
        send[(self.r + 1) % n], receive[(self.r - 1) % n] = sent, received
        return self.e.start_all_to_all(chunk, receive, send, RING)

    def _unpack(self, chunks: Sequence[fx.Node], size: int, batch: int, heads: int, width: int,
                value_width: int) -> tuple[fx.Node, fx.Node]:
        """Keys and values, which came as one or as two."""
        if len(chunks) == 1:
            at = batch * heads * size * width
            chunks = [self.e.narrow(chunks[0], 0, 0, at),
                      self.e.narrow(chunks[0], 0, at, _val(chunks[0]).shape[0])]
        k, v = chunks
        return (self.e.call(aten.reshape.default, k, [batch, heads, size, width]),
                self.e.call(aten.reshape.default, v, [batch, heads, size, value_width]))

    def _merge(self, a: tuple[fx.Node, fx.Node], b: tuple[fx.Node, fx.Node]) -> tuple[fx.Node, fx.Node]:
        out, lse = self.e.inline(kernels.merge, *a, *b)
        return out, lse

    # The kernel

    def _attend(self, q: fx.Node, k: fx.Node, v: fx.Node, rows: Spans, columns: Spans) -> fx.Node:
        k, v, mask = self._matched(q, k), self._matched(q, v), self._mask(rows, columns)
        if self.kernel != "torch":
            return self.e.call(ours.attention.default, q, k, v, mask, self.scale, self.kernel)
        gqa = _val(q).shape[1] != _val(k).shape[1]
        node = self.e.call(aten.scaled_dot_product_attention.default, q, k, v, mask, 0.0, False, scale=self.scale,
                           enable_gqa=gqa)
        node.meta["kernel"] = self.kernel  # a choice, which an artifact leaves to who runs it
        return node

    def _attend_lse(self, q: fx.Node, k: fx.Node, v: fx.Node, rows: Spans,
                    columns: Spans) -> tuple[fx.Node, fx.Node]:
        k, v, mask = self._matched(q, k), self._matched(q, v), self._mask(rows, columns)
        both = self.e.call(ours.attention_lse.default, q, k, v, mask, self.scale, self.kernel)
        out, lse = (self.e.item(both, i) for i in (0, 1))
        return out, lse

    def _matched(self, q: fx.Node, kv: fx.Node) -> fx.Node:
        """Key heads as the kernel wants them: as they are if each serves the same number of query heads in
        order, otherwise one per query head."""
        plan, (a, b) = self.plan, (self.cuts[self.u], self.cuts[self.u + 1])
        group, first = plan.heads // plan.kv_heads, plan.kv_range(self.u)[0]
        have = _val(kv).shape[1]
        if have <= 1 or (a % group == 0 and have * group == b - a):
            return kv
        return self.e.take(kv, 1, [(h // group - first, h // group - first + 1) for h in range(a, b)])

    def _mask(self, rows: Spans, columns: Spans) -> fx.Node | None:
        """The mask for these queries and keys, in the order in which they lie after the exchange."""
        mask = self.mask
        if mask is None:
            return None
        if _val(mask).shape[1] != 1:
            mask = self.e.narrow(mask, 1, self.cuts[self.u], self.cuts[self.u + 1])
        for dim, spans in ((2, rows), (3, columns)):
            if _val(mask).shape[dim] != 1:
                mask = self.e.take(mask, dim, spans)
        return mask


def _four(e: Emitter, x: fx.Node) -> fx.Node:
    shape = list(_val(x).shape)
    if len(shape) == 4:
        return x
    lead, heads = (shape[:-3], shape[-3:]) if len(shape) > 3 else ([], [1] * (3 - len(shape)) + shape)
    batch = 1
    for n in lead:
        batch *= n
    return e.call(aten.reshape.default, x, [batch, *heads])


def _four_mask(e: Emitter, mask: fx.Node, ndim: int, lead: tuple[int, ...]) -> fx.Node:
    shape = [1] * (ndim - _val(mask).ndim) + list(_val(mask).shape)
    if ndim > 4 and any(n != 1 for n in shape[: ndim - 3]):
        mask = e.call(aten.expand.default, mask, [*lead, *shape[-3:]])
        shape = [*lead, *shape[-3:]]
    return _four(e, mask) if len(shape) == _val(mask).ndim else _four(
        e, e.call(aten.reshape.default, mask, shape))


def _val(node: fx.Node) -> torch.Tensor:
    return node.meta["val"]
