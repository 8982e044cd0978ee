"""Artifacts: what is exported from a model runs in new processes without its code, and gives its numbers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cases
import hostile
import pytest
import torch
import zoo

import xdit_compile
from xdit_compile.errors import ArtifactError
from xdit_compile.structure import flatten

EXACT = 1e-5
MODELS = ("dit", "sd3", "flux", "wan", "cogvideox", "hunyuan_dit")
SPECS = ("ulysses=1", "ulysses=2", "ring=2", "cfg=2", "pipefusion=2,patches=2", "ulysses=2,ring=2",
         "cfg=2,ulysses=2", "cfg=2,pipefusion=2,patches=2", "pipefusion=2,patches=2,ulysses=2")
AHEAD = ("ulysses=1", "ulysses=2", "cfg=2,ring=2", "pipefusion=2,patches=2")
"""With functions compiled ahead, which takes 5 to 10 seconds for each."""
QUICK = {("dit", "ulysses=1"), ("sd3", "cfg=2,ulysses=2"), ("flux", "pipefusion=2,patches=2"), ("wan", "ring=2"),
         ("hunyuan_dit", "ulysses=2")}


def written(folder: Path, name: str, spec: str, **options: Any) -> None:
    """An artifact of a test model, with the arguments and results of the model as it is."""
    case = zoo.CASES[name]
    model, inputs = cases.made(case), case.inputs(2, False)
    included, native = "weights" in options, options.get("native", False)
    xdit_compile.export(model, spec, inputs, folder / "model.xdit", **options)
    if not included:
        model.save_pretrained(folder / "weights")
    with torch.no_grad():
        results = flatten(model(**inputs))[0]
    torch.save({"inputs": inputs, "results": results, "options": {"native": native}}, folder / "call.pt")


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


def test_functions_compiled_ahead(tmp_path: Path) -> None:
    written(tmp_path / "dit", "dit", "ulysses=2", native=True)
    found = alone(tmp_path, 2)
    assert found["dit"]["error"] <= EXACT


@pytest.mark.whole
@pytest.mark.timeout(2000)
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_all_specs(tmp_path: Path, name: str, native: bool) -> None:
    specs = AHEAD if native else SPECS
    for spec in specs:
        written(tmp_path / spec, name, spec, native=native)
    found = alone(tmp_path, 4)
    assert found.keys() == set(specs)
    assert all(f["error"] <= EXACT for f in found.values()), found


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with its weights, for one process."""
    path = tmp_path_factory.mktemp("artifact") / "model.xdit"
    case = zoo.CASES["dit"]
    return xdit_compile.export(cases.made(case), "ulysses=1", case.inputs(1, False), path, weights="included")


@pytest.mark.parametrize("name", hostile.SPOILED)
def test_spoiled_files_are_refused_and_nothing_runs(good: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.xdit"
    shutil.copytree(good, path)
    spoil, complaint = hostile.SPOILED[name]
    spoil(path)
    with pytest.raises(ArtifactError, match=complaint):
        xdit_compile.load(path)
    assert hostile.MARK not in os.environ


def test_weights_are_compared_when_asked(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.xdit"
    shutil.copytree(good, path)
    (file,) = path.glob("stage-0.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    assert not xdit_compile.inspect(path).checked
    with pytest.raises(ArtifactError, match="does not have the hash"):
        xdit_compile.inspect(path, check_all=True)
