"""Every block of README, CONTRIBUTING and docs, run as a reader would.

For what is not at hand (a folder with a model, a name on the hub, a model of full size) ``STAND_INS`` has something
else. A block that is not run says so in the document, in a comment before it, with the reason.
"""

from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import example_runs
import pipelines
import pytest
import torch
from pool import Pool
from safetensors.torch import save_file
from test_pipelines import folders  # noqa: F401

import xdit_compile
from xdit_compile.cli import run_flags as flags
from xdit_compile.cli.main import main
from xdit_compile.spec import ShardingSpec

REPOSITORY = Path(__file__).parents[1]
DOCUMENTS = [*sorted(REPOSITORY.glob("*.md")), *sorted(REPOSITORY.glob("docs/*.md")),
             *sorted(REPOSITORY.glob("examples/**/*.md"))]
FIXED = ("make ", "pip install ", "python benchmarks/", "python -m pytest ", "python examples/shapes/train.py",
         "OMP_NUM_THREADS=1 ", "ln -s ")
"""Commands that set things up or take long: only whether what they name is there is looked at."""


class Block(NamedTuple):
    """A fenced or indented block: its document, line, language, text, and why it is not run."""

    path: Path
    line: int
    kind: str
    text: str
    why_not: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(REPOSITORY)}:{self.line}"


def blocks(path: Path) -> Iterator[Block]:
    text = path.read_text()
    for found in re.finditer(r"(?:<!-- not run: (.*?) -->\n+)?^```(\w*)\n(.*?)^```$", text, re.M | re.S):
        yield Block(path, text[:found.start(3)].count("\n"), found[2], found[3], found[1] or "")
    plain = re.sub(r"^```.*?^```$", lambda m: "\n" * m[0].count("\n"), text, flags=re.M | re.S)
    for found in re.finditer(r"^\n((?: {4}\S.*\n)+)", plain, re.M):
        if not re.match(r" {4}(#|model, call|\w+: \")", found[1]):  # programs and pictures made of letters
            yield Block(path, plain[:found.start(1)].count("\n") + 1, "", found[1], "")


BLOCKS = [block for path in DOCUMENTS for block in blocks(path)]
LONG = ("xdit-compile plan ", "xdit-compile serve ")
"""What takes long, and has quick tests of its own: blocks of these run with ``--whole``."""

FILE = re.compile(r"# (\w+\.py)(?:, further down)?\n")
"""How a block begins that is a file, or more of one."""

STAND_INS = {
    "FluxTransformer2DModel(guidance_embeds=True)": "FluxTransformer2DModel(guidance_embeds=True, num_layers=1, "
                                                    "num_single_layers=1)",
    "black-forest-labs/FLUX.1-dev": "{flux}",
    "DIR_OR_ID": "{sd3}",
    "--model DIR ": "--model {sd3} ",
    "--height 1024 --width 1024": "--height 64 --width 64",
    "folder/of/safetensors": "{weights}",
    "--num_inference_steps 28": "--num_inference_steps 2 --height 64 --width 64",
    '--prompt "a cat"': '--prompt "a cat" --num_inference_steps 2 --height 64 --width 64',
    "num_inference_steps=200": "num_inference_steps=20",
    "plan mine.py:flux": "plan mine.py:small_flux",
    "examples/shapes/model": "{repository}/examples/shapes/model",
    'pipe("a cat", generator=': 'pipe("a cat", num_inference_steps=2, height=64, width=64, generator=',
    'parallel("a cat", generator=': 'parallel("a cat", num_inference_steps=2, height=64, width=64, generator=',
    "num_inference_steps=25": "num_inference_steps=1",
}


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory, folders: str) -> dict[str, Any]:  # noqa: F811
    """Where a reader works, and what they have."""
    home = tmp_path_factory.mktemp("reader")
    sd3, flux = (pipelines.folder(name, Path(folders)) for name in ("sd3", "flux"))
    has = {"home": home, "repository": REPOSITORY, "sd3": sd3, "flux": flux, "weights": home / "weights"}
    for block in BLOCKS:
        if name := FILE.match(block.text):
            with (home / name[1]).open("a") as file:
                file.write(said(block.text, has) + "\n\n")
    return has


def said(text: str, reader: dict[str, Any]) -> str:
    for before, after in STAND_INS.items():
        text = text.replace(before, after.format(**reader) if "{" in after and "(" not in after else after)
    return text


@pytest.fixture(scope="module")
def pools(pool: Pool) -> Iterator[dict[int, Pool]]:
    """By the number of their ranks; those of two start if somebody asks for them."""
    two = Pool(world=2)
    yield {4: pool, 2: two}
    two.close()


def tiny(folder: str) -> dict[str, Any]:
    """What blocks that begin in the middle have: a model with inputs, and a pipeline."""
    sys.path.insert(0, str(REPOSITORY / "examples"))
    model, inputs = import_module("own_model").example()
    return {"torch": torch, "xdit_compile": xdit_compile, "model": model, "inputs": inputs,
            "pipe": pipelines.load(Path(folder))}


@pytest.mark.parametrize("block", [
    pytest.param(b, marks=pytest.mark.whole if any(word in b.text for word in LONG) else ()) for b in BLOCKS], ids=str)
