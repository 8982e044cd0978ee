"""Whether a rank's memory fits a device, and which words of the spec would make it fit."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from xdit_compile.report.memory import RankMemory
from xdit_compile.report.tables import sections, table
from xdit_compile.report.units import size


@dataclass(frozen=True)
class Trial:
    """Another spec for the same call: what a rank would take, or why it does not go."""

    spec: str
    memory: RankMemory | None
    problem: str = ""


@dataclass(frozen=True)
class Fit:
    """Whether a rank fits a device of so many bytes; ``trials`` are other specs, where it does not."""

    device_memory: int
    memory: RankMemory
    trials: tuple[Trial, ...] = ()

    @property
    def fits(self) -> bool:
        return self.memory.device <= self.device_memory

    def __rich__(self) -> RenderableType:
        most = size(self.device_memory)
        if self.fits:
            return Text(f"It fits a device of {most}: this rank takes {size(self.memory.device)}")
        head = Text(f"It does not fit a device of {most}: this rank takes {size(self.memory.device)}")
        return sections(head, self._trials())

    def _trials(self) -> Table:
        made = table("What other words would take", "spec", ">on the device", ">on the host", "fits")
        for t in self.trials:
            if t.memory is None:
                made.add_row(t.spec, "", "", t.problem)
            else:
                made.add_row(t.spec, size(t.memory.device), size(t.memory.host) if t.memory.host else "",
                             "yes" if t.memory.device <= self.device_memory else "no")
        return made
