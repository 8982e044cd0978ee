"""Stages and patches of any DiT, one after the other in one process, and what is said about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import cases
import displaced
import pytest
import stagewise
import torch
import zoo
from torch import nn

import xdit_compile
from xdit_compile.cli.main import main
from xdit_compile.spec import ShardingSpec

QUICK = ("chroma", "hidream", "latte", "prx")
"""Of other kinds than those that run on real processes."""


def chosen() -> list[Any]:
    return [pytest.param(n, marks=() if n in QUICK else pytest.mark.whole) for n in zoo.CASES]


@pytest.mark.parametrize("spec", ["pipefusion=2,patches=3", "pipefusion=2,tensor=2,warmup=all"])
@pytest.mark.parametrize("name", chosen())
def test_stages_and_patches_give_the_numbers_of_one_device(name: str, spec: str) -> None:
    """An exact step; and patches that read what an equal step has left. Or a refusal that says why."""
    case = zoo.CASES[name]
    try:
        found = stagewise.emulate(case, 2, True, spec)
    except xdit_compile.SpecError as refusal:
        assert name not in QUICK
        reasons = "blocks to share out", "patches", "writes into its arguments", "no cut of any"
        assert any(word in str(refusal) for word in reasons)
        return
    assert found.exact <= case.tolerance and found.patched <= case.tolerance, found


def explained(name: str, spec: str) -> Any:
    entry = displaced.MODELS[name]
    return xdit_compile.explain(cases.made(entry.case), spec, entry.case.inputs(1, False))


def test_stages_are_explained() -> None:
    e = explained("sd3", "pipefusion=3,patches=4,ulysses=2")
    stages = e.stages
    assert stages is not None and len(stages.stages) == 3
    assert [s.blocks for s in stages.stages] == [(f"transformer_blocks.{i}",) for i in range(3)]
    # 32 image tokens and 8 of text, 64 wide, fp32; half on each of two ranks.
    assert [stages.sent(rank) for rank in (0, 2, 4)] == [40 * 64 * 4 // 2, 40 * 64 * 4 // 2, 0]
    # Keys and values of one block, of all tokens and half of the heads.
    assert stages.stages[1].kept == 2 * 40 * 64 * 4 // 2
    total = sum(s.flops for s in stages.stages) * 2
    assert total == pytest.approx(e.whole.flops, rel=0.05)
    text = str(e)
    assert "to later stages" in text and "transformer_blocks.1" in text and "2@1" in text
    assert json.loads(json.dumps(e.to_dict()))["stages"]["edges"]


def test_blocks_are_shared_out_by_work_or_as_told() -> None:
    entry = displaced.MODELS["flux"]  # 3 blocks with two streams, and 3 with one, which have half the work on text
    by_work = explained("flux", "pipefusion=2").stages
    told = explained("flux", "pipefusion=2,stage_blocks=1+5").stages
    assert by_work is not None and told is not None and entry
    assert [len(s.blocks) for s in told.stages] == [1, 5]
    spread = [max(s.flops for s in stages.stages) for stages in (by_work, told)]
    assert spread[0] < spread[1]


def test_what_is_alike_for_all_patches_is_computed_once() -> None:
    """Of PixArt: keys and values of the text, and its projection, and modulations."""
    e = explained("pixart_sigma", "pipefusion=2,patches=4")
    assert e.stages is not None
    assert min(s.once for s in e.stages.stages) > 0
    assert sum(s.flops for s in e.stages.stages) < 1.02 * e.whole.flops


def test_a_picture_of_the_schedule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = f"{Path(__file__).with_name('explained_stages.py')}:dit"
    picture = tmp_path / "stages.svg"
    assert main(["explain", target, "--spec", "pipefusion=2,patches=4", "--timeline", str(picture)]) == 0
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")
    assert main(["explain", target, "--spec", "ulysses=2", "--timeline", str(tmp_path / "none.svg")]) == 2
    assert "add pipefusion=2" in capsys.readouterr().err


class Skipping(nn.Module):
    """A U: what the first blocks leave is added in the last ones."""

    def __init__(self) -> None:
        super().__init__()
        from calls import Block

        self.blocks = nn.ModuleList(Block(24, 4, 0.0) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left = []
        for i, block in enumerate(self.blocks):
            x = block(x + left.pop() if i > 3 else x)
            if i < 2:
                left.append(x)
        return x


def test_long_skips_go_to_their_stage() -> None:
    e = xdit_compile.explain(Skipping().eval(), "pipefusion=3,patches=4", {"x": torch.randn(1, 12, 24)})
    assert e.stages is not None
    edges = [(i.source, i.target, i.name, sum(i.nbytes)) for i in e.stages.edges if i.name != "result"]
    one = 12 * 24 * 4
    # What block 1 left is added where block 3 ran, so that its sum goes on in place of two values.
    assert sorted(edges) == [(0, 1, "hidden", one), (0, 2, "skip", one), (1, 2, "hidden", one)]


def test_the_schedule_of_an_exact_pipeline_has_no_overlap() -> None:
    stages = explained("dit", "pipefusion=3,warmup=all").stages
    assert stages is not None and ShardingSpec.parse("pipefusion=3,warmup=all").patches == 1
    assert stages.timeline(4, 1e9, 1e12).bubble() == pytest.approx(2 / 3, abs=0.02)
