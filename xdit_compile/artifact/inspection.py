"""What an artifact holds, for people: read from its files, with nothing run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from xdit_compile.artifact.entries import Entry
from xdit_compile.artifact.files import ArtifactFolder
from xdit_compile.artifact.json_values import nbytes_of
from xdit_compile.artifact.load import ArtifactLoader, StoredProgram
from xdit_compile.artifact.memory import Memory
from xdit_compile.artifact.running import Running
from xdit_compile.errors import ArtifactError
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
        memory: what a rank takes at most, as the artifact says; `load` compares it with the programs of each rank.
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
    memory: Memory
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
                             f"{size(self.parameters)}, of which {size(self.included)} are included\n"
                             f"a rank takes at most {size(self.memory.total)}: {self.memory}")
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
        check_all: compare the hashes of all files, weights as well, and read the programs of all ranks.

    Raises:
        ArtifactError: it is damaged.
    """
    folder = ArtifactFolder.at(path)
    manifest = folder.manifest
    parts = manifest["parts"].items()
    for name, entry in parts:
        folder.file(Entry(name, entry.where), whole=check_all)
    loading = ArtifactLoader(folder, Running(), "cpu")
    for rank in range(loading.spec.world_size) if check_all else (0,):
        loading.memory(rank).check(loading.declared, str(folder.path))
    rows = tuple(_row(call.of(0), call.spec, call.looks) for call in loading.calls)
    held = {name: nbytes_of(look) for name, look in loading.tensors.items()}
    own = {name.text() for _, names in manifest["weights"].items() for name in names.parts()}
    if unknown := own - held.keys():
        raise ArtifactError(f"{manifest['weights'].where} has {sorted(unknown)[0]!r:.100}, which is no tensor of it")
    return Inspection(
        str(folder.path), folder.digest, manifest["model"]["class"].text(), str(loading.spec),
        loading.spec.world_size, manifest["device"].text(), {k: v.text() for k, v in manifest["made_with"].items()},
        rows, sum(held[n] for n, e in manifest["tensors"].items() if "same_as" not in e), sum(held[n] for n in own),
        loading.declared, len(parts), sum(e["bytes"].whole() for _, e in parts), check_all)


def _row(made: StoredProgram, spec: Any, looks: Any) -> CallRow:
    stage = made.stage
    programs = (stage.invariant, stage.once, *stage.units.values()) if stage else (made.invariant, made.body)
    step: list[Program] = [stage.once, stage.units[-1]] if stage else [made.body]
    costs: list[Costs] = [costs_of(p) for p in step]
    kept = costs_of(made.invariant).flops if made.invariant else 0
    tensors = tuple(f"{str(dtype).removeprefix('torch.')}{list(shape)}" for shape, dtype in looks)
    return CallRow(tensors, str(spec), sum(p is not None for p in programs), sum(c.flops for c in costs) + kept,
                   sum(c.collective_count for c in costs), sum(c.sent for c in costs), kept)
