"""What an explanation says is what the programs do: bytes, operations, memory, decisions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests import lockstep, models, research
from xdit_compile.diagnostics.blame import arguments_of
from xdit_compile.diagnostics.explain import explain
from xdit_compile.driver.compile_call import compile_program
from xdit_compile.errors import SpecError, XditError
from xdit_compile.frontend.program_cache import captured
from xdit_compile.ir.call_arguments import call_arguments
from xdit_compile.ir.program import Program
from xdit_compile.ir.pytree import flatten
from xdit_compile.report.costs import costs_of
from xdit_compile.report.memory import peak_activations
from xdit_compile.report.operations import program_flops
from xdit_compile.report.traffic import bytes_sent
from xdit_compile.report.units import size, work
from xdit_compile.spec import ShardingSpec

c10d = torch.ops._c10d_functional

TEXT, IMAGE, HIDDEN, CHANNELS, LAYERS, FLOAT = 8, 24, 64, 16, 6, 4
"""Sizes of the joint-attention case, all of which 2 and 4 divide."""


@pytest.fixture(scope="module")
def joint() -> tuple[nn.Module, dict[str, Any]]:
    """Joint attention over text and image; shared, so that it is captured once."""
    return models.build("flux"), models.CASES["flux"].inputs(1, False)


@pytest.mark.parametrize("n", [2, 4])
def test_ulysses_sends_what_its_formula_says(joint, n):
    """Per attention, three quarters of all-to-all for q, k and v and one for the result, each of which sends
    (N-1)/N of what a rank holds, which is 1/N of the tokens."""
    model, inputs = joint
    explained = explain(model, f"ulysses={n}", inputs)
    attention = 4 * (n - 1) * (TEXT + IMAGE) * HIDDEN * LAYERS * FLOAT // n**2
    final = (n - 1) * IMAGE // n * CHANNELS * FLOAT
    assert sum(row.sent for row in explained.attentions) == attention
    assert sum(row.times for row in explained.attentions) == LAYERS
    assert explained.local.sent == attention + final
    assert explained.local.collective_count == 2 * LAYERS + 1
    assert {(t.kind, t.axis, t.why) for t in explained.traffic} == {
        ("all_to_all", "ulysses", "attention, ulysses"),
        ("all_gather", "sequence", f"dimension 1 of [1, 24/{n}, 16] is needed whole")}


def test_explanation_says_where_tokens_start_and_what_stays_whole(joint):
    model, inputs = joint
    explained = explain(model, "ulysses=2", inputs)
    assert [row.module for row in explained.seeds] == ["x_embedder", "context_embedder"]
    assert explained.functions == {"main": 1, "transformer_blocks": 3, "single_transformer_blocks": 3}
    assert {row.module for row in explained.attentions} == {
        "transformer_blocks.0.attn", "single_transformer_blocks.0.attn"}
    assert explained.replicated[0].module == "transformer_blocks.0.norm1.linear"
    assert not explained.fallbacks and not explained.convolutions
    excess = explained.local.flops - explained.whole.flops / 2
    assert explained.replicated_flops == 2 * excess, "what is whole on two ranks is done once too often"
    assert 1 < explained.work_ratio < 1.05


def test_explanation_reads_well_and_survives_json(joint):
    model, inputs = joint
    explained = explain(model, "ulysses=2,ring=2", inputs, rank=3)
    text, said = str(explained), explained.to_dict()
    facts = size(explained.local.sent), work(explained.local.flops)
    for fact in (*facts, "rank 3 of 4", "usp: queries", "context_embedder", "all_to_all", "main x1",
                 "single_transformer_blocks x3", "Computed whole by every rank"):
        assert fact in text
    assert max(map(len, text.splitlines())) <= 120
    assert "\n" not in explained.summary() and "ulysses=2,ring=2" in explained.summary()
    assert json.loads(json.dumps(said)) == said
    assert said["costs"]["bytes_sent"] == sum(c["times"] * c["size"] for c in said["collectives"])


class Block(nn.Module):
    """Self attention and cross attention to a text."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.kv = nn.Linear(width, 3 * width), nn.Linear(width, 2 * width)
        self.q = nn.Linear(width, width)

    def _split(self, x: torch.Tensor, parts: int) -> Sequence[torch.Tensor]:
        return x.unflatten(-1, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        x = x + F.scaled_dot_product_attention(*self._split(self.qkv(x), 3)).transpose(1, 2).flatten(2)
        (q,), (k, v) = self._split(self.q(x), 1), self._split(self.kv(text), 2)
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Painter(nn.Module):
    """Patches of an image in, blocks, an operator that has no rule, a convolution over the image out."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.patchify = nn.Conv2d(3, width, 2, stride=2)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(2))
        self.smooth = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        x = self.patchify(image)
        shape = x.shape
        x = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, text)
        x = x + x.renorm(2, 1, 1e3)
        return self.smooth(x.transpose(1, 2).reshape(shape))


@pytest.fixture(scope="module")
def painter() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    return Painter().eval(), {"text": torch.randn(2, 5, 16), "image": torch.randn(2, 3, 16, 12)}


def _compiled(model: nn.Module, inputs: Any, spec: str) -> tuple[Program, list[Program], list[torch.Tensor]]:
    """The global program, every rank's, and the tensors of the call."""
    call, parsed = call_arguments(model, inputs), ShardingSpec.parse(spec)
    ranks = [compile_program(captured(model, *call), parsed, rank) for rank in range(parsed.world_size)]
    return ranks[0].whole, [r.local for r in ranks], flatten(call)[0]


def _counted(run: Any) -> int:
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("spec", ["ulysses=2,ring=2", "ulysses=3"])
def test_operations_are_those_that_run(painter, spec):
    """PyTorch's counter, on the global program and on all ranks' programs as they run in lock step."""
    model, inputs = painter
    whole, ranks, tensors = _compiled(model, inputs, spec)
    state = dict(model.named_parameters())
    assert program_flops(whole) == _counted(lambda: whole.main(*arguments_of(whole, state, tensors)))
    given = [arguments_of(r, state, tensors) for r in ranks]
    assert sum(map(program_flops, ranks)) == _counted(lambda: lockstep.run([r.main for r in ranks], given))


@pytest.mark.parametrize("spec", ["ulysses=2,ring=2", "ulysses=3"])
def test_bytes_are_those_the_planner_counted(painter, spec):
    """Two counts that share no code: from layouts while the graphs are made, and from the finished graphs."""
    _, ranks, _ = _compiled(*painter, spec)
    for local in ranks:
        calls = local.calls()
        assert costs_of(local).sent == sum(n.size * calls[n.function] for n in local.notes) > 0


def test_every_attention_convolution_and_fallback_has_its_row(painter):
    model, inputs = painter
    explained = explain(model, "ulysses=2", inputs)
    assert [(row.times, row.text.partition(":")[0], row.sent > 0) for row in explained.attentions] == [
        (2, "ulysses", True), (2, "local", False)]
    patchify, smooth = explained.convolutions
    assert (patchify.module, patchify.sent, smooth.module) == ("patchify", 0, "smooth")
    assert smooth.text == "all_to_all: border of a convolution reading 3 with stride 1"
    assert smooth.sent == 2 * 16 * 6 * FLOAT, "one row of 6 columns, for 2 images of 16 channels"
    (fallback,) = explained.fallbacks
    assert fallback.text == "aten.renorm.default computed whole: no rule for this operator"
    assert fallback.source.startswith("test_explain.py:")
    assert sum(row.flops for row in explained.replicated) == explained.replicated_flops > 0
    assert "1 operator computed whole" in explained.summary()


def test_tokens_of_linear_attention_are_split_beside_the_text_they_attend_to():
    """No attention is distributed over them alone, so that they are no first choice."""
    inputs = {"image": torch.randn(1, 4, 32, 32), "step": torch.randn(1), "text": torch.randn(1, 60, 20)}
    explained = explain(research.LinearDiT().eval(), "ulysses=4", inputs)
    assert len(explained.functions) == 2, "all blocks are given the same"
    assert explained.work_ratio < 1.05


class FilmBlock(Block):
    """As it is, and a convolution over frames, rows and columns, which the tokens are one sequence of."""

    def __init__(self, width: int, grid: tuple[int, ...]) -> None:
        super().__init__(width, heads=4)
        self.grid, self.convolution = grid, nn.Conv3d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        x = super().forward(x, text)
        return x + self.convolution(x.transpose(1, 2).unflatten(2, self.grid)).flatten(2).transpose(1, 2)


class Film(nn.Module):
    """A video of three frames in, such blocks, tokens out."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patchify = nn.Conv3d(3, width, 1)
        self.blocks = nn.ModuleList(FilmBlock(width, (3, 6, 8)) for _ in range(2))

    def forward(self, video: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        x = self.patchify(video).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, text)
        return x


def test_a_grid_that_blocks_make_of_tokens_is_cut_along_a_side():
    """Quarters of all tokens end inside of frames, and three frames are none for a fourth rank."""
    inputs = {"video": torch.randn(1, 3, 3, 6, 8), "text": torch.randn(1, 5, 32)}
    explained = explain(Film().eval(), "ulysses=4", inputs)
    assert [row.text for row in explained.seeds] == ["[1, 32, 3, 6, 8] is laid out as [1, 32, 3, 6, 8/4]"]
    assert explained.work_ratio < 1.1
    assert [(t.kind, t.function) for t in explained.traffic if t.kind == "all_gather"] == [("all_gather", "main")]


def test_one_device_needs_no_other(painter):
    model, inputs = painter
    explained = explain(model, "ulysses=1", tuple(inputs[k] for k in ("image", "text")))
    assert explained.work_ratio == 1.0 and explained.local.sent == 0 and not explained.replicated
    assert {row.text for row in (*explained.attentions, *explained.convolutions)} == {"as it is"}


def test_a_model_without_weights_is_explained_alike(painter):
    _, inputs = painter
    with torch.device("meta"):
        model = Painter().eval()
    explained = explain(model, "ulysses=2", {k: t.to("meta") for k, t in inputs.items()})
    assert explained.local == explain(painter[0], "ulysses=2", inputs).local


def test_a_rank_or_an_input_that_is_not_there_is_refused(painter):
    model, inputs = painter
    with pytest.raises(SpecError, match="rank 2 is none of the 2 ranks"):
        explain(model, "ulysses=2", inputs, rank=2)
    with pytest.raises(XditError, match=r"do not fit Painter.forward.*'text'"):
        explain(model, "ulysses=2", {"image": inputs["image"]})


class Chain(nn.Module):
    """Peak of 512 bytes for 4 rows: 4 x 16 floats before and after the relu."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu().reshape(2, 2, 16).reshape(4, 16))


class Chains(nn.Module):
    """Blocks, which are captured as one function."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.chains = nn.Linear(8, 8), nn.ModuleList([Chain(), Chain()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        for chain in self.chains:
            x = chain(x)
        return x


class Halves(nn.Module):
    """4 x 16 floats live on while either half is in use: with two results of 4 x 8 that makes 512 bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.up(x).chunk(2, dim=-1)
        return a.exp() + b


@pytest.mark.parametrize(("model", "peak"), [
    (Chain(), 512),
    (Halves(), 512),
    (Chains(), 128 + 512),
], ids=["chain", "views", "blocks"])
def test_peak_of_activations(model, peak):
    """Inputs and parameters are the caller's and count as nothing; a block's input is its caller's result."""
    program = captured(model.eval(), (torch.ones(4, 8),), {})
    assert peak_activations(program) == peak


@pytest.mark.parametrize(("op", "arguments", "sent"), [
    (c10d.all_to_all_single.default, ([1, 2, 3], [2, 5, 1], "group"), 3 * 4 * 2),
    (c10d.all_gather_into_tensor.default, (3, "group"), 2 * 8 * 4 * 2),
    (c10d.all_reduce.default, ("sum", "group"), 2 * 2 * 8 * 4 * 2 // 3),
])
def test_bytes_of_a_collective(op, arguments, sent):
    """Rank 1 of 3, which holds (8, 4) halves."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    with FakeTensorMode():
        x.meta["val"] = torch.empty(8, 4, dtype=torch.bfloat16)
    assert bytes_sent(graph.call_function(op, (x, *arguments)), 3, 1) == sent


def test_units():
    assert [size(n) for n in (0, 999, 1000, 9_994, 9_996, 123_456, 999_999, 5e12)] == [
        "0 B", "999 B", "1.00 kB", "9.99 kB", "10.0 kB", "123 kB", "1.00 MB", "5.00 TB"]
    assert work(74.4e12) == "74.4 TFLOP"
