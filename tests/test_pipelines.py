"""Whole pipelines on several processes: the latents of one, with the pipeline's own code untouched."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pipeline_runs
import pipelines
import pytest
from pool import Pool
from torch import nn

EXACT = 1e-4  # of the largest value, after six steps in float32

QUICK = ["dit"]
"""The others run in the whole tests."""
SHARED = ["dit", "ltx"]

ALONE = ["hunyuan_video15"]
"""Diffusers itself does not make two videos of one prompt."""


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where test pipelines are written, each by the first test that needs it."""
    return str(tmp_path_factory.mktemp("pipelines"))


def differences(pool: Pool, name: str, folders: str, specs: list[str], **overrides: Any) -> dict[str, list[Any]]:
    """By spec, what each rank found."""
    pipelines.folder(name, Path(folders))
    seen = pool.run(pipeline_runs.differences, name, folders, specs, timeout=300, **overrides)
    return {spec: [rank[spec] for rank in seen if spec in rank] for spec in specs}


def marked(names: Any, quick: list[str]) -> list[Any]:
    return [pytest.param(n, marks=[] if n in quick else pytest.mark.whole) for n in names]


@pytest.mark.parametrize("name", marked(pipelines.PIPELINES, QUICK))
def test_guidance_on_two_groups_of_ranks(pool: Pool, name: str, folders: str) -> None:
    found = differences(pool, name, folders, ["cfg=2", "cfg=2,ulysses=2"])
    case = pipelines.PIPELINES[name]
    for ranks in found.values():
        assert all(r["error"] <= EXACT for r in ranks)
        if case.guidance in ("twice", "thrice"):
            # One exchange per step, for all the calls of that step: they ran at once.
            assert [r["fetched"] for r in ranks] == [Counter(map(len, case.batches))] * len(ranks)


def test_a_result_used_at_once_gains_nothing_and_says_so(pool: Pool, folders: str) -> None:
    first, second = differences(pool, "flux", folders, ["cfg=2"])["cfg=2"]
    assert first["error"] == second["error"] == 0.0
    assert "gained nothing" in first["warnings"][0] and second["warnings"] == []


@pytest.mark.parametrize("name", marked((n for n in pipelines.PIPELINES if n not in ALONE), SHARED))
def test_prompts_shared_out(pool: Pool, name: str, folders: str) -> None:
    found = differences(pool, name, folders, ["data=2"], copies=3 if name == "dit" else 2)
    assert all(r["error"] <= EXACT for r in found["data=2"])


@pytest.mark.whole
def test_the_trained_example_draws_the_same_pictures(pool: Pool) -> None:
    specs = ["cfg=2", "cfg=2,ulysses=2", "data=2", "cfg=2,vae=2"]
    for rank in pool.run(pipeline_runs.shapes, specs, 10, timeout=300):
        assert all(decibels >= 60 for decibels in rank.values())


def test_the_report_says_what_each_component_does(pool: Pool, folders: str) -> None:
    pipelines.folder("flux_true", Path(folders))
    report, _ = pool.run(pipeline_runs.reported, "flux_true", folders, "cfg=2,vae=2", ranks=range(2), timeout=300)
    parts = {p["component"]: p for p in report["parts"]}
    assert "in turns by 2 groups" in parts["transformer"]["what"] and parts["transformer"]["sent"] == 0
    assert parts["vae"]["what"].startswith("decode: shared out by ring=2")
    assert parts["vae"]["activations"] < 0.75 * parts["vae"]["whole_activations"]
    assert parts["text_encoder"]["what"] == "whole on every rank, as it is"
    assert report["fetched"] == {"2": 6} and report["sent"] > 0


def test_the_report_says_what_memory_each_component_takes(pool: Pool, folders: str) -> None:
    whole = pipelines.load(pipelines.folder("dit", Path(folders)))
    modules = {n: m for n, m in whole.components.items() if isinstance(m, nn.Module)}
    nbytes = {n: sum(p.nbytes for p in m.parameters()) for n, m in modules.items()}
    for report in pool.run(pipeline_runs.reported, "dit", folders, "ulysses=2,shard=2", ranks=range(2), timeout=300):
        found = {m["component"]: m["memory"] for m in report["memory"]}
        assert found.keys() == nbytes.keys()
        assert 0.48 * nbytes["transformer"] < found["transformer"]["weights"] < 0.55 * nbytes["transformer"]
        assert found["vae"]["weights"] >= nbytes["vae"]
        of = found["transformer"]
        assert 0 < of["gathered"] < nbytes["transformer"] and of["activations"] and of["arguments"]
        both = report["memory_of_all"]
        assert both["device"] == of["weights"] + found["vae"]["weights"] + sum(
            of[k] for k in ("gathered", "activations", "exchanged", "kept", "arguments"))