def test_a_block_runs(block: Block, reader: dict[str, Any], pools: dict[int, Pool],
                      monkeypatch: pytest.MonkeyPatch) -> None:
    if block.why_not:
        pytest.skip(block.why_not)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(reader["home"])
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    text = said(block.text, reader)
    if block.kind == "python":
        python(text, reader, pools[4])
    else:
        assert block.kind == "", "a shell's"
        for line in text.strip().splitlines():
            shell(line.partition("  #")[0].strip(), reader, pools)


def python(text: str, reader: dict[str, Any], pool: Pool) -> None:
    if name := FILE.match(text):  # it is there, and commands run it
        compile(Path(name[1]).read_text(), name[1], "exec")
        return
    prepare = partial(tiny, str(reader["sd3"]))
    if text.startswith("@rule("):
        names: dict[str, Any] = {"rule": lambda table: lambda function: function, "aten": torch.ops.aten}
        exec(text, names)
        assert callable(names["flipped"])
    elif "xdit_compile.export(" in text:
        exec(text, names := prepare())
        reader["weights"].mkdir()
        save_file(names["model"].state_dict(), reader["weights"] / "model.safetensors")
    elif "xdit_compile.start(" in text or "xdit_compile" not in text:  # from one process
        exec(text, {})
    else:
        made = pool.run(example_runs.block, text, str(reader["home"]), prepare, timeout=240)
        assert len(made) == pool.world


def shell(line: str, reader: dict[str, Any], pools: dict[int, Pool]) -> None:
    words = shlex.split(line)
    if not words:
        return
    if line.startswith(FIXED):
        named(words)
    elif words[0] == "torchrun":
        assert words[1] == "--nproc-per-node"
        pool = pools[int(words[2])]
        if words[3] == "-m":
            assert words[4] == "xdit_compile.cli"
            ran(words[5:], reader, pool)
        else:
            pool.run(example_runs.script, words[3], str(reader["home"]), *words[4:], timeout=240)
    elif words[0] == "xdit-compile" and words[1] in ("run", "verify"):
        spec = words[words.index("--spec") + 1] if "--spec" in words else "ulysses=2"  # that of the artifact
        ran(words[1:], reader, pools[ShardingSpec.parse(spec).world_size])
    elif words[:2] == ["xdit-compile", "serve"]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            reader["port"] = probe.getsockname()[1]
        words[words.index("8000")] = str(reader["port"])
        reader["server"] = subprocess.Popen([sys.executable, "-m", "xdit_compile.cli", *words[1:]])
    elif words[0] == "curl":
        try:
            asked_of_server(words[1:], reader["port"])
        finally:
            reader["server"].terminate()
            reader["server"].wait(60)
    elif words[0] == "xdit-compile":
        assert main(words[1:]) == 0
    else:
        raise AssertionError(f"nobody knows how to run: {line}")


def asked_of_server(words: list[str], port: int) -> None:
    """What curl asks of a server, as soon as it is ready."""
    address = words[0].replace("8000", str(port))
    header, data = words[words.index("-H") + 1], words[words.index("-d") + 1]
    deadline = time.monotonic() + 200
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5)
            break
        except OSError:
            assert time.monotonic() < deadline, "the server is not ready"
            time.sleep(0.2)
    request = urllib.request.Request(address, data.encode(), dict([header.split(": ")]))
    assert json.load(urllib.request.urlopen(request, timeout=200))["data"]


def ran(words: list[str], reader: dict[str, Any], pool: Pool) -> None:
    """A command in all of these processes."""
    more = ["--overwrite"] if words[0] == "run" else []
    answers = pool.run(example_runs.command, str(reader["home"]), *words, *more, timeout=240)
    assert all(status == 0 for status, _ in answers), answers


def named(words: list[str]) -> None:
    """What a command that is not run names is there: targets, extras, files and their flags."""
    words = [w.removeprefix("$PWD/") for w in words if ("=" not in w or w.startswith("-")) and "PATH_OF" not in w]
    if words[0] == "make":
        assert re.search(rf"^{re.escape(words[1])}:", (REPOSITORY / "Makefile").read_text(), re.M), words
        return
    files = [w for w in words if "/" in w and not w.startswith("-") and not w.startswith(".venv/bin")]
    assert all((REPOSITORY / f).exists() for f in files), files
    scripts = [REPOSITORY / f for f in files if f.endswith(".py") and not f.startswith("tests/")]
    for script in scripts:
        text = script.read_text()
        assert all(flag[2:] in text for flag in words if flag.startswith("--")), (script, words)
    extras = re.findall(r"'?\.\[([\w,-]+)\]'?", " ".join(words))
    assert all(f"\n{name} = [" in (REPOSITORY / "pyproject.toml").read_text() for some in extras
               for name in some.split(","))


def test_few_blocks_are_not_run() -> None:
    assert len(BLOCKS) > 20
    assert len([b for b in BLOCKS if b.why_not]) <= 3


def test_the_page_for_users_of_xdit_names_every_flag_that_is_known() -> None:
    text = (REPOSITORY / "docs" / "from-xdit.md").read_text()
    known = {*flags.VALUES, *flags.SWITCHES, *flags.DEGREES, *flags.PIPEFUSION, *flags.CALL}
    known |= {name for name in flags.IDLE if not name.startswith("no_")}
    shown = set(re.findall(r"`--([a-z0-9_]+)", text))
    assert {name.removeprefix("wan_") for name in shown} >= known, known - shown
