"""Which axes are cut: tokens that enter blocks as they are, batches in lists or packed into tokens, biases of pairs."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from emulation import together
from torch import Tensor, fx, nn

from xdit_compile import explain
from xdit_compile.errors import SpecError
from xdit_compile.frontend.capture import capture
from xdit_compile.ir.layout import SEQUENCE, TENSOR, Dim, Layout
from xdit_compile.ir.mesh import axis_sizes, position_of
from xdit_compile.ir.pytree import flatten
from xdit_compile.passes import localize, plan, plan_start
from xdit_compile.passes.cost import CostMemo
from xdit_compile.passes.interpreter import ProgramInterpreter
from xdit_compile.spec import ShardingSpec

D = 64


class Block(nn.Module):
    """Attention and a feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.feed = nn.Linear(D, 3 * D), nn.Linear(D, D), nn.Linear(D, D)
        self.pair = nn.Linear(8, 4)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if z is not None:
            scores = scores + self.pair(z).permute(0, 3, 1, 2)
        return x + self.feed(self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))


class Given(nn.Module):
    """Blocks that get tokens as they are given, or nearly."""

    def __init__(self, change: str, pairs: bool = False) -> None:
        super().__init__()
        self.blocks, self.change, self.pairs = nn.ModuleList(Block() for _ in range(3)), change, pairs

    def forward(self, x: Tensor, t: Tensor, z: Tensor | None = None) -> Tensor:
        changes = {"none": lambda: x, "scaled": lambda: x * t[:, None, None], "normed": lambda: F.layer_norm(x, (D,)),
                   "turned": lambda: x.transpose(0, 1).contiguous().transpose(0, 1),
                   "halved": lambda: x.chunk(2, -1)[0].repeat(1, 1, 2)}
        x = changes[self.change]()
        if z is None and self.pairs:
            z = (x[:, :, None] * x[:, None]).unflatten(-1, (8, -1)).mean(-1)  # of tokens, not given
        for block in self.blocks:
            x = block(x, z)
        return x


def exact(model: nn.Module, spec: str, *args: Any) -> bool:
    arguments: tuple[Any, Any] = (args, {})
    with torch.no_grad():
        result = model(*args)
    return together(model, arguments, flatten((result, arguments))[0], capture(model, *arguments), spec).error <= 1e-5


@pytest.mark.parametrize("spec", ["ulysses=2", "ring=2"])
@pytest.mark.parametrize("change", ["none", "scaled", "normed", "turned", "halved"])
def test_tokens_that_enter_blocks_as_they_are(change: str, spec: str) -> None:
    torch.manual_seed(0)
    model, args = Given(change).eval().requires_grad_(False), (torch.randn(1, 256, D), torch.rand(1))
    assert explain(model, spec, args).work_ratio < 1.05
    assert exact(model, spec, *args)


@pytest.mark.parametrize("spec", ["ulysses=2", "ring=2", "ulysses=2,ring=2"])
@pytest.mark.parametrize("given", [True, False])
def test_a_bias_of_pairs_is_cut_by_rows(spec: str, given: bool) -> None:
    torch.manual_seed(0)
    model = Given("scaled", True).eval().requires_grad_(False)
    args = (torch.randn(1, 64, D), torch.rand(1), *([torch.randn(1, 64, 64, 8)] if given else []))
    explained = explain(model, spec, args)
    assert explained.work_ratio < 1.25
    assert not any("64, 64" in r.text and "needed whole" in r.text for r in explained.replicated)
    assert exact(model, spec, *args)


