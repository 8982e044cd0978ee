"""The package as it is installed: a wheel that works outside of the repository."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]

MINE = """
import torch
from torch import nn

class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.inward, self.q = nn.Linear(4, 16), nn.Linear(16, 16)

    def forward(self, hidden_states, timestep):
        x = self.inward(hidden_states) * timestep
        q = self.q(x).unflatten(-1, (2, 8)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)

def mine():
    return Mine().eval(), dict(hidden_states=torch.ones(1, 16, 4), timestep=torch.ones(1))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel and nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(REPOSITORY)], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True)
    return folder / "site"


def outside(installed: Path, folder: Path, *arguments: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_wheel_runs_outside_of_the_repository(installed: Path, tmp_path: Path) -> None:
    where = outside(installed, tmp_path, "-c", "import xdit_compile as x; print(x.__file__, x.__version__)").split()
    assert Path(where[0]).is_relative_to(installed)
    assert outside(installed, tmp_path, "-m", "xdit_compile", "--version").split() == ["xdit-compile", where[1]]
    (tmp_path / "mine.py").write_text(MINE)
    said = outside(installed, tmp_path, "-m", "xdit_compile", "explain", "mine.py:mine", "--spec", "ulysses=2")
    assert "Mine under ulysses=2" in said and "token_axis" in said


def test_the_wheel_has_what_others_look_for(installed: Path) -> None:
    (described,) = installed.glob("xdit_compile-*.dist-info")
    assert (installed / "xdit_compile" / "py.typed").is_file()
    assert "Apache" in next(described.rglob("LICENSE")).read_text()
    assert not (installed / "tests").exists() and not (installed / "benchmarks").exists()
