"""The distributed attention node, and the plan that says how it will be carried out.

The shard pass leaves ``sharded_attention`` where queries and keys are both spread over ranks; its plan is pure
data, made from layouts and the spec, from which costs are counted, reports are printed and graphs are lowered.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch._subclasses.fake_tensor import FakeTensor

from xdit_compile.errors import PlanError
from xdit_compile.ir.layout import PATCH, SEQUENCE, Dim, Layout, Position, Spans, even_offsets, length
from xdit_compile.ir.mesh import RING, ULYSSES
from xdit_compile.passes.low_bit_wire import WHOLE, row_bytes
from xdit_compile.spec import APART


def sharded_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None,
                      scale: float | None, *caches: torch.Tensor) -> torch.Tensor:
    """Softmax attention of this rank's queries to every rank's keys, and, if there are ``caches`` of keys and values,
    to those of other patches in them. A marker: lowered before anything runs."""
    if not isinstance(q, FakeTensor):
        raise PlanError("sharded_attention was executed; the attention pass has not lowered it")
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


@dataclass(frozen=True)
class AttentionPlan:
    """USP (arXiv 2405.07719): Ulysses all-to-all inside each group of ``ulysses`` ranks, a ring across groups.

    ``queries`` and ``keys`` are the layouts of the two token dimensions. Replicated tokens are not sent: for them
    each rank slices its heads. Heads need not divide evenly; with fewer key heads than query heads (GQA) each
    rank gets the key heads its query heads read. ``apart``: whether queries, keys and values are sent by themselves.
    ``wire`` and ``wire_keys`` say in which form queries, values and results, and keys, travel (``low_bit_wire``).
    """

    queries: Dim
    keys: Dim
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    batch: int
    element_size: int
    ulysses: int
    ring: int
    patch: int | None = None
    apart: bool = False
    wire: str = WHOLE
    wire_keys: str = WHOLE

    @property
    def method(self) -> str:
        if self.ulysses > 1 and self.ring > 1:
            return "usp"
        return "ulysses" if self.ulysses > 1 else "ring"

    def head_cuts(self) -> tuple[int, ...]:
        """Query heads of each Ulysses rank; cut between groups that share a key head where there are enough."""
        group = self.heads // self.kv_heads
        if self.kv_heads >= self.ulysses:
            return tuple(group * c for c in even_offsets(self.kv_heads, self.ulysses))
        return even_offsets(self.heads, self.ulysses)

    def kv_range(self, u: int) -> tuple[int, int]:
        """The key heads that the query heads of Ulysses rank ``u`` read."""
        group = self.heads // self.kv_heads
        a, b = self.head_cuts()[u : u + 2]
        return a // group, max(-(-b // group), a // group)

    def rank(self, u: int, r: int) -> Position:
        where = {SEQUENCE: r * self.ulysses + u, ULYSSES: u, RING: r}
        return where if self.patch is None else {**where, PATCH: self.patch}

    def replicated(self, dim: Dim) -> Spans:
        """Global ranges of the tokens that every rank holds."""
        return dim.spans(self.rank(0, 0), sharded=False)

    def replicated_share(self, r: int) -> Spans:
        """The replicated query tokens that ring group ``r`` attends for, so that none is attended twice."""
        fixed = self.replicated(self.queries)
        return cut(fixed, *even_offsets(length(fixed), self.ring)[r : r + 2])

    def moving(self, dim: Dim, u: int, r: int) -> int:
        """How many sharded tokens rank (``u``, ``r``) holds."""
        return length(dim.spans(self.rank(u, r), sharded=True))

    def group_spans(self, dim: Dim, r: int) -> Spans:
        """Sharded tokens of ring group ``r``, rank after rank: their order after the all-to-all."""
        return [span for u in range(self.ulysses) for span in dim.spans(self.rank(u, r), sharded=True)]

    def flops(self, position: Position) -> int:
        u, r = position[ULYSSES], position[RING]
        a, b = self.head_cuts()[u : u + 2]
        rows = length(self.group_spans(self.queries, r)) + length(self.replicated_share(r))
        return 2 * self.batch * (b - a) * rows * self.keys.size * (self.head_dim + self.value_dim)

    def sent(self, position: Position) -> int:
        """Bytes this rank sends."""
        return sum(size for (what, *_), size in self.traffic(position).items() if what == "bytes")

    def traffic(self, position: Position) -> dict[tuple[str, str, str], int]:
        """Collectives that this rank takes part in, and bytes it sends in them, by kind and axis."""
        u, r = position[ULYSSES], position[RING]
        cuts, size = self.head_cuts(), self.element_size
        query, key = row_bytes(self.head_dim, self.wire, size), row_bytes(self.head_dim, self.wire_keys, size)
        value = row_bytes(self.value_dim, self.wire, size)
        own_q, own_k = self.moving(self.queries, u, r), self.moving(self.keys, u, r)
        own_heads = cuts[u + 1] - cuts[u]
        own_kv = (lambda a, b: b - a)(*self.kv_range(u))
        share = length(self.replicated_share(r))
        exchanged = passed = 0
        for other in range(self.ulysses):
            if other != u:
                a, b = self.kv_range(other)
                exchanged += own_q * (cuts[other + 1] - cuts[other]) * query
                exchanged += own_k * (b - a) * (key + value)
                back = self.moving(self.queries, other, r) + share
                exchanged += back * own_heads * value
        for step in range(self.ring - 1):
            chunk = length(self.group_spans(self.keys, (r - step) % self.ring))
            passed += chunk * own_kv * (key + value)
        # Shares are gathered padded to the largest; a rank may have none of its own.
        most = -(-length(self.replicated(self.queries)) // self.ring)
        shares = (self.ring - 1) * most * self.heads * self.value_dim * size
        found = {("count", "all_gather", RING): int(shares > 0), ("bytes", "all_gather", RING): shares * self.batch,
                 ("count", "ring", RING): (self.ring - 1) * (1 + self.apart),
                 ("bytes", "ring", RING): passed * self.batch}
        if self.ulysses > 1:
            messages = 3 if self.apart else 1 if self.queries == self.keys else 2
            found |= {("count", "all_to_all", ULYSSES): messages + 1,
                      ("bytes", "all_to_all", ULYSSES): exchanged * self.batch}
        return found

    def __str__(self) -> str:
        heads = f"{self.heads}" + (f" over {self.kv_heads} key heads" if self.kv_heads != self.heads else "")
        return (f"{self.method}: queries [{self.queries}], keys [{self.keys}], heads {heads} cut "
                f"{'/'.join(str(b - a) for a, b in pairwise(self.head_cuts()))}" + (
                    f"; {self.wire} on the wire, keys {self.wire_keys}" if self.wire != WHOLE else ""))


def cut(spans: Spans, start: int, stop: int) -> Spans:
    """The ``start``-th to ``stop``-th index of the listed ones."""
    out, at = [], 0
    for a, b in spans:
        lo, hi = max(start - at, 0), min(stop - at, b - a)
        if lo < hi:
            out.append((a + lo, a + hi))
        at += b - a
    return out


def local_heads(x, position) -> int:
    """The heads of a value of shape (..., heads, tokens, width) that this rank knows, of whatever tokens."""
    return x.dims[-3].local_size(position) if x.ndim > 2 else 1


def plan_attention(q, k, v, spec, position) -> AttentionPlan:
    """The plan for values q, k, v of shape (..., heads, tokens, width), of whose batch this rank may hold a part, be it
    a dimension of its own or one with the heads: (batch x heads, tokens, width)."""
    return AttentionPlan(
        queries=q.dims[-2], keys=k.dims[-2], heads=local_heads(q, position),
        kv_heads=local_heads(k, position), head_dim=q.shape[-1], value_dim=v.shape[-1],
        batch=math.prod(Layout(q.dims[:-3]).local_shape(position)), element_size=q.dtype.itemsize,
        ulysses=spec.ulysses_degree, ring=spec.ring_degree, patch=position.get(PATCH), apart=spec.exchange == APART,
        wire=spec.wire, wire_keys=spec.keys_wire)