class Listed(nn.Module):
    """Samples in a list, of as many channels as there are samples, or twice as many."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.embed, self.time, self.blocks = nn.Conv2d(channels, D, 2, 2), nn.Linear(8, D), nn.ModuleList(
            Block() for _ in range(2))

    def forward(self, xs: list[Tensor], t: Tensor) -> list[Tensor]:
        x = torch.cat([self.embed(x[None]).flatten(2).transpose(1, 2) for x in xs])
        x = x * self.time(t)[:, None]
        for block in self.blocks:
            x = block(x)
        return list(x)


@pytest.mark.parametrize(("spec", "samples", "channels"), [("data=2", 2, 4), ("cfg=2", 2, 2), ("data=3", 3, 6)])
def test_channels_of_listed_samples_are_no_batch(spec: str, samples: int, channels: int) -> None:
    torch.manual_seed(0)
    model = Listed(channels).eval().requires_grad_(False)
    args = [torch.randn(channels, 8, 12) for _ in range(samples)], torch.randn(samples, 8)
    assert [r.text.partition(" is laid")[0] for r in explain(model, spec, args).seeds] == [f"[{samples}, 8]"]
    assert exact(model, spec, *args)


class Packed(nn.Module):
    """All samples are one sequence, with a mask that keeps them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.out = nn.Linear(16, D), nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        sample = torch.arange(b).repeat_interleave(n)
        x = self.embed(x)
        q, k, v = self.qkv(x).flatten(0, 1).unflatten(-1, (3, 4, -1)).permute(1, 2, 0, 3)[:, None]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=sample[:, None] == sample[None])
        return x + self.out(mixed[0].transpose(0, 1).reshape(x.shape))


@pytest.mark.parametrize("spec", ["ulysses=2", "data=2", "cfg=2", "ring=2"])
def test_a_batch_packed_into_tokens_is_shared_out(spec: str) -> None:
    torch.manual_seed(0)
    model, x = Packed().eval().requires_grad_(False), torch.randn(2, 48, 16)
    assert explain(model, spec, (x,)).work_ratio < 1.05
    assert exact(model, spec, x)


@pytest.mark.parametrize("spec", ["cfg=2,ulysses=2", "data=2,ring=2"])
def test_a_factor_of_a_spec_that_gains_nothing_is_said(spec: str) -> None:
    torch.manual_seed(0)
    model, x = Packed().eval().requires_grad_(False), torch.randn(2, 48, 16)
    assert any("to no avail" in r.text for r in explain(model, spec, (x,)).seeds)
    assert exact(model, spec, x)
    plain = Given("none").eval().requires_grad_(False)
    args = torch.randn(2, 256, D), torch.rand(2)
    assert not any("to no avail" in r.text for r in explain(plain, spec, args).seeds)


class Joint(nn.Module):
    """Text and image in one attention, and the image in a second one alone."""

    def __init__(self, second: bool) -> None:
        super().__init__()
        self.text, self.image, self.alone = nn.Linear(D, 3 * D), nn.Linear(D, 3 * D), nn.Linear(D, 3 * D)
        self.second, self.feeds = second, nn.ModuleList(nn.Linear(D, D) for _ in range(2))

    @staticmethod
    def attend(joined: Tensor) -> Tensor:
        q, k, v = joined.unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, text: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        n = text.shape[1]
        both = self.attend(torch.cat([self.text(text), self.image(x)], 1))
        extra = self.attend(self.alone(x)) if self.second else 0
        return text + self.feeds[0](both[:, :n]), x + self.feeds[1](both[:, n:] + extra)


class Joined(nn.Module):
    def __init__(self, second: bool) -> None:
        super().__init__()
        self.embed, self.words = nn.Conv2d(4, D, 2, 2), nn.Linear(40, D)
        self.blocks = nn.ModuleList(Joint(second) for _ in range(3))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x, text = self.embed(x).flatten(2).transpose(1, 2), self.words(text)
        for block in self.blocks:
            text, x = block(text, x)
        return x


@pytest.mark.parametrize("spec", ["ulysses=2", "ring=2"])
@pytest.mark.parametrize("second", [True, False])
@pytest.mark.parametrize(("batch", "words"), [(2, 13), (4, 40)])
def test_of_joint_blocks_attention_is_distributed_whatever_the_batch(
        batch: int, words: int, second: bool, spec: str) -> None:
    torch.manual_seed(0)
    model = Joined(second).eval().requires_grad_(False)
    args = torch.randn(batch, 4, 16, 24), torch.randn(batch, words, 40)
    assert any(spec.partition("=")[0] in r.text for r in explain(model, spec, args).attentions)
    assert exact(model, spec, *args)


