"""Artifacts: what is exported from a model runs in new processes without its code, and gives its numbers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import artifact_runs
import calls
import cases
import hostile
import pipelines
import pytest
import torch
import zoo
from accelerate import init_empty_weights
from marks import whole
from pool import Pool
from safetensors.torch import load_file, save, save_file
from test_pipelines import folders  # noqa: F401
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import xdit_compile
from xdit_compile.artifact.checks import before
from xdit_compile.artifact.files import ArtifactFolder
from xdit_compile.artifact.graph_reader import Setting, decode
from xdit_compile.artifact.graph_writer import encode
from xdit_compile.artifact.load import ArtifactLoader
from xdit_compile.artifact.permissions import KINDS, operator_named, permissions
from xdit_compile.artifact.running import Running
from xdit_compile.cli import main as cli
from xdit_compile.errors import ArtifactError, CaptureError, SpecError
from xdit_compile.ir.pytree import flatten
from xdit_compile.kernels.base import KernelUnavailable
from xdit_compile.report.units import size

EXACT = 1e-5
MODELS = ("dit", "sd3", "flux", "wan", "cogvideox", "hunyuan_dit")
SPECS = ("ulysses=1", "ulysses=2", "ring=2", "cfg=2", "pipefusion=2,patches=2", "ulysses=2,ring=2",
         "cfg=2,ulysses=2", "cfg=2,pipefusion=2,patches=2", "pipefusion=2,patches=2,ulysses=2")
AHEAD = ("ulysses=1", "ulysses=2", "cfg=2,ring=2", "pipefusion=2,patches=2")
"""With functions compiled ahead, which takes 5 to 10 seconds for each."""
QUICK = {("wan", "ring=2"), ("dit", "pipefusion=2,patches=2")}


def written(folder: Path, name: str, spec: str, batch: int = 2, **options: Any) -> None:
    """An artifact of a test model, with the arguments and results of the model as it is."""
    case = zoo.CASES[name]
    write(folder, cases.made(case), case.inputs(batch, False), spec, **options)


def write(folder: Path, model: nn.Module, inputs: dict[str, Any], spec: str, example: dict[str, Any] | None = None,
          **options: Any) -> None:
    included, native = "weights" in options, options.get("native", False)
    xdit_compile.export(model, spec, example or inputs, folder / "model.xdit", **options)
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


@pytest.mark.parametrize("spec", ["ulysses=2", whole("tensor=2"), whole("ulysses=2,shard=2")])
def test_functions_compiled_ahead(tmp_path: Path, spec: str) -> None:
    (tmp_path / "block").mkdir()
    block = calls.Block(16, 4, 0.0).requires_grad_(False).eval()
    # Exported with one sample expanded to two, called with two.
    example = {"x": torch.randn(1, 12, 16).expand(2, 12, 16)}
    write(tmp_path / "block", block, {"x": torch.randn(2, 12, 16)}, spec, example,
          native=True, weights="included")
    found = alone(tmp_path, 2)
    assert found["block"]["error"] <= EXACT


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


def test_settings_of_the_caller_are_part_of_a_call(tmp_path: Path) -> None:
    """Each of them, at the export and at the call: the model's own answer, or a refusal that names it."""
    def half() -> Any:
        return torch.autocast("cpu", torch.bfloat16)

    @contextmanager
    def double() -> Iterator[None]:
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inside(x) * torch.ones(8) / 3

    model, x = Model().eval().requires_grad_(False), torch.randn(2, 3, 8)
    settings: dict[str, Callable[[], Any]] = {
        "nothing": nullcontext, "autocast": half, "default type": double, "both": lambda: both(half(), double())}

    @contextmanager
    def both(*contexts: Any) -> Iterator[None]:
        with contexts[0], contexts[1]:
            yield

    for name, setting in settings.items():
        with setting():
            xdit_compile.export(model, "ulysses=1", {"x": x}, tmp_path / name, weights="included")
            loaded = xdit_compile.load(tmp_path / name)
        for other, around in settings.items():
            with around():
                if other != name:
                    with pytest.raises(CaptureError, match="was exported under default type"):
                        loaded(x)
                    continue
                found, expected = loaded(x), model(x)
            assert found.dtype == expected.dtype and torch.allclose(found, expected)


