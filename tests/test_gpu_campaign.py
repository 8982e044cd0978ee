"""The campaign for one GPU, rehearsed: parts that fail, time that is over, the report and its section of the page."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import compiled_runs
import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from gpu_parts import models, page
from gpu_parts.campaign import PARTS, Options, Part, campaign
from gpu_parts.local import copying

import xdit_compile
from xdit_compile.driver.compile_call import compile_call
from xdit_compile.ir.program import is_collective
from xdit_compile.runtime.execution.executor import Executor
from xdit_compile.spec import ShardingSpec

REPOSITORY = Path(__file__).resolve().parents[1]
PLACE = f"# Page\n\nbefore\n\n{page.BEGIN}\nof before\n{page.END}\n\nafter\n"


def rehearsed(folder: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, report and page of the command."""
    written = folder / "page.md"
    written.write_text(PLACE)
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "gpu.py"), "--device", "cpu", "--tiny", *arguments,
               "--output", str(folder / "gpu.json"), "--write", str(written)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550)
    assert (folder / "gpu.json").exists(), done.stderr[-3000:]
    assert {p.name for p in folder.iterdir()} == {"gpu.json", "page.md"}, "drafts are left"
    return done.returncode, json.loads((folder / "gpu.json").read_text()), written.read_text()


def test_the_cheapest_parts_are_rehearsed(tmp_path: Path) -> None:
    code, report, text = rehearsed(tmp_path, "--own", "--parts", "checks", "local")
    assert code == 0 and report["rehearsal"] and report["machine"]["torch"] == torch.__version__
    checks, local = report["parts"]["checks"], report["parts"]["local"]
    assert checks["status"] == local["status"] == "ok"
    assert checks["figures"]["artifact"]["difference"] <= 2e-5
    assert set(checks["figures"]["kernels"]["torch"]["worst"]) == {"torch.float32", "torch.float16", "torch.bfloat16"}
    assert {n: f["ranks"] for n, f in local["figures"].items() if n != "model"} == {
        "ulysses=1": 1, "ulysses=2": 2, "ulysses=4": 4, "ulysses=8": 8}
    flops = {f["ranks"]: f["flops"] for n, f in local["figures"].items() if n != "model"}
    assert all(flops[n] * n < 1.1 * flops[1] for n in (2, 4, 8)), flops
    assert text.startswith("# Page\n\nbefore\n") and text.endswith("\n\nafter\n") and "of before" not in text
    assert "A rehearsal" in text and "| `ulysses=8` | 8 |" in text and "| checks | " in text


@pytest.mark.whole
def test_all_of_it_is_rehearsed(tmp_path: Path) -> None:
    code, report, _ = rehearsed(tmp_path)
    assert code == 0 and {p["status"] for p in report["parts"].values()} == {"ok"}, report
    assert report["parts"].keys() == PARTS.keys()
    figures = {name: part["figures"] for name, part in report["parts"].items()}
    for way in ("ours", "eager", "plain", "whole"):
        assert figures["flux"][way]["step_ms"] > 0 and figures["wan"][way]["host_ms"] > 0
    assert max(figures["flux"]["difference"].values()) <= 1e-5
    assert all(figures["ranks"][spec]["difference"] <= 2e-5 for spec in ("ulysses=2", "ring=2", "cfg=2"))
    assert set(figures["graphs"]) >= {"off", "on"} and figures["compiling"]["native"]["difference"] <= 2e-5


def test_parts_that_fail_die_or_hang_say_so_and_the_others_go_on() -> None:
    limits = {"fails": 600.0, "dies": 600.0, "hangs": 1.0, "works": 600.0}
    parts = {name: Part("gpu_faults", name, name, 0, most) for name, most in limits.items()}
    kept: list[str] = []
    report = campaign(parts, Options("cpu", False, True, time.time() + 500), lambda r: kept.append(json.dumps(r)))
    found = report["parts"]
    assert {name: part["status"] for name, part in found.items()} == {
        "fails": "error", "dies": "error", "hangs": "skipped", "works": "ok"}
    assert found["fails"]["error"] == "ValueError: on purpose" and found["fails"]["figures"]["before"] == 1
    assert found["fails"]["figures"]["inside"]["error"].startswith("ZeroDivisionError")
    assert found["dies"]["error"].endswith("exit code 7") and found["dies"]["figures"] == {"before": 2}
    assert found["hangs"]["figures"] == {"before": 3} and found["hangs"]["reason"] == "not done in 1 s"
    assert "skipped" in found["works"]["figures"]["needs time"] and found["works"]["figures"]["after"] == 4
    assert len(kept) == 5 and json.loads(kept[-1]) == report
    text = page.section(report)
    assert "on purpose" in text and "exit code 7" in text and "not done in 1 s" in text


def test_where_no_time_is_left_nothing_is_begun() -> None:
    report = campaign(PARTS, Options("cpu", True, True, time.time() - 1), lambda report: None)
    assert {p["status"] for p in report["parts"].values()} == {"skipped"}
    assert "the time was over" in page.section(report)


@pytest.mark.parametrize("text", ["", page.BEGIN, f"{page.END} {page.BEGIN}", PLACE + page.BEGIN])
def test_a_page_without_a_place_is_left_alone(text: str) -> None:
    with pytest.raises(ValueError, match="no place"):
        page.replaced(text, "new")


def test_the_performance_page_has_a_place() -> None:
    text = (REPOSITORY / "docs" / "performance.md").read_text()
    assert "new" in page.replaced(text, "new")


@pytest.mark.parametrize("spec", ["ulysses=2", "ring=3", "ulysses=2,ring=2"])
def test_a_rank_s_program_runs_alone_on_as_many_bytes(spec: str) -> None:
    model = compiled_runs.deep(2)
    args, kwargs = compiled_runs.arguments(model)  # 17 tokens: uneven shares
    for rank in range(ShardingSpec.parse(spec).world_size):
        local = compile_call(model, ShardingSpec.parse(f"{spec},keep=off"), args, kwargs, rank).body
        alone = copying(local)
        assert any(is_collective(n) for _, m in local.functions() for n in m.graph.nodes)
        assert not any(is_collective(n) for _, m in alone.functions() for n in m.graph.nodes)
        (out,) = Executor(alone, model)(list(compiled_runs.inputs().values()))
        assert out.shape == model(**compiled_runs.inputs()).shape


@pytest.mark.whole
def test_own_models_cost_what_those_of_diffusers_cost() -> None:
    for make, size in ((models.image_model, models.FLUX), (models.video_model, models.WAN)):
        costs = []
        for own in (True, False):
            found = make(size, "meta", torch.bfloat16, own)
            explained = xdit_compile.explain(found.model, "ulysses=8", found.inputs)
            assert explained.work_ratio < 1.02 and not explained.fallbacks
            assert found.name == ("own model of the same size" if own else "diffusers")
            parameters = sum(p.numel() for p in found.model.parameters())
            costs.append((explained.whole.flops, explained.local.sent, parameters))
        assert all(abs(a / b - 1) < 0.03 for a, b in zip(*costs, strict=True)), costs
    models.forget()
