"""Artifacts: what is exported from a model runs in new processes without its code, and gives its numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
import zoo

import xdit_compile
from xdit_compile.structure import flatten

EXACT = 1e-5
MODELS = ("dit", "sd3", "flux", "wan", "cogvideox", "hunyuan_dit")
SPECS = ("ulysses=1", "ulysses=2", "ring=2", "cfg=2", "pipefusion=2,patches=2", "ulysses=2,ring=2",
         "cfg=2,ulysses=2", "cfg=2,pipefusion=2,patches=2", "pipefusion=2,patches=2,ulysses=2")
QUICK = {("dit", "ulysses=1"), ("sd3", "cfg=2,ulysses=2"), ("flux", "pipefusion=2,patches=2"), ("wan", "ring=2"),
         ("hunyuan_dit", "ulysses=2")}


def written(folder: Path, name: str, spec: str, **options: Any) -> None:
    """An artifact of a test model, with the arguments and results of the model as it is."""
    case = zoo.CASES[name]
    model, inputs = cases.made(case), case.inputs(2, False)
    included = "weights" in options
    xdit_compile.export(model, spec, inputs, folder / "model.xdit", **options)
    if not included:
        model.save_pretrained(folder / "weights")
    with torch.no_grad():
        results = flatten(model(**inputs))[0]
    torch.save({"inputs": inputs, "results": results, "options": {}}, folder / "call.pt")


def alone(folder: Path, world: int) -> dict[str, Any]:
    """What processes without diffusers make of the artifacts in ``folder``."""
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("alone.py")), str(folder), str(world)],
                          capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_artifacts_run_without_the_model_s_code(tmp_path: Path) -> None:
    for name, spec in sorted(QUICK):
        options = {"weights": "included"} if name in ("dit", "flux") else {}
        written(tmp_path / f"{name}-{spec}", name, spec, **options)
    found = alone(tmp_path, 4)
    assert found.keys() == {f"{name}-{spec}" for name, spec in QUICK}
    assert all(f["error"] <= EXACT for f in found.values()), found
    assert {f["returned"] for f in found.values()} == {"Result"}, "their classes are not there"
    assert found["wan-ring=2"]["class"] == "WanTransformer3DModel"


@pytest.mark.whole
@pytest.mark.parametrize("name", MODELS)
def test_all_specs(tmp_path: Path, name: str) -> None:
    for spec in SPECS:
        written(tmp_path / spec, name, spec)
    found = alone(tmp_path, 4)
    assert found.keys() == set(SPECS)
    assert all(f["error"] <= EXACT for f in found.values()), found
