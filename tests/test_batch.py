"""Batches shared out among ranks (cfg, data), alone and with sequence parallelism: the numbers of one device."""

from __future__ import annotations

import re

import pytest
import torch
import zoo
from cases import made
from emulation import emulate
from marks import whole
from pool import Pool
from test_exactness import EXACT, run

from xdit_compile import explain

CASES = ["dit", "pixart_sigma", "sd3", "flux", "hunyuan_dit", "latte", "wan", "qwen_image", "lumina2", "fused"]
"""Joint and cross attention, masks, frames folded into the batch, a mask that is read, a model from nobody."""


SPECS = [("cfg=2", 2), ("data=2", 3), ("cfg=2,ulysses=2", 2), ("data=2,ring=2", 2)]


@pytest.mark.parametrize(("name", "spec", "batch"), [
    pytest.param(name, *chosen, marks=[] if (i + j) % 4 == 0 else pytest.mark.whole)
    for i, name in enumerate(CASES) for j, chosen in enumerate(SPECS)])
def test_ranks_together_give_the_numbers_of_one(name: str, spec: str, batch: int) -> None:
    found = emulate(zoo.CASES[name], batch, True, spec)
    assert found.error <= zoo.CASES[name].tolerance
    wanted = re.findall("ulysses|ring", spec)
    assert found.methods == set(wanted)


def test_heads_that_are_one_dimension_with_the_batch() -> None:
    found = emulate(zoo.CASES["t5_film"], 2, False, "cfg=2,ulysses=2")
    assert found.error <= EXACT and found.methods == {"ulysses"}


@pytest.mark.parametrize("name", ["dit", whole("flux")])
def test_on_real_processes(pool: Pool, name: str) -> None:
    for ranks in run(pool, name, 2, True, ["cfg=2", "cfg=2,ulysses=2", "data=2,ring=2"]).values():
        assert all(rank["error"] <= EXACT for rank in ranks)


def test_a_shared_batch_is_all_that_travels() -> None:
    """Half the work for each of two ranks, one gather of the result, nothing within blocks."""
    model, inputs = made(zoo.CASES["dit"]), zoo.CASES["dit"].inputs(2, False)
    explained = explain(model, "cfg=2", inputs)
    assert explained.work_ratio == pytest.approx(1.0)
    with torch.no_grad():
        (result,) = model(**inputs, return_dict=False)
    assert [c.kind for c in explained.local.collectives] == ["all_gather"]
    assert explained.local.sent == result.numel() * result.element_size() // 2


def test_as_many_text_tokens_as_pairs_of_samples() -> None:
    """Eight, whose places are taken for parts of the batch, beside those of the image, which are not."""
    found = emulate(zoo.CASES["flux"], 2, False, "cfg=2,ulysses=2")
    assert found.error <= zoo.CASES["flux"].tolerance
