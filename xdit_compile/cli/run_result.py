"""What came of a request: the result of the command ``run``, and how it reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from xdit_compile.report.tables import sections, table
from xdit_compile.report.text import jsonable, plain
from xdit_compile.report.units import plural, size
from xdit_compile.spec import ShardingSpec


@dataclass(frozen=True)
class Run:
    """What came of it, as rank 0 saw it.

    Attributes:
        seconds: of the call that was kept.
        steps: of denoising, 0 where the pipeline does not tell.
        warmup_calls: with none, ``seconds`` includes capturing the models.
        peak_memory: bytes on the GPU of each rank; nothing on CPUs.
        files: what was written.
        notes: warnings, and results that no file was written for.
    """

    model: str
    pipeline: str
    spec: ShardingSpec
    device: str
    dtype: str
    load_seconds: float
    seconds: float
    steps: int
    warmup_calls: int
    peak_memory: tuple[int, ...]
    files: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def processes(self) -> int:
        return self.spec.world_size

    @property
    def seconds_per_step(self) -> float | None:
        return self.seconds / self.steps if self.steps else None

    def to_dict(self) -> dict[str, Any]:
        """Everything, as what JSON can say."""
        return jsonable(self) | {"spec": str(self.spec), "processes": self.processes,
                                 "seconds_per_step": self.seconds_per_step}

    def __rich__(self) -> RenderableType:
        each = f", {self.seconds_per_step:.3g} s for each of {plural(self.steps, 'step')}" if self.steps else ""
        first = "" if self.warmup_calls else ", capturing the models included"
        where = f"{plural(self.processes, 'process', 'processes')} ({self.device}, {self.dtype})"
        head = Text.assemble((self.pipeline, "bold"), f" under {self.spec} on {where}: {self.seconds:.2f} s{each}"
                             f"{first}; loaded in {self.load_seconds:.2f} s")
        memory = table("Peak memory", "rank", ">bytes")
        for rank, peak in enumerate(self.peak_memory):
            memory.add_row(str(rank), size(peak))
        files, notes = table("Written", "file"), table("To be noted", "")
        for made, lines in ((files, self.files), (notes, self.notes)):
            for line in lines:
                made.add_row(Text(line))
        return sections(head, *(made for made in (memory, files, notes) if made.row_count))

    def __str__(self) -> str:
        return plain(self)
