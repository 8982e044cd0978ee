"""Random attention: heads that do not divide, fewer key heads, values of a width of their own, text, masks, and batches
of several dimensions, under random splits: its numbers, and the bytes that its plan says it sends."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import lockstep
import pytest
import torch
import torch.nn.functional as F
from emulation import difference, held
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rules import Drawn, assert_exact, local_program, program_of, random_dim
from torch import Tensor, fx, nn

from xdit_compile.frontend.capture import capture
from xdit_compile.ir.layout import BATCH, SEQUENCE, Dim, Layout, concatenate
from xdit_compile.ir.mesh import RING, ULYSSES
from xdit_compile.ir.program import Program, is_collective
from xdit_compile.passes import localize, plan
from xdit_compile.passes.attention_plan import AttentionPlan
from xdit_compile.report.costs import costs_of
from xdit_compile.spec import EXCHANGE, ShardingSpec

EXACT = 1e-5
START = torch.ops._c10d_functional.all_to_all_single.default


class Mixed(nn.Module):
    """Takes tokens (..., tokens, 5), and text (..., length, 16) that joins the keys, and perhaps the queries."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.kv_heads = rng.choice([2, 3, 4, 5])
        self.heads, width, value = self.kv_heads * rng.choice([1, 1, 2, 3]), rng.choice([4, 8]), rng.choice([4, 8, 12])
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


SPECS = ("ulysses=2", "ulysses=3", "ulysses=4", "ulysses=5", "ring=2", "ring=3", "ring=4", "ulysses=2,ring=2",
         "ulysses=3,ring=2")


