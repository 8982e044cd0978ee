"""Weights shared out among tensor ranks: what is cut, that it is exact, and what it costs."""

from __future__ import annotations

import math
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import shard_runs
import torch
import torch.nn.functional as F
import zoo
from emulation import Found, together
from marks import whole
from pool import Pool
from safetensors.torch import save_file
from torch import Tensor, nn

import xdit_compile
from xdit_compile.diagnostics.explain import explain
from xdit_compile.diagnostics.explanation import WeightCut
from xdit_compile.errors import SpecError
from xdit_compile.frontend.capture import capture
from xdit_compile.ir.call_arguments import call_arguments
from xdit_compile.ir.layout import TENSOR, Layout
from xdit_compile.ir.program import Program
from xdit_compile.ir.pytree import flatten
from xdit_compile.passes import localize, plan
from xdit_compile.report.operations import program_flops
from xdit_compile.report.traffic import collectives
from xdit_compile.spec import ShardingSpec

sys.path.append(str(Path(__file__).resolve().parents[1]))

from examples.published import PUBLISHED

EXACT = 1e-5


def laid_out(whole: Program, seeds: dict[str, Layout]) -> dict[str, Layout]:
    """How each parameter is shared out, by its name."""
    holders = whole.main.graph.find_nodes(op="placeholder")
    return {i.name: seeds.get(n.name, Layout.replicated(n.meta["val"].shape)) for n, i in zip(
        holders, whole.inputs, strict=True) if i.kind == "parameter"}


def held(model: nn.Module, layouts: dict[str, Layout], rank: int = 0) -> float:
    """Which share of the elements of the model's parameters a rank has."""
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    mine = sum(math.prod(layouts[n].local_shape({TENSOR: rank})) if n in layouts else size
               for n, size in sizes.items())
    return mine / sum(sizes.values())


# Blocks that are drawn