EDITS: dict[str, Callable[[nn.Module], Any]] = {
    "a hook inside": lambda m: m.norm1.register_forward_hook(lambda *_: None),
    "a hook before, inside": lambda m: m.norm1.register_forward_pre_hook(lambda *_: None),
    "a forward inside": lambda m: setattr(m.norm1, "forward", m.forward),
    "an attribute": lambda m: setattr(m, "heads", 2),
    "an attribute inside": lambda m: setattr(m.norm1, "eps", 1.0),
    "a module less": lambda m: delattr(m, "norm1"),
    "a module around another": lambda m: setattr(m, "norm1", nn.Sequential(m.norm1)),
    "a parameter less": lambda m: delattr(m.norm1, "weight"),
}


@pytest.mark.parametrize("name", EDITS)
def test_edits_of_a_model_without_code_are_refused(block: Path, name: str) -> None:
    loaded = xdit_compile.load(block)
    with pytest.raises(ArtifactError, match=r"has no code of its modules|is gone that its programs read"):
        EDITS[name](loaded)
        loaded(torch.randn(2, 12, 16))


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = calls.Block(16, 4, 0.0).requires_grad_(False).eval()
    path: Path = tmp_path_factory.mktemp("block") / "model.xdit"
    xdit_compile.export(model, "ulysses=1", {"x": torch.randn(2, 12, 16)}, path, weights="included")
    return path


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


