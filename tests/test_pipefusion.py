"""PipeFusion on real processes: the numbers of the method as the paper has it, and what stages send and hold."""

from __future__ import annotations

from typing import Any

import displaced
import pipefusion_runs
import pytest
import torch
from cases import basic
from pool import Pool

from xdit_compile.spec import ShardingSpec

EXACT = 1e-5  # of the sample's scale, in float32, after eight steps

LAYERS = {"sd3": 5, "hunyuan_dit": 6, "hunyuan_dit_style": 6}
"""Blocks of a model that four stages share, where other than four (of its first kind)."""

CONTROLS = [
    (1, True, 0, ["pipefusion=2,patches={}", "pipefusion=3,patches={}"]),
    (1, False, 0, ["pipefusion=2,patches={},ulysses=2", "pipefusion=2,warmup=all,ulysses=2", "pipefusion=3,patches=1"]),
    (2, False, 0, ["pipefusion=2,patches={},warmup=2", "cfg=2,pipefusion=2,patches={}"]),
    (2, True, 4, ["pipefusion=4,patches={}"]),
]
"""Batch, whether sizes are odd, blocks if not the model's own number, specs with a place for the number of patches."""

QUICK = {("dit", 1), ("sd3", 3)}


def planned() -> list[Any]:
    """Each model meets all specs, with patches from 2 to 8 in turn."""
    plan = []
    for i, name in enumerate(displaced.MODELS):
        for j, (batch, odd, layers, templates) in enumerate(CONTROLS):
            for texts in ([templates] if j != 2 else [[t] for t in templates]):
                # Ranks that share out a patch need a row of tokens each, of which there are eight.
                specs = [t.format(2 + (2 * i + 3 * j + k) % (3 if "ulysses" in t else 7)) for k, t in enumerate(texts)]
                marks = [] if (name, j) in QUICK else [pytest.mark.whole]
                plan.append(pytest.param(name, batch, odd, LAYERS.get(name, layers) if layers else 0, specs,
                                         id=f"{name}-{batch}-{specs[0]}", marks=marks))
    return plan


def check(pool: Pool, name: str, batch: int, odd: bool, layers: int, specs: list[str]) -> None:
    world = max(ShardingSpec.parse(s).world_size for s in specs)
    seen = pool.run(pipefusion_runs.displaced_errors, name, batch, odd, specs, layers=layers, ranks=range(world),
                    timeout=300)
    for text in specs:
        spec, ranks = ShardingSpec.parse(text), [s[text] for s in seen if text in s]
        assert len(ranks) == spec.world_size
        first = ranks[0]
        assert first["error"] <= EXACT, (text, first["error"])
        assert all(torch.equal(r["sample"], first["sample"]) for r in ranks)
        assert (first["exact"] > EXACT) == bool(first["cut"]), "patches are displaced where they are asked for"
        assert len(first["cut"][0] if first["cut"] else (0, 1)) == spec.patches + 1
        assert all(r["drained"] == 0 for r in ranks)
        assert [b for stage in first["blocks"] for b in stage] == first["all blocks"] and all(first["blocks"])
        sent = [sum(r["sent"] for r in ranks if r["stage"] == stage) for stage in range(spec.pipefusion_degree)]
        assert sent == first["wanted"], text
        for r in ranks:
            assert r["extra"] == [], "parameters of other stages are given up"
            mine = tuple(f"{b}." for b in first["blocks"][r["stage"]])
            assert not any(n.startswith(mine) for n in r["whole"]), "and its own are not"


@pytest.mark.parametrize(("name", "batch", "odd", "layers", "specs"), planned())
def test_stages_give_the_numbers_of_displaced_patches(pool: Pool, name: str, batch: int, odd: bool, layers: int,
                                                      specs: list[str]) -> None:
    check(pool, name, batch, odd, layers, specs)


@pytest.mark.whole
@pytest.mark.parametrize("patches", range(2, 9))
@pytest.mark.parametrize("name", ["dit", "flux", "wan"])
def test_any_number_of_patches(pool: Pool, name: str, patches: int) -> None:
    check(pool, name, 1, patches % 2 == 0, 0, [f"pipefusion={2 + patches % 2},patches={patches}"])


def test_every_model_meets_every_number_of_stages() -> None:
    for name in displaced.MODELS:
        met = " ".join(s for p in planned() if p.values[0] == name for s in p.values[4])  # type: ignore[union-attr]
        assert all(word in met for word in ("pipefusion=2", "pipefusion=3", "pipefusion=4", "ulysses=2", "cfg=2",
                                            "warmup=all", "patches=1", "warmup=2"))
    assert set(basic(displaced.MODELS)) >= {"dit", "sd3", "flux", "hunyuan_dit", "sana", "wan", "ltx", "qwen_image"}
