"""Reports as tables for a terminal."""

from __future__ import annotations

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

GAP = 2
"""Blanks between two columns."""


def table(title: str, *columns: str) -> Table:
    """An empty table; a column whose name begins with ``>`` holds numbers."""
    made = Table(title=Text(title, style="bold"), title_justify="left", box=None, pad_edge=False,
                 header_style="dim", padding=(0, GAP, 0, 0), expand=False)
    for column in columns:
        number = column.startswith(">")
        made.add_column(column.removeprefix(">"), justify="right" if number else "left", no_wrap=number,
                        overflow="fold")
    return made


class WholeWords:
    """A table none of whose columns is narrower than its longest word: identifiers are never broken, and where the
    terminal is too narrow for that, lines are longer than it is wide."""

    def __init__(self, made: Table) -> None:
        self.made = made
        self.title, made.title = made.title, None  # which would be as narrow as the table

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(self._width([least for least, _ in self._wants()]),
                           self._width([most for _, most in self._wants()]))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wants = self._wants()
        widths = [least for least, _ in wants]
        room = sum(most - least for least, most in wants)
        left = min(max(options.max_width - self._width(widths), 0), room)
        for i, (least, most) in enumerate(wants):
            share = -(-left * (most - least) // max(room, 1))
            widths[i], left, room = least + share, left - share, room - (most - least)
        for column, width in zip(self.made.columns, widths, strict=True):
            column.width = width
        if self.title is not None:
            yield self.title
        yield from console.render(self.made, options.update_width(max(options.max_width, self._width(widths))))

    def _wants(self) -> list[tuple[int, int]]:
        """Of each column, the length of its longest word and of its longest line."""
        wants = []
        for column in self.made.columns:
            cells = [Text.from_markup(c) if isinstance(c, str) else c for c in (column.header, *column.cells)]
            lines = [line for cell in cells for line in str(cell).split("\n")]
            words = lines if column.no_wrap else [word for line in lines for word in line.split()]
            wants.append((max(map(len, words), default=0), max(map(len, lines), default=0)))
        return wants

    def _width(self, columns: list[int]) -> int:
        return sum(columns) + GAP * max(len(columns) - 1, 0)


def sections(*parts: RenderableType | None) -> RenderableType:
    """The parts that are there, an empty line between them."""
    shown = (WholeWords(p) if isinstance(p, Table) else p for p in parts if p is not None)
    return Group(*(Padding(p, (0, 0, 1, 0)) for p in shown))


def place(module: str, source: str) -> str:
    """Module path and source line, one under the other."""
    return "\n".join(filter(None, (module, source)))


def name(function: str, node: str) -> str:
    """A node, and the block function it stands in if it does."""
    return node if function == "main" else f"{node}\nin {function}"
