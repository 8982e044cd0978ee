"""What an artifact holds, for people: read from its files, with nothing run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType
from rich.text import Text

from xdit_compile.artifact.files import ArtifactFolder
from xdit_compile.artifact.json_values import look_of
from xdit_compile.artifact.load import ArtifactLoader, StoredProgram, reading
from xdit_compile.ir.program import Program
from xdit_compile.report.costs import Costs, costs_of
from xdit_compile.report.tables import sections, table
from xdit_compile.report.text import jsonable, plain
from xdit_compile.report.units import plural, size, work


@dataclass(frozen=True)
class CallRow:
    """One kind of call and what rank 0 runs for it.

    Attributes:
        tensors: types and shapes of the arguments, in order; spec: that of the ranks which run it together.
        programs: how many a rank has; flops, collectives, sent: of one step, those of all patches for a stage.
        kept: operations that are done once for all steps of a prompt.
    """

    tensors: tuple[str, ...]
    spec: str
    programs: int
    flops: int
    collectives: int
    sent: int
    kept: int


@dataclass(frozen=True)
class Inspection:
    """An artifact.

    Attributes:
        digest: SHA-256 of the manifest, which has those of all other files.
        parameters: bytes of the weights that programs use; included: of those that are in the artifact.
        files, nbytes: of all parts; checked: whether the hash of each was compared.
    """

    path: str
    digest: str
    model: str
    spec: str
    world_size: int
    device: str
    made_with: dict[str, str]
    calls: tuple[CallRow, ...]
    parameters: int
    included: int
    files: int
    nbytes: int
    checked: bool

    def to_dict(self) -> dict[str, Any]:
        return jsonable(self)

    def __rich__(self) -> RenderableType:
        versions = ", ".join(f"{name} {number}" for name, number in self.made_with.items())
        ranks = plural(self.world_size, "process", "processes")
        head = Text.assemble((self.model, "bold"), f" under {self.spec}, for {ranks} on {self.device}\n"
                             f"made with {versions}; manifest sha256 {self.digest}\n"
                             f"{plural(self.files, 'file')}, {size(self.nbytes)}, "
                             f"{'all hashes are right' if self.checked else 'hashes of graphs are right'}; weights "
                             f"{size(self.parameters)}, of which {size(self.included)} are included")
        rows = table("Calls, as rank 0 runs them", "arguments", "spec", ">programs", ">work", ">of it once",
                     ">collectives", ">sent")
        for call in self.calls:
            rows.add_row("\n".join(call.tensors), call.spec, str(call.programs), work(call.flops), work(call.kept),
                         str(call.collectives), size(call.sent))
        return sections(head, rows)

    def __str__(self) -> str:
        return plain(self)


def inspect(path: str | Path, *, check_all: bool = False) -> Inspection:
    """What is in the artifact at ``path``. Graphs are read and checked as `load` does; no processes, no weights.

    Args:
        check_all: compare the hashes of all files, weights as well.

    Raises:
        ArtifactError: it is damaged.
    """
    folder = ArtifactFolder.at(path)
    with reading(folder):
        manifest = folder.manifest
        for name in manifest["parts"]:
            folder.file(name, whole=check_all)
        loading = ArtifactLoader(folder, None, "cpu")
        rows = tuple(_row(call.of(0), call.spec, call.looks) for call in loading.calls)
        held = {name: _nbytes(entry) for name, entry in manifest["tensors"].items()}
        own = {name for names in manifest["weights"].values() for name in names}
        made_with = {str(k): str(v) for k, v in manifest["made_with"].items()}
        return Inspection(
            str(folder.path), folder.digest, str(manifest["model"]["class"]), str(loading.spec),
            loading.spec.world_size, str(manifest["device"]), made_with, rows,
            sum(held[n] for n, e in manifest["tensors"].items() if "same_as" not in e),
            sum(held[n] for n in own), len(manifest["parts"]), sum(e["bytes"] for e in manifest["parts"].values()),
            check_all)


def _row(made: StoredProgram, spec: Any, looks: Any) -> CallRow:
    stage = made.stage
    programs = (stage.invariant, stage.once, *stage.units.values()) if stage else (made.invariant, made.body)
    step: list[Program] = [stage.once, stage.units[-1]] if stage else [made.body]
    costs: list[Costs] = [costs_of(p) for p in step]
    kept = costs_of(made.invariant).flops if made.invariant else 0
    tensors = tuple(f"{str(dtype).removeprefix('torch.')}{list(shape)}" for shape, dtype in looks)
    return CallRow(tensors, str(spec), sum(p is not None for p in programs), sum(c.flops for c in costs) + kept,
                   sum(c.collective_count for c in costs), sum(c.sent for c in costs), kept)


def _nbytes(entry: Any) -> int:
    shape, dtype = look_of(entry)
    return math.prod(shape) * torch.empty((), dtype=dtype).element_size()