class Labelled(nn.Module):
    """Label embeddings enter with the sample alone: nothing is left to be computed once per step."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.enter, self.labels, self.leave = nn.Linear(8, width), nn.Embedding(10, width), nn.Linear(width, 8)
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(width, 2, 64, 0.0, batch_first=True) for _ in range(2)])

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.enter(hidden_states) + self.labels(labels)[:, None]
        for block in self.blocks:
            x = block(x)
        return self.leave(x)


def labelled(label: int = 3) -> dict[str, torch.Tensor]:
    return {"hidden_states": torch.linspace(-1, 1, 128).reshape(1, 16, 8), "timestep": torch.ones(1),
            "labels": torch.tensor([label])}


def test_stages_with_nothing_to_do_once_per_step(tmp_path: Path, pool: Pool) -> None:
    torch.manual_seed(0)
    model = Labelled().eval()
    path = xdit_compile.export(model, "pipefusion=2,patches=2,warmup=all", labelled(), tmp_path / "model.xdit",
                               weights="included")
    ranks = json.loads((path / "manifest.json").read_text())["calls"][0]["ranks"]
    files = [path / rank["stage"]["once"]["functions"]["main"] for rank in ranks]
    assert any(json.loads(file.read_text())["graph_module"]["graph"]["outputs"] == [] for file in files)
    with torch.no_grad():
        expected = model(**labelled())
    for found in pool.run(artifact_runs.called, str(path), labelled(), ranks=range(2)):
        assert torch.allclose(found, expected, atol=EXACT)


def test_graphs_without_inputs_or_results_are_written(tmp_path: Path) -> None:
    setting = Setting(torch.device("cpu"), "auto", {}, 10**6)
    with FakeTensorMode():
        for takes, makes in ((0, 0), (0, 1), (2, 0), (1, 2)):
            graph = fx.Graph()
            given = [graph.placeholder(f"x{i}") for i in range(takes)]
            made = [graph.call_function(torch.ops.aten.arange.default, (5 + i,)) for i in range(makes)]
            for i, node in enumerate([*given, *made]):
                node.meta["val"] = torch.arange(5 + (i - takes)) if i >= takes else torch.empty(3)
            graph.output(tuple(made))
            read = decode(encode(fx.GraphModule({}, graph)), {}, setting, "here")
            assert len(read.graph.find_nodes(op="placeholder")) == takes
            assert [tuple(v.shape) for v in read.graph.output_node().meta["val"]] == [(5 + i,) for i in range(makes)]


def test_how_it_is_run_is_said_to_load_alone(good: Path, tmp_path: Path) -> None:
    case = zoo.CASES["dit"]
    for spec, complaint in (("ulysses=1,backend=inductor", "backend=inductor says how programs are run"),
                            ("ulysses=1,attention_kernel=torch", "attention_kernel=torch says how")):
        with pytest.raises(ArtifactError, match=complaint):
            xdit_compile.export(cases.made(case), spec, case.inputs(1, False), tmp_path / "model.xdit")
    assert "backend" not in json.loads((good / "manifest.json").read_text())["spec"]
    with pytest.raises(SpecError, match=r"epilogue_fusio\b"):
        xdit_compile.load(good, backend="inductor", compile_options={"epilogue_fusio": True})
    with pytest.raises(SpecError, match="compile_mode has no effect with backend=eager"):
        xdit_compile.load(good, mode="max-autotune")


def test_the_attention_kernel_is_the_loader_s(tmp_path: Path) -> None:
    """In files attention is an operator that names no kernel; loaded it is the one that was asked for, or refused."""
    case = zoo.CASES["sd3"]
    path = xdit_compile.export(cases.made(case), "ring=2", case.inputs(1, False), tmp_path / "model.xdit")
    text = "".join(p.read_text() for p in path.glob("*.json"))
    assert '"as_string":"auto"' in text.replace(" ", "") and '"torch"' not in text.partition("made_with")[0]
    with pytest.raises(KernelUnavailable, match="flash_attn"):
        ArtifactLoader(ArtifactFolder.at(path), Running(attention_kernel="flash_attn"), None).memory(0)
    program = ArtifactLoader(ArtifactFolder.at(path), Running(attention_kernel="torch"), None).calls[0].of(0).body
    called = [n for _, m in program.functions() for n in m.graph.nodes
              if n.target is torch.ops.xdit_compile.attention_lse.default]
    assert called and {n.args[-1] for n in called} == {"torch"}


def test_memory_is_shown_and_limited(good: Path) -> None:
    memory = xdit_compile.inspect(good).memory
    assert memory.weights == sum(t.nbytes for t in xdit_compile.load(good).state_dict().values())
    assert f"values {size(memory.values)}" in str(xdit_compile.inspect(good))
    xdit_compile.load(good, max_memory=memory.total)
    with pytest.raises(ArtifactError, match=f"more than max_memory={memory.total - 1}"):
        xdit_compile.load(good, max_memory=memory.total - 1)


@pytest.mark.parametrize("label", [-1, 10, 2**40])
def test_indices_of_a_call_are_compared_when_it_comes(tmp_path: Path, label: int) -> None:
    path = xdit_compile.export(Labelled().eval(), "ulysses=1", labelled(), tmp_path / "model.xdit", weights="included")
    with pytest.raises(ArtifactError, match="out of range"):
        xdit_compile.load(path)(**labelled(label))


def test_indices_that_are_constants_are_compared_at_load(tmp_path: Path) -> None:
    class Ordered(Labelled):
        def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states[:, torch.tensor([3, 1, 2, 0, 7, 5])], timestep, labels)

    path = xdit_compile.export(Ordered().eval(), "ulysses=1", labelled(), tmp_path / "model.xdit", weights="included")
    xdit_compile.load(path)
    tensors = load_file(path / "constants.safetensors")
    (name,) = (n for n, t in tensors.items() if t.dtype == torch.int64 and t.numel() == 6)
    tensors[name][2] = 16
    hostile.renewed(path, "constants.safetensors", save(tensors))
    with pytest.raises(ArtifactError, match=r"indices from 0 to 16, where there are elements -16 to 15"):
        xdit_compile.load(path)


# The list of permissions


INDEXED = {
    "aten.embedding.default": lambda x, i: (x, i),
    "aten.gather.default": lambda x, i: (x, 0, i[:, None].expand(-1, 4)),
    "aten.index_select.default": lambda x, i: (x, 0, i),
    "aten.index.Tensor": lambda x, i: (x, [i]),
    "aten.index_put.default": lambda x, i: (x, [i], torch.ones(2, 4)),
    "aten.index_copy.default": lambda x, i: (x, 0, i, torch.ones(2, 4)),
    "aten.scatter_add.default": lambda x, i: (x, 0, i[:, None].expand(-1, 4), torch.ones(2, 4)),
    "aten.one_hot.default": lambda x, i: (i, 6),
}
"""A call of each operator that takes indices of six rows."""


@pytest.mark.parametrize("name", sorted(n for n, p in permissions().items() if p.kind == "index"))
def test_kernels_compare_indices(name: str) -> None:
    """What the list says of this kind: else the artifact would have to do it."""
    operator, _ = operator_named(f"torch.ops.{name}")
    operator(*INDEXED[name](torch.ones(6, 4), torch.tensor([0, 5])))
    for wrong in (6, 2**33, 2**62, -7, -(2**40)):
        with pytest.raises((RuntimeError, IndexError)):
            operator(*INDEXED[name](torch.ones(6, 4), torch.tensor([0, wrong])))


def test_the_list_of_permissions() -> None:
    for name, permission in permissions().items():
        assert permission.kind in KINDS
        assert bool(permission.writes) == (name == "aten.copy_.default") == (permission.kind == "write"), name
        operator, _ = operator_named(f"torch.ops.{name}")
        assert {torch.Tag.nondeterministic_seeded, torch.Tag.inplace_view} & set(operator.tags) == set() or (
            name == "aten.scaled_dot_product_attention.default"), name
        assert permission.kind != "element-wise" or len(operator._schema.returns) == 1
    for name in ("aten._reshape_alias_copy.default", "aten._convert_indices_from_csr_to_coo.default",
                 "aten.max_pool2d_with_indices_backward.default", "aten.segment_reduce.default",
                 "aten.set_.source_Tensor", "aten._sparse_csr_tensor_unsafe.default", "aten.manual_seed.default",
                 "aten._print.default", "aten.ljust.default", "aten.rand.default", "aten.as_strided.default",
                 "aten.from_file.default", "aten.empty.memory_format", "aten.add_.Tensor",
                 "aten._unsafe_index.Tensor"):
        with pytest.raises(ArtifactError, match="not on the list"):
            operator_named(f"torch.ops.{name}")


def test_operators_that_are_not_on_the_list_are_refused_at_export(tmp_path: Path) -> None:
    class Sampling(Labelled):
        def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return super().forward(torch.special.bessel_j0(hidden_states), timestep, labels)

    with pytest.raises(ArtifactError, match=r"aten.special_bessel_j0.default \(.*\) is not on the list of operators"):
        xdit_compile.export(Sampling().eval(), "ulysses=1", labelled(), tmp_path / "model.xdit")
    assert list(tmp_path.iterdir()) == []


def test_attention_is_given_what_fits() -> None:
    """Some kernels believe shapes, and end the process where they are wrong."""
    q = torch.empty(1, 2, 8, 4, device="meta")
    before("attention", "aten.scaled_dot_product_attention.default", (q, q, q), {}, 1, {})
    for k, v in ((q[:, :, :5], q), (q, q[:, :, :5]), (q[:, :1], q), (q[..., :3], q), (q[:, :, :0], q[:, :, :0]),
                 (q.half(), q), (q[0], q)):
        with pytest.raises(ArtifactError, match="attention of q"):
            before("attention", "aten.scaled_dot_product_attention.default", (q, k, v), {}, 1, {})


@pytest.mark.parametrize(("args", "complaint"), [
    (([4, 4], [4, 4], "world"), "none of this artifact"), (([4, 4, 4], [4, 4], "u"), "sends"),
    (([4, 4], [4, 5], "u"), "sends"), (([9, -1], [4, 4], "u"), "sends")])
def test_values_are_exchanged_in_the_artifact_s_groups(args: tuple[Any, ...], complaint: str) -> None:
    x = torch.empty(8, 2, device="meta")
    before("collective", "_c10d_functional.all_to_all_single.default", (x, [4, 4], [4, 4], "u"), {}, 1, {"u": 2})
    with pytest.raises(ArtifactError, match=complaint):
        before("collective", "_c10d_functional.all_to_all_single.default", (x, *args), {}, 1, {"u": 2})
    for name, wrong in (("all_gather_into_tensor", (x, 3, "u")), ("all_reduce", (x, "product", "u"))):
        with pytest.raises(ArtifactError, match=r"it exchanges|it reduces"):
            before("collective", f"_c10d_functional.{name}.default", wrong, {}, 1, {"u": 2})


def campaign(count: int, seed: int) -> dict[str, Any]:
    script = Path(__file__).with_name("campaigns") / "artifacts.py"
    done = subprocess.run([sys.executable, str(script), "--count", str(count), "--seed", str(seed), "--json"],
                          capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_spoiled_artifacts_are_refused_or_harmless() -> None:
    figures = campaign(120, 1)
    assert figures["refused"] > 60 and figures["ran"] > 2 and figures["exact"] > 0 and figures["slowest"] < 30


@pytest.mark.whole
@pytest.mark.timeout(2000)
def test_many_spoiled_artifacts() -> None:
    assert campaign(5000, 2)["refused"] > 3000