class Placed(nn.Module):
    """Rotary positions given for each token, without the batch; on queries alone, on keys, or on values too."""

    def __init__(self, turned: str) -> None:
        super().__init__()
        self.embed, self.turned = nn.Linear(16, D), turned
        self.blocks = nn.ModuleList(nn.ModuleList([nn.Linear(D, 3 * D), nn.Linear(D, D)]) for _ in range(2))

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        x = self.embed(x)
        angles = (places[..., None] * torch.tensor([1.0, 0.1])).flatten(1).repeat(1, 4)[:, :16]
        for into, out in self.blocks:
            parts = into(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
            q, k, v = (p * angles.cos() if name in self.turned else p for name, p in zip("qkv", parts, strict=True))
            x = x + out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x


@pytest.mark.parametrize("turned", ["q", "qk"])
@pytest.mark.parametrize("spec", ["cfg=2", "data=2"])
def test_positions_are_no_batch(turned: str, spec: str) -> None:
    model = Placed(turned).eval().requires_grad_(False)
    with pytest.raises(SpecError, match="larger batch"):
        explain(model, spec, (torch.randn(1, 48, 16), torch.rand(48, 3)))
    args = torch.randn(2, 48, 16), torch.rand(48, 3)
    assert explain(model, spec, args).work_ratio < 1.05
    assert exact(model, spec, *args)


class Halves(nn.Module):
    """A block that gives features of which tensor ranks have computed some each."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.norm = nn.Linear(16, 32), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(self.norm(x)).relu()[..., :16] * 2


def test_alike_blocks_stay_alike_where_features_are_shared() -> None:
    model = nn.Sequential(nn.Linear(5, 16), *(Halves() for _ in range(3)), nn.Linear(16, 5)).requires_grad_(False)
    with torch.no_grad():
        captured = capture(model.eval(), (torch.randn(2, 12, 5),))
        local = localize(*plan(captured, ShardingSpec(tensor_degree=2)), 0)
    assert [*captured.calls().values()] == [*local.calls().values()] == [1, 3]
    assert any(n.kind == "collective" for n in local.notes)


class Often(nn.Module):
    """Values that several operators lay out anew, each if none did before."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        both = x[..., None] * y
        return both, x.cumsum(1), x.softmax(1), both.cumsum(0), both.softmax(2), both.amax(1) @ x, x.cumsum(0)


@pytest.mark.parametrize("spec", ["ulysses=3", "ring=2,tensor=2", "ulysses=2,displaced=yes"])
@pytest.mark.parametrize("name", ["often", "dit", "sd3", "flux", "sana", "window", "uvit"])
def test_what_walks_find_again_is_what_they_would_count(name: str, spec: str) -> None:
    """Random choices of seeds, of tokens and weights, one after the other, against walks that remember nothing."""
    draw, memo, parsed = random.Random(name + spec), CostMemo(), ShardingSpec.parse(spec)
    model, given = (Often(), {"x": torch.randn(6, 8), "y": torch.randn(6, 8, 6)}) if name == "often" else (
        zoo.CASES[name].build(), zoo.CASES[name].inputs(2, True))
    canonical, *_ = plan_start(capture(model.eval(), (), given), ShardingSpec(), ())
    program, sizes = replace(canonical, spec=parsed), axis_sizes(parsed)
    graph = program.main.graph
    kinds = {n: what.kind for n, what in zip(graph.find_nodes(op="placeholder"), program.inputs, strict=True)}
    features = [n for n in graph.nodes if isinstance(n.meta.get("val"), Tensor) and n.meta["val"].ndim > 1]
    values = [n for n in features if kinds.get(n) not in ("parameter", "constant")]
    weights = [n for n in features if kinds.get(n) == "parameter"]

    def cut(node: fx.Node, axis: str) -> Layout:
        shape = tuple(node.meta["val"].shape)
        dim = draw.randrange(len(shape))
        return Layout.replicated(shape).replace(dim, Dim.even(shape[dim], sizes[axis], axis))

    for _ in range(15 if weights else 60):
        seeds = {n.name: cut(n, SEQUENCE) for n in draw.sample(values, draw.randint(0, 3))}
        if sizes[TENSOR] > 1 and weights:
            seeds |= {n.name: cut(n, TENSOR) for n in draw.sample(weights, draw.randint(1, 5))}
        position = position_of(parsed.world_size - 1, parsed)
        again, fresh = (ProgramInterpreter(program, seeds, position, sizes, memo=m).main() for m in (memo, None))
        assert again == fresh
        assert fresh.cost.moved > 0
