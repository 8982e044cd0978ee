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

from tests import lockstep, models
from xdit_compile.compiler import compile_program
from xdit_compile.errors import SpecError, XditError
from xdit_compile.explain import Explanation, explain
from xdit_compile.frontend.cache import captured
from xdit_compile.program import Program
from xdit_compile.report.blame import arguments_of
from xdit_compile.report.costs import costs_of
from xdit_compile.report.inputs import call_arguments
from xdit_compile.report.memory import peak_activations
from xdit_compile.report.operations import program_flops
from xdit_compile.report.traffic import bytes_sent
from xdit_compile.report.units import size, work
from xdit_compile.spec import ShardingSpec
from xdit_compile.structure import flatten

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
    for fact in ("rank 3 of 4", "usp: queries", "context_embedder", "all_to_all", "Computed whole by every rank",
                 "single_transformer_blocks x3", size(explained.local.sent), work(explained.local.flops)):
        assert fact in text
    assert max(map(len, text.splitlines())) <= 120
    assert "\n" not in explained.summary() and "ulysses=2,ring=2" in explained.summary()
    assert json.loads(json.dumps(said)) == said
    assert said["costs"]["bytes_sent"] == sum(c["times"] * c["size"] for c in said["collectives"])


class Block(nn.Module):
    """Self attention, cross attention to a text, and an operator nobody has a rule for."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.q, self.kv = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Linear(width, 2 * width)

    def _split(self, x: torch.Tensor, parts: int) -> Sequence[torch.Tensor]:
        return x.unflatten(-1, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        x = x + F.scaled_dot_product_attention(*self._split(self.qkv(x), 3)).transpose(1, 2).flatten(2)
        (q,), (k, v) = self._split(self.q(x), 1), self._split(self.kv(text), 2)
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Painter(nn.Module):
    """Patches of an image in, blocks, a convolution over the image out."""

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
        x = torch.linalg.vector_norm(x, 3, dim=1, keepdim=True) + x
        return self.smooth(x.transpose(1, 2).reshape(shape))


@pytest.fixture(scope="module")
def painter() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    return Painter().eval(), {"text": torch.randn(2, 5, 16), "image": torch.randn(2, 3, 16, 12)}


def _compiled(model: nn.Module, inputs: dict[str, Any], spec: str) -> tuple[Program, list[Program], list[torch.Tensor]]:
    """The global program, every rank's, and the tensors of the call."""
    args, kwargs = call_arguments(model, inputs)
    parsed = ShardingSpec.parse(spec)
    ranks = [compile_program(captured(model, args, kwargs), parsed, rank) for rank in range(parsed.world_size)]
    return ranks[0].whole, [r.local for r in ranks], flatten((args, kwargs))[0]


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
