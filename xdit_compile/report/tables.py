"""Reports as tables for a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text


def table(title: str, *columns: str) -> Table:
    """An empty table; a column whose name begins with ``>`` holds numbers."""
    made = Table(title=Text(title, style="bold"), title_justify="left", box=None, pad_edge=False,
                 header_style="dim", padding=(0, 2, 0, 0), expand=False)
    for column in columns:
        number = column.startswith(">")
        made.add_column(column.removeprefix(">"), justify="right" if number else "left", no_wrap=number,
                        overflow="fold")
    return made


def sections(*parts: RenderableType | None) -> RenderableType:
    """The parts that are there, an empty line between them."""
    return Group(*(Padding(p, (0, 0, 1, 0)) for p in parts if p is not None))


def place(module: str, source: str) -> str:
    """Module path and source line, one under the other."""
    return "\n".join(filter(None, (module, source)))


def name(function: str, node: str) -> str:
    """A node, and the block function it stands in if it does."""
    return node if function == "main" else f"{node}\nin {function}"
