"""What people meet who are new: mistakes and habits of the first hours, each tried as they would."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import calls
import newcomer
import pipelines
import pytest
import torch
from marks import whole
from newcomer import heard
from pool import Pool
from test_pipelines import folders  # noqa: F401
from torch import nn

import xdit_compile
from xdit_compile.cli.main import main
from xdit_compile.diagnostics.explain import explain
from xdit_compile.errors import ArtifactError, LaunchError, SpecError, XditError
from xdit_compile.pipelines import loading
from xdit_compile.progress import progress
from xdit_compile.report.tables import sections, table
from xdit_compile.report.text import plain
from xdit_compile.runtime.pipefusion.schedule import Bar, Timeline

REPOSITORY = Path(__file__).parents[1]
SHAPES = REPOSITORY / "examples" / "shapes" / "model"
PACKAGE = Path(xdit_compile.__file__).parent

MODEL = '''
import os
import signal
import time
import torch
from .parts import Tiny

def f():
    torch.manual_seed(0)
    return Tiny().eval(), {"x": torch.randn(1, 8, 6), "step": torch.ones(1)}

def interrupted():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(30)
'''


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package whose module imports another relatively."""
    folder = tmp_path / f"of_{tmp_path.name}"
    folder.mkdir()
    (folder / "parts.py").write_text(f"import sys\nsys.path.insert(0, {str(REPOSITORY / 'tests')!r})\n"
                                     "from calls import Tiny\n")
    (folder / "model.py").write_text(MODEL)
    return folder


