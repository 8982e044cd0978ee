"""What became of the components of a parallel pipeline, call by call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from xdit_compile.driver.compile_call import Compiled
from xdit_compile.pipelines.memory import together
from xdit_compile.report.costs import costs_of
from xdit_compile.report.loop_invariants import with_invariants
from xdit_compile.report.memory import RankMemory, by_kind, result_bytes
from xdit_compile.report.operations import program_flops
from xdit_compile.report.tables import sections, table
from xdit_compile.report.text import jsonable, plain
from xdit_compile.report.units import plural, size, work
from xdit_compile.spec import ShardingSpec


@dataclass(frozen=True)
class ComponentReport:
    """One kind of call of a component, or a component that is left as it is.

    Attributes:
        component, model: its name in the pipeline, and its class.
        what: how it runs.
        spec: under which spec, if it is compiled; flops, sent, activations: operations, bytes sent and bytes of
            activations at the worst moment, of this rank in one call; ``whole`` flops and activations of one device.
        saved: operations that a call leaves out if what they depend on has not changed; kept: bytes for that.
    """

    component: str
    model: str
    what: str
    spec: ShardingSpec | None = None
    flops: int = 0
    sent: int = 0
    activations: int = 0
    whole_flops: int = 0
    whole_activations: int = 0
    saved: int = 0
    kept: int = 0


@dataclass(frozen=True)
class ComponentMemory:
    """What a component takes on this rank: its weights as they are, all else as its programs say."""

    component: str
    memory: RankMemory


@dataclass(frozen=True)
class PipelineReport:
    """What a parallel pipeline has run so far, as this rank sees it.

    Attributes:
        kept: calls that used what was kept of a step before.
        skipped: steps that left blocks out, of those ``decided`` upon; approximate: the words of the spec that change
            results.
        fetched: how often results of calls that groups take turns in were exchanged, by how many calls each exchange
            served; with one, groups waited for each other and nothing was gained.
        memory: what each component takes on this rank; peak: the most bytes that PyTorch held on the GPU so far.
        sent: bytes this rank sent in those exchanges; stages_sent, results_sent: as a stage of a pipeline, to later
            stages, and of results to all.
    """

    pipeline: str
    spec: ShardingSpec
    rank: int
    parts: tuple[ComponentReport, ...]
    fetched: Mapping[int, int]
    sent: int
    stages_sent: int = 0
    results_sent: int = 0
    kept: int = 0
    skipped: int = 0
    decided: int = 0
    memory: tuple[ComponentMemory, ...] = ()
    peak: int = 0

    @property
    def approximate(self) -> str:
        return self.spec.approximate

    @property
    def memory_of_all(self) -> RankMemory:
        """What all components take that run one after the other."""
        return together(m.memory for m in self.memory)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as what JSON can say."""
        whole = self.memory_of_all
        return jsonable(self) | {"spec": str(self.spec), "approximate": self.approximate,
                                 "memory_of_all": jsonable(whole) | {"device": whole.device}}

    def __rich__(self) -> RenderableType:
        rows = table("Components", "component", "class", "how", ">operations", ">x ranks", ">sent", ">activations",
                     ">of", ">saved", ">kept")
        for p in self.parts:
            figures = () if p.spec is None else (
                work(p.flops), f"{p.flops * p.spec.world_size / max(p.whole_flops, 1):.3f}", size(p.sent),
                size(p.activations), size(p.whole_activations), work(p.saved), size(p.kept))
            rows.add_row(p.component, p.model, p.what, *figures)
        turns = table("Calls taken in turns", ">calls at once", ">times", "")
        for calls, times in sorted(self.fetched.items()):
            turns.add_row(str(calls), str(times), "nothing gained" if calls == 1 else "")
        head = Text(f"{self.pipeline} under {self.spec}, rank {self.rank} of {self.spec.world_size}; per call")
        sent = Text(f"{size(self.sent)} sent for them") if self.fetched else None
        staged = Text(f"{size(self.stages_sent)} sent to later stages, {size(self.results_sent)} of results"
                      ) if self.spec.pipefusion_degree > 1 else None
        kept = Text(f"{plural(self.kept, 'call')} used what was kept of a step before")
        skipped = Text(said_of_steps(self.skipped, self.decided)) if self.decided else None
        loose = Text(f"approximate by {self.approximate}") if self.approximate else None
        return sections(head, rows, kept, skipped, loose, turns if self.fetched else None, sent, staged,
                        self._memory())

    def _memory(self) -> Table:
        found = {m.component: by_kind(m.memory) for m in self.memory} | {"all": by_kind(self.memory_of_all)}
        kinds = [kind for kind in found["all"] if any(of[kind] for of in found.values())]
        peak = f"; PyTorch held {size(self.peak)} at most" if self.peak else ""
        made = table(f"Memory of this rank, at the worst moment so far{peak}", "component", *(f">{k}" for k in kinds))
        for name, of in found.items():
            made.add_row(name, *(size(of[kind]) if of[kind] else "" for kind in kinds))
        return made

    def __str__(self) -> str:
        return plain(self)


def said_of_steps(skipped: int, decided: int) -> str:
    """What steps have left out."""
    return f"{skipped} of {plural(decided, 'step')} left blocks out, and added what these had added before"


def component_report(component: str, model: str, what: str, compiled: Compiled) -> ComponentReport:
    """The figures of one compiled kind of call."""
    local = with_invariants(costs_of(compiled.local), compiled.invariant, compiled.body)
    whole = costs_of(compiled.whole)
    invariant = compiled.stage.invariant if compiled.stage else compiled.invariant
    fallbacks = sum(note.kind == "fallback" for note in compiled.local.notes)
    said = f"{what}; {plural(fallbacks, 'operator')} computed whole for want of a rule" if fallbacks else what
    said += f"; steps may leave out {plural(len(compiled.left_out), 'block')}" if compiled.left_out else ""
    return ComponentReport(
        component, model, said, compiled.local.spec, local.flops, local.sent, local.activations, whole.flops,
        whole.activations, program_flops(invariant) if invariant else 0, result_bytes(invariant) if invariant else 0)
