"""The command line, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from xdit_compile.cli.main import main

MODEL = '''
import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.blocks = nn.Linear(8, 16), nn.ModuleList(Block() for _ in range(2))

    def twice(self, x):
        return self(self(x)[..., :8])

    def forward(self, x):
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return x


def example():
    return Tiny().eval(), {"x": torch.randn(1, 24, 8)}


def nothing():
    return None


def broken():
    raise ZeroDivisionError("in the target")
'''


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "model.py"
    path.write_text(MODEL)
    return path


@pytest.fixture(autouse=True)
def own_environment(monkeypatch) -> None:
    """Commands run here leave no folder on the path, and are no launcher's rank."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delenv("RANK", raising=False)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "xdit_compile.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_explain_as_text_with_every_pass_written_down(model, tmp_path):
    done = run("explain", f"{model}:example", "--spec", "ulysses=2,ring=2", "--dump", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Tiny under ulysses=2,ring=2, rank 0 of 4" in done.stdout and "usp: queries [24/4]" in done.stdout
    assert done.stderr == ""
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files[:2] == ["00-canonicalize.py", "01-shard.py"] and files[-1] == "passes.jsonl"
    assert all(name.endswith(".py") for name in files[:-1])
    assert "scaled_dot_product_attention" in (tmp_path / "00-canonicalize.py").read_text()


def test_explain_another_method(model, capsys):
    command = ["explain", f"{model}:example", "--spec", "ulysses=2", "--json"]
    flops = []
    for method in ("forward", "twice"):
        assert main([*command, "--method", method]) == 0
        flops.append(json.loads(capsys.readouterr().out)["costs"]["flops"])
    assert 1.9 < flops[1] / flops[0] < 2.1
    assert main([*command, "--method", "thrice"]) == 2 and "no method 'thrice'" in capsys.readouterr().err


def test_verify_starts_its_ranks_and_answers_as_json(model):
    done = run("verify", f"{model}:example", "--spec", "ulysses=2", "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["ok"] and said["spec"] == "ulysses=2" and said["outputs"][0]["shape"] == [1, 24, 16]


def test_a_difference_is_status_1(model, capsys):
    """No difference at all is still more than a tolerance of less than nothing."""
    command = ["verify", f"{model}:example", "--spec", "ulysses=1", "--device", "cpu"]
    assert main([*command, "--tolerance=-1"]) == 1
    assert "DIFFERS" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "complaint"), [
    (("explain", "{model}:exemple", "--spec", "ulysses=2"),
     "no function 'exemple'; did you mean 'example'?; it has Block, Tiny"),
    (("explain", "{model}:nothing", "--spec", "ulysses=2"), "nothing must return (model, kwargs)"),
    (("explain", "absent.py:example", "--spec", "ulysses=2"), "there is no file absent.py"),
    (("explain", "no.such.module:example", "--spec", "ulysses=2"), "there is no module 'no.such.module'"),
    (("explain", "example", "--spec", "ulysses=2"), "cannot read the target 'example'"),
    (("explain", "{model}:example", "--spec", "ulises=2"), "unknown word 'ulises'"),
    (("verify", "{model}:example", "--spec", "ulysses=2", "--world-size", "3"), "needs 2 x 1 = 2 processes"),
])
def test_a_user_s_mistake_is_one_line_and_status_2(model, arguments, complaint, capsys):
    assert main([a.format(model=model) for a in arguments]) == 2
    told = capsys.readouterr()
    assert complaint in told.err and told.err.count("\n") == 1 and not told.out


def test_the_target_s_own_fault_is_shown_whole_and_is_status_2(model, capsys):
    assert main(["explain", f"{model}:broken", "--spec", "ulysses=2"]) == 2
    told = capsys.readouterr().err
    assert "ZeroDivisionError: in the target" in told and "model.py" in told


@pytest.mark.parametrize("command", ["explain", "verify"])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"examples:\n  xdit-compile {command} " in capsys.readouterr().out


def test_only_the_first_rank_speaks(model, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert main(["explain", f"{model}:example", "--spec", "ulysses=1"]) == 0
    assert not capsys.readouterr().out