def command(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Status, what was printed, and what was complained of."""
    try:
        status = main([*map(str, words)])
    except SystemExit as stop:
        status = int(stop.code or 0)
    told = capsys.readouterr()
    return status, told.out, told.err


# --------------------------------------------------------------------------------------------------
# Words that are almost right


@pytest.mark.parametrize(("words", "complaint"), [
    ("explian x", "did you mean explain?"),
    ("explain x.py:f --sepc ulysses=2", "did you mean --spec?"),
    ("explain x.py:f --spec ulysses=2 --device-memry 3", "did you mean --device-memory?"),
    ("run --model x --promt a", "did you mean --prompt?"),
    ("run --modle x", "did you mean --model?"),
    ("run --model x --ulyses_degree 2", "did you mean --ulysses_degree?"),
    ("explain x.py:f --spec ulises=2", "did you mean 'ulysses'?"),
    ("explain x.py:f --spec backend=induktor", "did you mean 'inductor'?"),
    ("explain x.py:f --spec patchs=2,pipefusion=2", "did you mean 'patches'?"),
    (f"run --model {SHAPES} --arg class_lables=[1]", "did you mean 'class_labels'?"),
])
def test_did_you_mean(words: str, complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = command(capsys, *words.split())
    assert status == 2 and complaint in err and "Traceback" not in err, err


def test_a_spec_that_is_none_is_shown_short() -> None:
    with pytest.raises(SpecError, match=r"a sharding spec is text.*got Tiny\($"):
        xdit_compile.parallelize("ulysses=2", calls.Tiny())


# --------------------------------------------------------------------------------------------------
# Models and where they are


@pytest.mark.parametrize("init", [True, False])
def test_a_module_that_imports_its_neighbour_relatively(
    package: Path, init: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if init:
        (package / "__init__.py").touch()
    status, out, err = command(capsys, "explain", f"{package / 'model.py'}:f", "--spec", "ulysses=2")
    assert status == 0 and out.startswith("Tiny under ulysses=2: 50.0% of the work on each of 2 devices"), err


def test_ctrl_c_is_one_line(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = command(capsys, "explain", f"{package / 'model.py'}:interrupted", "--spec", "ulysses=2")
    assert (status, err) == (130, "xdit-compile: interrupted\n")


def test_a_meta_model_that_is_called_says_what_to_do() -> None:
    with torch.device("meta"):
        model = calls.Tiny().eval()
    with pytest.raises(XditError, match="on the meta device: give parallelize weights=FOLDER"):
        xdit_compile.parallelize(model, "ulysses=1")(torch.ones(1, 8, 6), torch.ones(1))


def test_a_compiled_model_is_told_of_the_backend() -> None:
    with pytest.warns(UserWarning, match="give backend=inductor in the spec"):
        xdit_compile.parallelize(torch.compile(calls.Tiny().eval()), "ulysses=1")


def test_cuda_that_is_not_there(package: Path, capsys: pytest.CaptureFixture[str],
                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LaunchError, match="with a GPU for each of 2 ranks, but PyTorch sees no"):
        xdit_compile.launch(print, world_size=2, device="cuda")
    status, _, err = command(capsys, "verify", f"{package / 'model.py'}:f", "--spec", "ulysses=1", "--device", "cuda")
    assert status == 2 and "device cuda was asked for, but PyTorch sees no GPU" in err and "Traceback" not in err


def test_inspecting_a_folder_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(capsys, "inspect", "nowhere") == (
        2, "", "xdit-compile: there is no folder nowhere\n")
    with pytest.raises(ArtifactError, match="there is no folder nowhere"):
        xdit_compile.load("nowhere")


def test_a_script_that_launches_without_a_guard(tmp_path: Path) -> None:
    """And what is said meanwhile of how long it takes."""
    script = tmp_path / "unguarded.py"
    script.write_text("import os, xdit_compile\nxdit_compile.launch(os.getpid, world_size=2)\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=False,
                          env=os.environ | {"XDIT_COMPILE_PROGRESS": "0.2"})
    assert done.returncode == 1 and "under `if __name__ == '__main__':`" in done.stderr.splitlines()[-1]
    assert done.stderr.count("Traceback") == 1 and "xdit_compile: starting 2 processes, since 0 s" in done.stderr


# --------------------------------------------------------------------------------------------------
# A pipeline's folder in place of a function


def test_explain_takes_the_folder_of_a_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    """And the first line is a verdict. No label is given: one is made up."""
    status, out, err = command(capsys, "explain", "--model", SHAPES, "--spec", "cfg=2")
    assert status == 0, err
    assert out.startswith("DiTTransformer2DModel under cfg=2: 50.0% of the work on each of 2 devices (ideal 50.0%), ")
    status, _, err = command(capsys, "explain", "--spec", "cfg=2")
    assert status == 2 and "takes either a target, as in model.py:example, or --model" in err


def test_verify_and_export_take_the_folder_of_a_pipeline_without_a_prompt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pipelines.folder("sd3", tmp_path)
    status, out, err = command(capsys, "verify", "--model", folder, "--spec", "ulysses=1", "--device", "cpu", "--json")
    assert status == 0 and json.loads(out)["ok"], err
    status, out, err = command(capsys, "export", "--model", folder, "--spec", "ulysses=2", "--height", "64", "--width",
                               "64", "-o", tmp_path / "made.xdit")
    assert status == 0 and "SD3Transformer2DModel" in out, err


@pytest.mark.parametrize("name", ["flux", "wan", whole("sd3"), whole("qwen_image")])
def test_an_artifact_in_the_place_of_a_pipeline_s_model(
    pool: Pool, folders: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:
    """Exported by the command for the calls that this pipeline makes, and loaded by two ranks. Some pipelines call
    their model inside of its ``cache_context``."""
    path, case = pipelines.folder(name, Path(folders)), pipelines.PIPELINES[name]
    expected = pipelines.run(pipelines.load(path), case, num_inference_steps=2)
    words: list[str] = []
    for argument, value in case.call().items():
        if argument in ("prompt", "negative_prompt"):
            words += [f"--{argument}", *([value] if isinstance(value, str) else value)]
        elif argument not in ("num_inference_steps", "output_type"):
            words += ["--arg", f"{argument}={json.dumps(value)}"]
    status, _, err = command(capsys, "export", "--model", path, "--spec", "ulysses=2", "-o", tmp_path / "made", *words)
    assert status == 0, err
    for made in pool.run(newcomer.in_a_pipeline, folders, name, str(tmp_path / "made"), ranks=range(2)):
        torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)


# --------------------------------------------------------------------------------------------------
# Reports, pictures and files


class Verbose(nn.Module):
    """Parts of it have names that are longer than a column."""

    def __init__(self) -> None:
        super().__init__()
        self.a_block_with_a_name_that_is_really_very_long_indeed = calls.Tiny()

    def forward(self, x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        return self.a_block_with_a_name_that_is_really_very_long_indeed(x, step, return_dict=False)[0]


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_tables_break_no_identifier(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    report = explain(Verbose().eval(), "ulysses=2", {"x": torch.ones(1, 8, 6), "step": torch.ones(1)})
    text = str(report)
    for word in ("scaled_dot_product_attention", "a_block_with_a_name_that_is_really_very_long_indeed",
                 "overlap_communication", report.passes[0].digest):
        assert re.search(rf"\b{word}\b", text), word


@pytest.mark.parametrize("width", [20, 33, 60, 200])
def test_wide_tables_are_as_wide_as_the_terminal_where_words_allow(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    made = table("A title of several words", "name", "what", ">count")
    made.add_row("an_identifier_of_some_length", "words " * 12, "1,234")
    text = plain(sections(made))
    assert "an_identifier_of_some_length" in text and text.count("words") == 12 + 1
    longest = max(map(len, text.splitlines()))
    least = len("an_identifier_of_some_length") + len("words") + len("1,234") + 4
    assert longest <= max(width, least)
    assert len([line for line in text.splitlines() if "words" in line]) > 1 or width == 200


def test_timelines_are_drawn_as_the_file_s_name_says(tmp_path: Path) -> None:
    from xdit_compile.diagnostics.timeline_plot import draw

    line = Timeline((Bar(0, "run", 0, 0, 0.0, 1.0),), 1)
    for name, magic in (("x.png", b"\x89PNG"), ("x.svg", b"<?xml"), ("x.pdf", b"%PDF")):
        draw({"one": line}, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(magic)
    with pytest.raises(XditError, match=r"drawn as svg, png, pdf, by the end of the file's name; .*x.bmp ends in bmp"):
        draw({"one": line}, tmp_path / "x.bmp")


def test_files_are_replaced_only_when_asked(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["explain", f"{package / 'model.py'}:f", "--spec", "ulysses=2", "--html", "page.html", "--dump", "dump"]
    assert command(capsys, *words)[0] == 0
    before = Path("page.html").read_text()
    status, _, err = command(capsys, *words)
    assert status == 2 and "there already; choose another name, or give --overwrite" in err
    assert command(capsys, *words, "--overwrite")[0] == 0 and before
    run = ["run", "--model", SHAPES, "--arg", "class_labels=[1]", "--num_inference_steps", "1", "--device", "cpu"]
    assert command(capsys, *run)[0] == 0
    status, _, err = command(capsys, *run)
    assert status == 2 and "results/image-0.png is there already; choose another --output, or give --overwrite" in err
    assert command(capsys, *run, "--overwrite")[0] == 0


def test_the_page_stands_alone(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No address in it is looked up, blocks and exchanges are there, and what people write is escaped."""
    for spec in ("ulysses=2", "pipefusion=2,patches=2"):
        assert command(capsys, "explain", f"{package / 'model.py'}:f", "--spec", spec, "--html", "p.html",
                       "--overwrite")[0] == 0
        text = Path("p.html").read_text()
        assert not re.search(r"https?://|<script|<link|@import|url\(|src=", text)
        assert "Memory of each device" in text and text.count("<span class='who'>rank 1</span>") == 2
        assert "all_to_all" in text or "Stages" in text
        assert "&times; 2" in text and "8/2" in text if spec == "ulysses=2" else "<svg" in text


# --------------------------------------------------------------------------------------------------
# What is said of long work, long waits and failures


def test_long_work_is_told_and_short_work_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with heard("0.1") as text:
        with progress("being quick"):
            pass
        with progress("doing it"), progress("doing a part of it"):
            time.sleep(0.5)
    lines = text.getvalue().splitlines()
    assert lines[0].startswith("xdit_compile: doing a part of it, since 0 s")
    assert lines[-1].startswith("xdit_compile: doing a part of it took 0.5") and "quick" not in text.getvalue()
    monkeypatch.setenv("RANK", "1")
    with heard("0.1") as text, progress("work of rank 1"):
        time.sleep(0.3)
    assert not text.getvalue()


def test_capturing_is_told() -> None:
    with heard("0.001") as text, torch.no_grad():
        xdit_compile.parallelize(calls.Tiny(layers=6).eval(), "ulysses=1")(torch.ones(1, 8, 6), torch.ones(1))
    assert re.search(r"capturing Tiny took \d", text.getvalue())


def test_waiting_for_another_rank_is_told_by_one(pool: Pool) -> None:
    said = pool.run(newcomer.late, 2.0, ranks=range(2))
    assert re.search(r"waiting for rank 1 in .*: it is in code of its own, after .*, since \d s", said[0]), said
    assert "waiting" not in said[1]


def test_a_timeline_that_one_rank_asks_for(pool: Pool) -> None:
    told, error = pool.answers(newcomer.timeline_of_one, ranks=range(2))[0]
    assert "waiting for rank 1 in timeline(), which all ranks ask for together" in told
    assert "rank 1 left" in error and "before timeline(), which all ranks ask for together" in error


@pytest.mark.parametrize(("kind", "lines"), [
    ("alike", r"xdit_compile: .*newcomer.py:\d+: SpecError: the same on every rank"), ("own", "ZeroDivisionError"),
    ("killed", "RankFailure: rank 7 is gone"), ("interrupt", "xdit_compile: interrupted")])
def test_what_ends_all_ranks_is_printed_once(pool: Pool, kind: str, lines: str) -> None:
    printed = [text for text in pool.run(newcomer.uncaught, kind) if text]
    assert len(printed) == 1 and re.search(lines, printed[0]), printed
    assert kind == "own" or printed[0].count("\n") == 1


@pytest.mark.whole
def test_under_torchrun_the_culprit_tells(tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text("import torch, xdit_compile\nxdit_compile.init_from_env('cpu')\n"
                      "if torch.distributed.get_rank() == 1:\n    raise ZeroDivisionError('of mine')\n"
                      "xdit_compile.parallelize(torch.nn.Linear(2, 2).eval(), 'data=2', timeout=30)\n")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", script],
                          capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode and done.stderr.count("ZeroDivisionError: of mine") == 1, done.stderr
    assert done.stderr.count("Traceback") <= 2, "that of the culprit, and torchrun's own"


# --------------------------------------------------------------------------------------------------
# What is installed


def test_hints_name_extras_that_exist() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    files = [*PACKAGE.rglob("*.py"), *REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")]
    texts = [path.read_text() for path in files]
    named = {name for text in texts for names in re.findall(r"(?:xdit-compile|'\.)\[([\w,-]+)\]", text)
             for name in names.split(",")}
    named |= set(re.findall(r"extra = \"([\w-]+)\"", "".join(p.read_text() for p in PACKAGE.rglob("*.py"))))
    assert named and named <= extras.keys(), named - extras.keys()
    assert "xdit-compile[diffusers,lora]" in extras["pipelines"], "run takes --lora"
    torch_bounds = next(d for d in project["dependencies"] if d.startswith("torch"))
    assert re.fullmatch(r"torch>=[\d.]+,<[\d.]+", torch_bounds), "of the versions tested, not one"
    assert project["requires-python"] == ">=3.11"


def test_adapters_without_their_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda name: None)

    class Takes:
        def load_lora_weights(self) -> None: ...

    with pytest.raises(XditError, match=r"pip install 'xdit-compile\[lora\]'"):
        loading._adapt(Takes(), [("somewhere", 1.0)])
