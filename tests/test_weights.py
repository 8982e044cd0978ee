"""Weights that no process has whole: each rank reads the tensors of its stage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cases
import displaced
import pytest
import torch
import weight_runs
from accelerate import init_empty_weights
from marks import whole
from safetensors.torch import load_file, save_file

from xdit_compile import XditError
from xdit_compile.driver.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Flux in several files and an index, as diffusers saves large models."""
    path = tmp_path_factory.mktemp("weights")
    cases.made(displaced.MODELS["flux"].case).save_pretrained(path, max_shard_size="400KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def meta() -> torch.nn.Module:
    with init_empty_weights():
        return displaced.MODELS["flux"].case.build().eval()


@pytest.mark.parametrize("spec", ["pipefusion=2,patches=2", whole("ulysses=2")])
def test_stages_read_what_they_use(pool, folder: Path, spec: str) -> None:
    found = pool.run(weight_runs.from_files, "flux", str(folder), spec, ranks=range(2))
    assert max(f["difference"] for f in found) < 1e-6
    every = found[0]["all"]
    # What lies outside all blocks stays in a model that had it in memory, whether its stage uses it or not.
    assert all(f["read"] <= f["held"] <= 1.05 * f["read"] for f in found)
    if "pipefusion" in spec:
        assert sum(f["read"] for f in found) >= every and all(f["read"] < 0.75 * every for f in found)
    else:
        assert all(f["read"] == every for f in found)


def test_one_file_and_a_folder_with_one(folder: Path, tmp_path: Path) -> None:
    tensors = {n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}
    save_file(tensors, tmp_path / "all.safetensors")
    for source in (tmp_path, tmp_path / "all.safetensors", folder):
        model = meta()
        Checkpoint.at(source).load(model, {"proj_out.weight"}, torch.device("cpu"))
        assert torch.equal(model.proj_out.weight, tensors["proj_out.weight"])
        assert model.proj_out.bias.is_meta


def test_what_is_missing_or_does_not_fit_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(XditError, match="holds nothing"):
        Checkpoint.at(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (index,) = copy.glob("*.index.json")
    listed = json.loads(index.read_text())
    del listed["weight_map"]["proj_out.bias"]
    index.write_text(json.dumps(listed))
    with pytest.raises(XditError, match=r"has no proj_out\.bias"):
        Checkpoint.at(copy).load(meta(), {"proj_out.bias"}, torch.device("cpu"))
    listed["weight_map"]["proj_out.bias"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(listed))
    with pytest.raises(XditError, match="not beside it"):
        Checkpoint.at(copy)
    save_file({"proj_out.bias": torch.zeros(3)}, tmp_path / "wrong.safetensors")
    with pytest.raises(XditError, match=r"proj_out.bias is \[3\] in .* and \[16\] in the model"):
        Checkpoint.at(tmp_path / "wrong.safetensors").load(meta(), {"proj_out.bias"}, torch.device("cpu"))
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "wrong.safetensors").read_bytes()[:40])
    with pytest.raises(XditError, match=r"cannot read .*torn"):
        Checkpoint.at(tmp_path / "torn.safetensors")


def test_a_model_without_weights_is_refused(pool) -> None:
    (error, _) = pool.run(weight_runs.without, "flux", "pipefusion=2,patches=3", ranks=range(2))
    assert "on the meta device: give parallelize weights=FOLDER" in error
