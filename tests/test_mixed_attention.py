"""Random attention: heads that do not divide, fewer key heads, values of a width of their own, text, masks, and batches
of several dimensions, under random splits: its numbers, and the bytes that its plan says it sends."""

from __future__ import annotations

import random

import lockstep
import pytest
import torch
import torch.nn.functional as F
from emulation import difference, held
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from xdit_compile.frontend.capture import capture
from xdit_compile.ir.layout import SEQUENCE, Dim
from xdit_compile.passes import localize, plan
from xdit_compile.passes.attention_plan import AttentionPlan
from xdit_compile.report.costs import costs_of
from xdit_compile.spec import ShardingSpec

EXACT = 1e-5


class Mixed(nn.Module):
    """Takes tokens (..., tokens, 5), and text (..., length, 16) that joins the keys, and perhaps the queries."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.kv_heads = rng.choice([2, 3, 4, 5])
        self.heads, width, value = self.kv_heads * rng.choice([1, 1, 2]), rng.choice([4, 8]), rng.choice([4, 8, 12])
        self.joint, self.text_first, self.mask = rng.random() < 0.6, rng.random() < 0.5, rng.choice(
            ["", "", "keys", "pairs", "heads", "causal"])
        self.enter, self.out = nn.Linear(5, 16), nn.Linear(self.heads * value, 5)
        self.q, self.k = nn.Linear(16, self.heads * width), nn.Linear(16, self.kv_heads * width)
        self.v = nn.Linear(16, self.kv_heads * value)

    def split(self, x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(-2, -3)

    def masked(self, q: Tensor, k: Tensor) -> Tensor | None:
        rows, columns = torch.arange(q.shape[-2]), torch.arange(k.shape[-2])
        if self.mask == "keys":
            return (columns % 5 != 3).expand(*q.shape[:-3], 1, 1, -1)
        if self.mask == "heads":
            return torch.arange(self.heads)[:, None, None] * 0.01 * (rows[:, None] - columns).abs()
        if self.mask == "causal":
            return columns <= rows[:, None]
        return (rows[:, None] * 3 + columns).cos() if self.mask == "pairs" else None

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        n, x = x.shape[-2], self.enter(x)
        both = torch.cat([text, x] if self.text_first else [x, text], -2)
        q = self.split(self.q(both if self.joint else x), self.heads)
        k, v = self.split(self.k(both), self.kv_heads), self.split(self.v(both), self.kv_heads)
        mixed = F.scaled_dot_product_attention(q, k, v, self.masked(q, k), enable_gqa=self.kv_heads != self.heads)
        mixed = mixed.transpose(-2, -3).flatten(-2)
        return self.out(mixed[..., -n:, :] if self.joint and self.text_first else mixed[..., :n, :])


@pytest.mark.parametrize("seed", range(24))
def test_numbers_and_bytes(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model = Mixed(rng).requires_grad_(False).eval()
    batch = rng.choice([(2,), (2,), (1,), (2, 3)])
    tensors = [torch.randn(*batch, rng.randint(16, 25), 5), torch.randn(*batch, rng.choice([1, 3, 8]), 16)]
    spec = ShardingSpec.parse(rng.choice(["ulysses=2", "ring=2", "ring=3", "ulysses=2,ring=2", "ring=4",
                                          *(["ulysses=4"] if model.kv_heads > 3 else [])]))
    with torch.no_grad():
        whole, seeds = plan(capture(model, tensors), spec)
        ranks = [localize(whole, seeds, rank) for rank in range(spec.world_size)]
        expected = model(*tensors)
        results = lockstep.run([r.main for r in ranks], [held(model, r, tensors) for r in ranks])
        assert all(difference(found, expected) < EXACT for (found,) in results)
    for local in ranks:
        sent = sum(c.size * c.times for c in costs_of(local).collectives if c.why.startswith("attention"))
        assert sent == sum(n.size for n in local.notes if n.kind == "attention") > 0


@settings(max_examples=100)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 6))
def test_a_rank_gets_the_key_heads_that_its_query_heads_read(kv_heads: int, group: int, ulysses: int) -> None:
    heads = kv_heads * group
    if heads < ulysses:
        return
    dim = Dim.even(12, ulysses, SEQUENCE)
    plan = AttentionPlan(dim, dim, heads, kv_heads, 4, 4, 1, 4, ulysses, 1)
    cuts = plan.head_cuts()
    assert cuts[0] == 0 and cuts[-1] == heads
    for u in range(ulysses):
        read = {head // group for head in range(*cuts[u : u + 2])}
        assert not read or plan.kv_range(u) == (min(read), max(read) + 1)