class Drawn(nn.Module):
    """A block of attention and feed-forward, of which it is drawn how projections are fused, how many heads of keys
    there are, what is normalized, and what modulates."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.heads = rng.choice([2, 3, 4, 6, 6, 8])
        self.groups = rng.choice([n for n in range(1, self.heads + 1) if self.heads % n == 0])
        self.size, self.width = rng.choice([4, 8]), rng.choice([24, 32])
        self.fused = rng.choice(["apart", "chunk", "view", "interleaved", "with feed"])
        self.gated = rng.choice(["no", "apart", "chunk"])
        self.normed = rng.choice(["no", "head", "width", "layer"])
        self.native = rng.random() < 0.5
        self.turned = rng.random() < 0.3
        if self.fused in ("view", "interleaved"):
            self.groups = self.heads
        inner, keys, self.feed = self.heads * self.size, self.groups * self.size, rng.choice([40, 64, 96])
        self.split = [inner, keys, keys]
        bias = rng.random() < 0.5
        if self.fused == "apart":
            self.q, self.k, self.v = (nn.Linear(self.width, n, bias) for n in self.split)
        else:
            self.qkv = nn.Linear(self.width, sum(self.split) + self.feed * (self.fused == "with feed"), bias)
        norm = {"head": lambda _: nn.RMSNorm(self.size), "width": lambda n: nn.RMSNorm(n, eps=1e-5),
                "layer": lambda n: nn.LayerNorm(n), "no": lambda _: nn.Identity()}[self.normed]
        self.norm_q, self.norm_k = norm(inner), norm(keys)
        self.out = nn.Linear(inner, self.width, bias)
        self.up = nn.Linear(self.width, self.feed * (2 if self.gated == "chunk" else 1), bias)
        self.gate = nn.Linear(self.width, self.feed) if self.gated == "apart" else None
        down = torch.randn(self.feed, self.width) / 8
        self.down = nn.Parameter(down if self.turned else down.T.contiguous())
        self.modulate = nn.Linear(self.width, 3 * self.width)
        self.norm = nn.LayerNorm(self.width, elementwise_affine=False)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale, gate = self.modulate(F.silu(time))[:, None].chunk(3, dim=-1)
        h = self.norm(x) * (1 + scale) + shift
        x = x + gate * self.out(self.attend(h))
        return x + F.linear(self.fed(self.norm(x)), self.down.T if self.turned else self.down)

    def fed(self, h: Tensor) -> Tensor:
        if self.gated == "chunk":
            a, b = self.up(h).chunk(2, dim=-1)
            return F.silu(a) * b
        return F.gelu(self.up(h)) * (self.gate(h) if self.gated == "apart" else 1)

    def attend(self, h: Tensor) -> Tensor:
        lead = h.shape[:2]
        if self.fused == "apart":
            q, k, v = self.q(h), self.k(h), self.v(h)
        elif self.fused == "chunk":
            q, k, v = self.qkv(h).split(self.split, dim=-1)
        elif self.fused == "with feed":
            q, k, v, _ = self.qkv(h).split([*self.split, self.feed], dim=-1)
        elif self.fused == "view":
            q, k, v = (t.flatten(2) for t in self.qkv(h).view(*lead, 3, self.heads, self.size).unbind(2))
        else:
            q, k, v = (t.flatten(2) for t in self.qkv(h).view(*lead, self.heads, 3 * self.size).chunk(3, dim=-1))
        if self.normed in ("width", "layer"):
            q, k = self.norm_q(q), self.norm_k(k)
        q, k, v = (t.unflatten(-1, (-1, self.size)).transpose(1, 2) for t in (q, k, v))
        if self.normed == "head":
            q, k = self.norm_q(q), self.norm_k(k)
        more = self.heads // self.groups
        if self.native:
            out = F.scaled_dot_product_attention(q, k, v, enable_gqa=more > 1)
        else:
            k, v = (t.repeat_interleave(more, dim=1) for t in (k, v))
            out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = random.Random(seed)
        self.embed, self.time = nn.Linear(8, 32), nn.Linear(16, 32)
        blocks = [Drawn(random.Random(seed)) for _ in range(rng.choice([1, 2, 3]))]
        width = blocks[0].width
        self.embed, self.time, self.head = nn.Linear(8, width), nn.Linear(16, width), nn.Linear(width, 8)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x, time = self.embed(x), self.time(time)
        for block in self.blocks:
            x = block(x, time)
        return self.head(x)


def run(model: nn.Module, given: dict[str, Tensor], spec: str) -> tuple[Found, float]:
    arguments = call_arguments(model, given)
    with torch.no_grad():
        expected = flatten((model(**given), arguments))[0]
        program = capture(model, *arguments)
    found = together(model, arguments, expected, program, spec)
    canonical, seeds = plan(program, ShardingSpec.parse(spec))
    return found, held(model, laid_out(canonical, dict(seeds)))


SPECS = ("tensor=2", "tensor=3", "tensor=2,ulysses=2", "tensor=2,ring=2", "tensor=4", "tensor=2,shard=1,cfg=2")


@pytest.mark.parametrize("seed", [*range(18), *(whole(n) for n in range(18, 200))])
def test_drawn_blocks_are_shared_out_and_exact(seed: int) -> None:
    torch.manual_seed(seed)
    model, spec = Model(seed).eval().requires_grad_(False), SPECS[seed % len(SPECS)]
    block: Any = model.blocks[0]
    parsed = ShardingSpec.parse(spec)
    if parsed.ulysses_degree * parsed.tensor_degree > block.heads:
        spec, parsed = "tensor=2", ShardingSpec.parse("tensor=2")
    found, share = run(model, {"x": torch.randn(2, 12, 8), "time": torch.randn(2, 16)}, spec)
    said = {n: v for n, v in vars(block).items() if isinstance(v, (int, str, bool))}
    assert found.error <= EXACT, said
    assert not [n for n in found.notes if n.kind == "fallback"], said
    n = parsed.tensor_degree
    if block.groups % n == 0 and block.feed % n == 0:
        # All of a block; what is small outside of it may stay whole.
        assert share <= 1 / n + 0.1, said
        if parsed.sequence_degree == 1:
            assert found.work <= 1.1, said


# Published models


@pytest.mark.parametrize("name", ["sd3_medium", "pixart_sigma_1024", whole("hunyuan_dit_1024")])
@pytest.mark.parametrize("ranks", [2, whole(4), 8])
def test_what_published_models_cost(name: str, ranks: int) -> None:
    """Each rank has its share of the operations and parameters, and sends but the sums of each half of a block."""
    from benchmarks.published import SHAPES

    model, given = PUBLISHED[name]()
    canonical, seeds = plan(capture(model, *call_arguments(model, given)), ShardingSpec(tensor_degree=ranks))
    local, shape = localize(canonical, seeds, 0), SHAPES[name]
    assert program_flops(local) * ranks <= 1.05 * program_flops(canonical)
    assert held(model, laid_out(canonical, dict(seeds))) * ranks <= 1.05
    assert sum(c.sent for c in collectives(local)) == pytest.approx(shape.sums_formula(ranks), rel=0.02)


def test_modulations_are_gathered_once() -> None:
    """Not each of the parts that they are taken apart in."""
    model, given = PUBLISHED["sd3_medium"]()
    canonical, seeds = plan(capture(model, *call_arguments(model, given)), ShardingSpec(tensor_degree=2))
    found = [c for c in collectives(localize(canonical, seeds, 0)) if c.function != "main"]
    assert sorted((c.kind, c.module.rpartition(".")[2]) for c in found) == [
        ("all_gather", "norm1"), ("all_gather", "norm1_context"), ("all_reduce", "0"), ("all_reduce", "2"),
        ("all_reduce", "2"), ("all_reduce", "to_add_out")]


def test_explain_says_how_weights_are_shared_out() -> None:
    torch.manual_seed(0)
    model, given = Model(5).eval(), {"x": torch.randn(2, 12, 8), "time": torch.randn(2, 16)}
    found = explain(model, "tensor=2", given)
    width = model.blocks[0].width
    assert WeightCut("blocks.*.modulate.weight", f"[{3 * width}/2, {width}]", len(model.blocks)) in found.weights
    assert "Weights that tensor ranks share out" in str(found) and not explain(model, "ulysses=2", given).weights


def test_a_model_without_weights_to_share_is_refused() -> None:
    class Bare(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    given = {"x": torch.randn(1, 4, 8, 4)}
    program = capture(Bare(), *call_arguments(Bare(), given))
    with pytest.raises(SpecError, match="no cut of any weight"):
        plan(program, ShardingSpec(tensor_degree=2))


# Processes


@pytest.mark.parametrize(("name", "spec"), [
    ("flux", "tensor=2"), ("wan", "tensor=2"), whole("sd3", "tensor=2,pipefusion=2,warmup=all"),
    ("pixart_alpha", "tensor=2,ulysses=2,shard=2"), whole("hunyuan_dit", "tensor=3"), whole("cogvideox", "tensor=2"),
    whole("mochi", "tensor=2,ring=2"), whole("ltx", "tensor=2"), whole("hunyuan_video", "tensor=2,cfg=2"),
    whole("qwen_image", "tensor=2,offload=block"), whole("latte", "tensor=2"), whole("dit", "tensor=4")])
def test_on_processes(pool: Pool, name: str, spec: str) -> None:
    """Two calls of each of two shapes: the second shape finds parameters shared out and given up."""
    count = ShardingSpec.parse(spec).world_size
    for found in pool.run(shard_runs.like_one_device, name, spec, ranks=range(count), timeout=240):
        assert max(found["errors"]) <= EXACT
        assert found["held"] <= 0.8 * found["all"] and found["left"] <= 0.06 * found["all"]


def test_ranks_read_their_parts_of_files(pool: Pool, tmp_path: Path) -> None:
    model = shard_runs.cases.made(zoo.CASES["flux"])
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, tmp_path / "all.safetensors")
    for found in pool.run(shard_runs.parts_from_files, "flux", str(tmp_path), "tensor=2", ranks=range(2)):
        assert max(found["errors"]) <= EXACT
        # A cut by input features is a part of each row, and rows are read whole.
        assert found["read"] <= 0.8 * found["all"]


@pytest.mark.whole  # as those of `shard` in `test_shard.py`
def test_edits_after_the_first_call_are_refused(pool: Pool) -> None:
    for said in pool.run(shard_runs.refused, "dit", "tensor=2", ranks=range(2)):
        assert {"state_dict", "load_state_dict", "written into", "written through .data", "replaced", "cast"} <= {*said}


def test_spec() -> None:
    spec = ShardingSpec.parse("tensor=2,ulysses=2,shard=2")
    assert spec.world_size == 4 and spec.replicas == 2 and str(spec) == "ulysses=2,tensor=2,shard=2"
    with pytest.raises(SpecError, match="shard=4"):
        ShardingSpec.parse("tensor=2,ulysses=2,shard=4")
    assert xdit_compile.ShardingSpec(tensor_degree=2).parts
