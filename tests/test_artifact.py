"""Artifacts: what is exported from a model runs in new processes without its code, and gives its numbers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import artifact_runs
import cases
import hostile
import pipelines
import pytest
import torch
import zoo
from accelerate import init_empty_weights
from pool import Pool
from safetensors.torch import save_file
from test_pipelines import folders  # noqa: F401

import xdit_compile
from xdit_compile.cli import main as cli
from xdit_compile.errors import ArtifactError, CaptureError
from xdit_compile.ir.pytree import flatten

EXACT = 1e-5
MODELS = ("dit", "sd3", "flux", "wan", "cogvideox", "hunyuan_dit")
SPECS = ("ulysses=1", "ulysses=2", "ring=2", "cfg=2", "pipefusion=2,patches=2", "ulysses=2,ring=2",
         "cfg=2,ulysses=2", "cfg=2,pipefusion=2,patches=2", "pipefusion=2,patches=2,ulysses=2")
AHEAD = ("ulysses=1", "ulysses=2", "cfg=2,ring=2", "pipefusion=2,patches=2")
"""With functions compiled ahead, which takes 5 to 10 seconds for each."""
QUICK = {("sd3", "cfg=2,ulysses=2"), ("flux", "pipefusion=2,patches=2"), ("wan", "ring=2")}


def written(folder: Path, name: str, spec: str, batch: int = 2, **options: Any) -> None:
    """An artifact of a test model, with the arguments and results of the model as it is."""
    case = zoo.CASES[name]
    model, inputs = cases.made(case), case.inputs(batch, False)
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
        options = {"weights": "included"} if name == "flux" else {}
        written(tmp_path / f"{name}-{spec}", name, spec, **options)
    # A batch that cannot be cut: groups of ranks take turns in calls.
    written(tmp_path / "turns", "dit", "cfg=2", batch=1, weights="included")
    found = alone(tmp_path, 4)
    assert found.keys() == {f"{name}-{spec}" for name, spec in QUICK} | {"turns"}
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


def test_several_sizes_and_calls_that_fit_none(tmp_path: Path) -> None:
    case = zoo.CASES["sd3"]
    model, calls = cases.made(case), [case.inputs(1, False), case.inputs(2, True)]
    path = xdit_compile.export(model, "ulysses=1", calls, tmp_path / "model.xdit", weights="included")
    loaded = xdit_compile.load(path)
    for inputs in calls:
        with torch.no_grad():
            expected = model(**inputs)
            actual = loaded(**inputs)
        assert type(actual) is type(expected), "where the class of results is loaded, it is used"
        assert torch.allclose(actual[0], expected[0], atol=1e-5)
    assert len(xdit_compile.inspect(path).calls) == 2
    with pytest.raises(CaptureError, match=r"no program for this call.*tensor 0 is float32\[3, .*Export the model"):
        loaded(**case.inputs(3, False))
    with pytest.raises(CaptureError, match="other than tensors"):
        loaded(**calls[0], return_dict=False)
    with pytest.raises(TypeError, match="hidden_state"):
        loaded(hidden_state=calls[0]["hidden_states"])


def test_a_loaded_model_is_asked_as_the_original(good: Path) -> None:
    original, loaded = cases.made(zoo.CASES["dit"]), xdit_compile.load(good)
    assert loaded.config.sample_size == original.config.sample_size and loaded.config["patch_size"] == 2
    assert (loaded.dtype, loaded.device) == (torch.float32, torch.device("cpu"))
    theirs = original.state_dict()
    assert loaded.state_dict().keys() <= theirs.keys() and len(loaded.state_dict()) > 10
    assert all(torch.equal(t, theirs[n]) for n, t in loaded.state_dict().items())
    # Weights are the module's own: what is written into them acts.
    inputs = zoo.CASES["dit"].inputs(1, False)
    with torch.no_grad():
        before = loaded(**inputs)[0]
        name = next(n for n in loaded.state_dict() if n.endswith("proj_out_2.weight"))
        for model in (original, loaded):
            model.get_parameter(name).mul_(3.0)
        after, expected = loaded(**inputs)[0], original(**inputs)[0]
    assert not torch.allclose(before, after) and torch.allclose(after, expected, atol=1e-5)


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    case = zoo.CASES["dit"]
    model = cases.made(case)
    path = xdit_compile.export(model, "ulysses=1", case.inputs(1, False), tmp_path / "model.xdit")
    tensors = dict(model.state_dict())
    with pytest.raises(ArtifactError, match=r"does not include .*give weights=FOLDER"):
        xdit_compile.load(path)
    for changed, complaint in (
        ({n: t for n, t in tensors.items() if "proj_out_1.bias" not in n}, r"has no proj_out_1\.bias"),
        (tensors | {"proj_out_1.bias": torch.zeros(3)}, r"proj_out_1.bias is torch.float32\[3\] in"),
        ({n: t.bfloat16() for n, t in tensors.items()}, r"is torch.bfloat16\[.*exported with torch.float32"),
    ):
        save_file({n: t.clone() for n, t in changed.items()}, tmp_path / "weights.safetensors")
        with pytest.raises(ArtifactError, match=complaint):
            xdit_compile.load(path, tmp_path / "weights.safetensors")
    save_file(tensors, tmp_path / "weights.safetensors")
    with torch.no_grad():
        assert torch.allclose(xdit_compile.load(path, tmp_path / "weights.safetensors")(**case.inputs(1, False))[0],
                              model(**case.inputs(1, False))[0], atol=1e-5)


def test_what_artifacts_cannot_hold_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    case = zoo.CASES["flux2_cached"]
    with pytest.raises(ArtifactError, match=r"changes what is in its arguments|cannot be written"):
        xdit_compile.export(cases.made(case), "ulysses=1", case.inputs(1, False), tmp_path / "model.xdit")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "model.xdit").mkdir()
    (tmp_path / "model.xdit" / "precious").touch()
    case = zoo.CASES["dit"]
    for overwrite in (False, True):
        with pytest.raises(ArtifactError, match=r"is there already|is no artifact and will not be replaced"):
            xdit_compile.export(cases.made(case), "ulysses=1", case.inputs(1, False), tmp_path / "model.xdit",
                                overwrite=overwrite)
    assert (tmp_path / "model.xdit" / "precious").exists()


def test_a_model_without_weights_is_exported(tmp_path: Path) -> None:
    """On the meta device, as one that is larger than memory."""
    case = zoo.CASES["wan"]
    with init_empty_weights():
        empty = case.build().eval()
    path = xdit_compile.export(empty, "ulysses=1", case.inputs(1, False), tmp_path / "model.xdit")
    model = cases.made(case)
    model.save_pretrained(tmp_path / "weights")
    with torch.no_grad():
        actual = xdit_compile.load(path, tmp_path / "weights")(**case.inputs(1, False))[0]
        assert torch.allclose(actual, model(**case.inputs(1, False))[0], atol=1e-5)


def test_the_ranks_have_to_be_there(pool: Pool, tmp_path: Path) -> None:
    case = zoo.CASES["dit"]
    path = xdit_compile.export(cases.made(case), "ulysses=2", case.inputs(1, False), tmp_path / "model.xdit",
                               weights="included")
    for said in pool.run(artifact_runs.refused, str(path), 3, ranks=range(3)):
        assert "runs on 2 processes and no other number; 3 are there" in said
    with pytest.raises(ArtifactError, match="holds no compiled functions"):
        xdit_compile.load(path, native=True)


def test_values_that_the_model_reads_are_part_of_the_call(tmp_path: Path) -> None:
    """Lengths of text that become shapes: other lengths need another program."""
    case = zoo.CASES["qwen_image21_mask"]
    model, inputs = cases.made(case), case.inputs(1, True)
    path = xdit_compile.export(model, "ulysses=1", inputs, tmp_path / "model.xdit", weights="included")
    read = json.loads((path / "manifest.json").read_text())["calls"][0]["reads"]
    assert read, "this model reads a mask"
    loaded = xdit_compile.load(path)
    with torch.no_grad():
        assert torch.allclose(loaded(**inputs)[0], model(**inputs)[0], atol=1e-4)
    name = next(n for n in inputs if "mask" in n)
    other = inputs | {name: inputs[name].clone()}
    other[name][..., -2:] = 0
    assert not torch.equal(other[name], inputs[name])
    with pytest.raises(CaptureError, match="reads the values of tensor"):
        loaded(**other)


def test_a_pipeline_exported_by_the_command(folders: str, tmp_path: Path,  # noqa: F811
                                            capsys: pytest.CaptureFixture[str]) -> None:
    path = pipelines.folder("dit", Path(folders))
    out = tmp_path / "model.xdit"
    words = ["export", "--model", str(path), "--spec", "ulysses=1", "--weights", "included", "-o", str(out), "--arg"]
    assert cli.main([*words, "class_labels=[1]", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["world_size"] == 1 and said["calls"][0]["flops"] > 0
    assert cli.main([*words, "class_labels=[1]"]) == 2 and "is there already" in capsys.readouterr().err
    assert cli.main(["inspect", str(out), "--check-all"]) == 0
    assert "all hashes are right" in " ".join(capsys.readouterr().out.split())
    pipe = pipelines.load(path)

    def drawn() -> torch.Tensor:
        made = pipe([1], num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np")
        return torch.as_tensor(made.images)

    expected = drawn()
    pipe.transformer = xdit_compile.load(out)
    assert torch.allclose(drawn(), expected, atol=1e-5)