@pytest.mark.parametrize("seed", range(40))
def test_numbers_and_bytes(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model = Mixed(rng).requires_grad_(False).eval()
    batch = rng.choice([(2,), (2,), (1,), (2, 3)])
    tensors = [torch.randn(*batch, rng.randint(16, 25), 5), torch.randn(*batch, rng.choice([1, 3, 8]), 16)]
    spec = rng.choice([s for s in map(ShardingSpec.parse, SPECS) if s.ulysses_degree <= model.heads])
    spec = replace(spec, exchange=EXCHANGE[seed % 2])
    with torch.no_grad():
        whole, seeds = plan(capture(model, tensors), spec)
        ranks = [localize(whole, seeds, rank) for rank in range(spec.world_size)]
        expected = model(*tensors)
        results = lockstep.run([r.main for r in ranks], [held(model, r, tensors) for r in ranks])
        assert all(difference(found, expected) < EXACT for (found,) in results)
    for local in ranks:
        sent = sum(c.size * c.times for c in costs_of(local).collectives if c.why.startswith("attention"))
        assert sent == sum(n.size for n in local.notes if n.kind == "attention") > 0


@pytest.mark.parametrize(("spec", "messages", "before"), [
    ("ulysses=2", 2, 4), ("ulysses=2,exchange=apart", 4, 2), ("ring=3", 2, 3), ("ring=3,exchange=apart", 4, 2)])
def test_apart_a_message_leaves_before_the_next_is_computed(spec: str, messages: int, before: int) -> None:
    """``before``: for how many linear layers the first waits. One embeds tokens, the others make queries, keys and
    values."""
    model = Mixed(random.Random(0)).requires_grad_(False).eval()
    model.joint, model.mask = True, ""
    with torch.no_grad():
        captured = capture(model, [torch.randn(1, 24, 5), torch.randn(1, 6, 16)])
        local = localize(*plan(captured, ShardingSpec.parse(spec)), 0)
    nodes = [n for n in local.main.graph.nodes if n.target in (START, torch.ops.aten.linear.default)]
    sent = [n for n in nodes if n.target is START]
    assert len(sent) == messages
    assert nodes.index(sent[0]) == before


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


DEGREES = ((2, 1, 1), (3, 1, 1), (4, 1, 1), (1, 2, 1), (1, 3, 1), (2, 2, 1), (3, 2, 1), (2, 1, 2), (1, 2, 2), (2, 1, 2))


def tokens(rng: random.Random, size: int, parts: int) -> Dim:
    """As models lay them out: all cut, or text before or after that every rank holds."""
    text = rng.choice([0, 0, 1, 3, 8])
    image = random_dim(rng, size - text, parts, cut=rng.choice(["even", "uneven", "empty shares"]))
    return concatenate(rng.sample([Dim.replicated(text), image], 2))


def drawn_attention(rng: random.Random) -> tuple[tuple[Any, ...], list[Layout], ShardingSpec]:
    """Queries, keys, values and perhaps a mask, each cut in a way of its own or like the others."""
    spec = ShardingSpec(**dict(zip(("ulysses_degree", "ring_degree", "cfg_degree"), rng.choice(DEGREES), strict=True)))
    batch = rng.choice([(2,), (2, 3)] if spec.batch_degree > 1 else [(2,), (1,), (2, 3), (2, 3), ()])
    kv_heads = rng.choice([1, 2, 3, 4])
    heads, width, value = kv_heads * rng.choice([1, 1, 2, 3]), rng.choice([2, 4]), rng.choice([2, 4, 6])
    rows = tokens(rng, rng.randint(12, 18), spec.sequence_degree)
    rows = Dim.replicated(rng.randint(1, 3)) if rng.random() < 0.15 else rows  # fewer than ranks, perhaps
    columns = rows if rng.random() < 0.5 else tokens(rng, rng.randint(12, 18), spec.sequence_degree)
    shapes = [(*batch, heads, rows.size, width), (*batch, kv_heads, columns.size, width),
              (*batch, kv_heads, columns.size, value)]
    whole = (*batch, heads, rows.size, columns.size)
    if rng.random() < 0.6:
        some = rng.choice([0.0, 0.5])
        shapes.append(tuple(1 if rng.random() < some else n for n in whole)[-rng.choice([2, 3, 4, 5, 5]):])
    draw = Drawn(rng)
    q, k, v, *masks = (draw.tensor(*shape) for shape in shapes)
    masks = [m > -1 if rng.random() < 0.3 else m for m in masks]
    causal = not masks and rng.random() < 0.3
    layouts = [Layout.replicated(shape) for shape in shapes]
    for i, dim in enumerate((rows, columns, columns, rows)[: len(shapes)]):
        if shapes[i][-2] == dim.size and rng.random() < (0.9 if i < 3 else 0.5):
            layouts[i] = layouts[i].replace(-2, dim)
        if spec.batch_degree > 1 and len(shapes[i]) > 3 and shapes[i][0] == 2 and rng.random() < 0.9:
            layouts[i] = layouts[i].replace(0, Dim.even(2, 2, BATCH))
    named = {"scale": rng.choice([None, 0.3]), "enable_gqa": heads != kv_heads}
    return (q, k, v, *(masks or [None]), 0.0, causal, named), layouts, spec


@pytest.mark.parametrize("seed", range(120))
def test_any_layout(seed: int) -> None:
    args, layouts, spec = drawn_attention(random.Random(seed))
    assert_exact(SDPA, args, layouts, spec)


SDPA = torch.ops.aten.scaled_dot_product_attention.default


def sent(local: Program) -> list[tuple[str, torch.Size]]:
    return [(str(n.target), n.meta["val"].shape) for n in local.main.graph.nodes if is_collective(n)]


@pytest.mark.parametrize("spec", ["ulysses=2", "ring=2"])
@pytest.mark.parametrize("held", ["keys", "values"])
def test_keys_or_values_that_are_whole_are_sliced(spec: str, held: str) -> None:
    """To what is cut, and no less is distributed than where both are."""
    q, k, v = (torch.randn(2, 4, n, 4) for n in (8, 6, 6))
    program, _ = program_of(SDPA, (q, k, v))
    program = replace(program, spec=ShardingSpec.parse(spec))
    cut = [Layout.replicated(x.shape).replace(2, Dim.even(x.shape[2], 2)) for x in (q, k, v)]
    some = list(cut)
    some[1 if held == "keys" else 2] = Layout.replicated(k.shape)
    assert_exact(SDPA, (q, k, v), some, program.spec)
    for rank in range(2):
        assert sent(local_program(program, some, rank)[0]) == sent(local_program(program, cut, rank)[0])


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_what_is_sent_is_copied_once(ranks: int, kv_heads: int, group: int, batch: int) -> None:
    """Where heads divide evenly, and values are as wide as keys."""
    kv_heads *= ranks
    tensors = [torch.randn(batch, h, 12, 4) for h in (kv_heads * group, kv_heads, kv_heads)]
    program, _ = program_of(SDPA, (*tensors, None, 0.0, False, {"enable_gqa": True}))
    program = replace(program, spec=ShardingSpec(ulysses_degree=ranks))
    layouts = [Layout.replicated(x.shape).replace(2, Dim.even(12, ranks)) for x in tensors]
    local, *others = (local_program(program, layouts, rank)[0] for rank in range(ranks))
    for made in (local, *others):
        (attends,) = made.main.graph.find_nodes(op="call_function", target=SDPA)
        assert attends.args[1].meta["val"].shape[1] == kv_heads // ranks, "no key is there once for each that reads it"
    nodes = [n for n in local.main.graph.nodes if n.op == "call_function"]
    before = nodes[: next(i for i, n in enumerate(nodes) if is_collective(n))]

    def memory(node: fx.Node) -> int:
        return node.meta["val"].untyped_storage()._cdata

    assert sum(all(memory(n) != memory(x) for x in n.all_input_nodes) for n in before) == 1


@pytest.mark.parametrize("large", [False, True])
def test_keys_come_to_a_mask_that_is_larger_than_they_are(large: bool) -> None:
    """Of which each rank has the rows of its queries."""
    width = 2 if large else 32
    q, k, v = (torch.randn(1, 4, 12, width) for _ in range(3))
    mask = torch.randn(1, 4, 12, 12)
    program, _ = program_of(SDPA, (q, k, v, mask))
    layouts = [Layout.replicated(x.shape).replace(2, Dim.even(12, 2)) for x in (q, k, v, mask)]
    program = replace(program, spec=ShardingSpec(ring_degree=2))
    local, _ = local_program(program, layouts, 0)
    assert bool(local.main.graph.find_nodes(op="call_function", target=SDPA)) is large, "else it is a ring"
    assert_exact(SDPA, (q, k, v, mask), layouts, program.spec)


@pytest.mark.parametrize("dim", range(4))
def test_queries_that_attend_to_whole_keys_are_said_to(dim: int) -> None:
    """And none are where it is the batch, the heads or nothing that is cut."""
    q, k, v = (torch.randn(2, 4, 6, 4) for _ in range(3))
    program, _ = program_of(SDPA, (q, k, v))
    layouts = [Layout.replicated(x.shape) for x in (q, k, v)]
    layouts[0] = layouts[0].replace(dim, Dim.even(q.shape[dim], 2))
    local, _ = local_program(replace(program, spec=ShardingSpec(ulysses_degree=2)), layouts, 0)
    assert [n.text for n in local.notes if n.kind == "attention"] == (
        ["local: queries [6/2] attend to whole keys [6]"] if dim == 2 else [])


def test_what_a_plan_says_of_the_wire() -> None:
    dim = Dim.even(12, 2, SEQUENCE)
    plain = AttentionPlan(dim, dim, 4, 2, 4, 4, 1, 4, 2, 1)
    assert str(plain) == "ulysses: queries [12/2], keys [12/2], heads 4 over 2 key heads cut 2/2"
    assert str(replace(plain, wire="fp8", wire_keys="int8")) == f"{plain}; fp8 on the wire, keys int8"


@pytest.mark.parametrize(("shape", "expanded"), [((12, 12), False), ((1, 1, 1, 12, 12), False), ((3, 1, 12, 12), True)])
def test_a_mask_is_made_larger_where_leading_dimensions_need_it_alone(shape: tuple[int, ...], expanded: bool) -> None:
    """Of attention in five dimensions, two of which become the batch."""
    q, k, v = (torch.randn(2, 3, 4, 12, 8) for _ in range(3))
    mask = torch.randn(shape)
    program, _ = program_of(SDPA, (q, k, v, mask))
    layouts = [Layout.replicated(x.shape).replace(3, Dim.even(12, 2)) for x in (q, k, v)] + [Layout.replicated(shape)]
    program = replace(program, spec=ShardingSpec(ulysses_degree=2))
    local, _ = local_program(program, layouts, 0)
    grown = [n for n in local.main.graph.find_nodes(op="call_function", target=torch.ops.aten.expand.default)
             if n.meta["val"].ndim == 5]
    assert bool(grown) is expanded
    assert_exact(SDPA, (q, k, v, mask), layouts, program.spec)


@pytest.mark.parametrize(("ulysses", "ring", "axes"), [(2, 1, {ULYSSES}), (1, 2, {RING}), (2, 2, {ULYSSES, RING})])
def test_nothing_goes_along_an_axis_of_one(ulysses: int, ring: int, axes: set[str]) -> None:
    dim = Dim.even(12, ulysses * ring, SEQUENCE)
    plan = AttentionPlan(dim, dim, 4, 4, 8, 8, 1, 4, ulysses, ring)
    found = plan.traffic({ULYSSES: 0, RING: 0})
    assert {axis for (_, _, axis), number in found.items() if number} == axes


class Bare(nn.Module):
    """A single head without a batch: queries, keys and values of two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.q, self.k, self.v, self.out = (nn.Linear(*size) for size in (
            (5, 16), (16, 8), (16, 8), (16, 8), (8, 5)))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self.enter(x)
        return self.out(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), mask))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("spec", ["ring=2", "ring=3"])
def test_attention_without_heads(spec: str, masked: bool) -> None:
    torch.manual_seed(0)
    model = Bare().requires_grad_(False).eval()
    tensors = [torch.randn(19, 5), torch.rand(19, 19) > 0.3 if masked else None]
    with torch.no_grad():
        whole, seeds = plan(capture(model, tensors), ShardingSpec.parse(spec))
        ranks = [localize(whole, seeds, rank) for rank in range(whole.spec.world_size)]
        given = [t for t in tensors if t is not None]
        results = lockstep.run([r.main for r in ranks], [held(model, r, given) for r in ranks])
        assert all(difference(found, model(*tensors)) < EXACT for (found,) in results)
        assert any(n.kind == "attention" for n in ranks[0].notes)
