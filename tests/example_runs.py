"""What the workers of the pool run of the examples and of the documents' blocks."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import sys
from typing import Any

import torch

import xdit_compile.cli.main


def script(path: str, folder: str, *words: str) -> str:
    """Run a script with these arguments in ``folder``; what it printed."""
    before, given = os.getcwd(), sys.argv
    os.chdir(folder)
    sys.argv = [path, *words]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.redirect_stderr(io.StringIO()):
            runpy.run_path(path, run_name="__main__")
        return text.getvalue()
    finally:
        os.chdir(before)
        sys.argv = given


def command(folder: str, *words: str) -> tuple[int, str]:
    """Run ``xdit-compile`` as a rank of this job; its status, and what it complained of."""
    before, destroy = os.getcwd(), torch.distributed.destroy_process_group
    os.chdir(folder)
    torch.distributed.destroy_process_group = lambda: None  # the pool's, which lives on
    try:
        with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.redirect_stderr(text):
            return xdit_compile.cli.main.main(list(words)), text.getvalue()
    finally:
        os.chdir(before)
        torch.distributed.destroy_process_group = destroy


def block(code: str, folder: str, prepare: Any) -> dict[str, str]:
    """Run a block of Python with what ``prepare`` says is there; the types of what it made."""
    before, path = os.getcwd(), [*sys.path]
    os.chdir(folder)
    try:
        names: dict[str, Any] = prepare()
        exec(compile(code, "block", "exec"), names)
        return {name: type(value).__name__ for name, value in names.items() if not name.startswith("__")}
    finally:
        os.chdir(before)
        sys.path[:] = path
