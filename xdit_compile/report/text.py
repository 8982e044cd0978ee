"""Reports where there is no terminal: as text of a fixed width, and as JSON."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from typing import Any

from rich.console import Console, RenderableType
from rich.measure import Measurement

WIDTH = 120
"""Columns of text that goes to no terminal."""


def plain(report: RenderableType) -> str:
    """The report without colour, as wide as the terminal."""
    width = max(shutil.get_terminal_size((WIDTH, 0)).columns, least_width(report))
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(report)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()).rstrip()


def least_width(report: RenderableType) -> int:
    """Columns without which a table of the report would break a word."""
    console = Console(width=10_000, color_system=None, force_terminal=False)
    return Measurement.get(console, console.options, report).minimum


def jsonable(report: Any) -> dict[str, Any]:
    """A dataclass as the dicts, lists, texts and numbers that reading its JSON gives. Infinities become
    texts, as JSON has no word for them."""
    return json.loads(json.dumps(asdict(report)), parse_constant=str)
