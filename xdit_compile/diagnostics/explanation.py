"""What making one call of a model parallel would do: the result of ``explain``, and how it reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from xdit_compile.diagnostics.block_boxes import BlockBox
from xdit_compile.diagnostics.fit import Fit
from xdit_compile.diagnostics.html_page import write_page
from xdit_compile.diagnostics.stage_costs import Stages
from xdit_compile.ir.pass_record import PassRecord
from xdit_compile.report.costs import Costs
from xdit_compile.report.loop_invariants import InvariantWork
from xdit_compile.report.memory import RankMemory, by_kind
from xdit_compile.report.tables import name, place, sections, table
from xdit_compile.report.text import jsonable, plain
from xdit_compile.report.units import plural, size, work
from xdit_compile.spec import ShardingSpec


@dataclass(frozen=True)
class WeightCut:
    """Parameters that tensor ranks share out alike: their name, ``*`` for the numbers of blocks, how many there are."""

    name: str
    layout: str
    count: int


@dataclass(frozen=True)
class Row:
    """One operator, or one decision about it.

    Attributes:
        function, node: where it stands in the program; module, source: whose forward made it, and the line.
        text: what was decided.
        times: how often it runs in one forward.
        sent: bytes this rank sends for it in one forward.
        flops: this rank's operations for it in one forward, where they are the point.
    """

    function: str
    node: str
    module: str
    source: str
    text: str
    times: int
    sent: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Traffic:
    """All collectives of one kind and purpose in one function; ``count`` and ``sent`` are per forward."""

    kind: str
    axis: str
    ranks: int
    why: str
    function: str
    module: str
    source: str
    count: int
    sent: int


@dataclass(frozen=True)
class RankFigures:
    """What one rank computes, sends and takes in a forward: operations, bytes, memory."""

    rank: int
    flops: int
    sent: int
    memory: RankMemory


@dataclass(frozen=True)
class Explanation:
    """What ``rank`` would do under ``spec``, and what one device does without it.

    Attributes:
        model: the class's name.
        functions: how often each function of the program runs in one forward; ``main`` is the forward itself,
            the others are blocks captured once.
        operators: how many nodes of each operator were captured.
        capture_seconds, passes_seconds: how long it took to make the program; what was captured before is not
            captured again.
        seeds: where the token axes start.
        attentions, convolutions: each of them, and what became of it.
        traffic: the collectives, largest first.
        fallbacks: operators computed whole for want of a rule.
        replicated: the most expensive operators that every rank computes whole.
        replicated_flops: this rank's operations in all that every rank computes whole.
        local, whole: costs of this rank, and of the model on one device; under ``pipefusion``, of one step.
        kept: what of ``local`` is computed at the first step only; None if nothing is.
        stages: of a pipeline, what each of them does; the rows above are then those of this rank's stage.
        passes: what each pass did, in order.
        memory: what this rank takes; fit: whether that fits the device that was asked about.
        weights: which parameters tensor ranks share out, and how.
        blocks: what the rank runs, block by block, in order.
        ranks: the figures of all ranks, if they were asked for.
        left_out: the paths of blocks that steps may leave out; ``local`` is of a step that does not.
    """

    model: str
    spec: ShardingSpec
    rank: int
    functions: Mapping[str, int]
    operators: Mapping[str, int]
    capture_seconds: float
    passes_seconds: float
    seeds: tuple[Row, ...]
    attentions: tuple[Row, ...]
    convolutions: tuple[Row, ...]
    traffic: tuple[Traffic, ...]
    fallbacks: tuple[Row, ...]
    replicated: tuple[Row, ...]
    replicated_flops: int
    local: Costs
    whole: Costs
    kept: InvariantWork | None = None
    stages: Stages | None = None
    passes: tuple[PassRecord, ...] = ()
    memory: RankMemory = field(default_factory=RankMemory)
    fit: Fit | None = None
    weights: tuple[WeightCut, ...] = ()
    blocks: tuple[BlockBox, ...] = ()
    ranks: tuple[RankFigures, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def work_ratio(self) -> float:
        """This rank's operations, times the number of ranks, over those of one device: 1.0 is ideal."""
        return self.local.flops * self.spec.world_size / max(self.whole.flops, 1)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as what JSON can say."""
        fields = jsonable(self)
        local, whole = fields.pop("local"), fields.pop("whole")
        costs = {"flops": local["flops"], "flops_single_device": whole["flops"],
                 "work_ratio": self.work_ratio, "bytes_sent": self.local.sent,
                 "collectives": self.local.collective_count,
                 "peak_activation_bytes": local["activations"],
                 "peak_activation_bytes_single_device": whole["activations"]}
        fields["passes"] = [record.to_dict() for record in self.passes]
        fields["memory"] |= {"device": self.memory.device}
        return fields | {"spec": str(self.spec), "world_size": self.spec.world_size, "costs": costs,
                         "collectives": local["collectives"]}

    def summary(self) -> str:
        """One line."""
        ranks = self.spec.world_size
        missing = (f"{plural(len(self.fallbacks), 'operator')} computed whole for want of a rule" if self.fallbacks
                   else "a rule for every operator")
        staged = f"{size(self.stages.sent(self.rank))} to later stages; " if self.stages else ""
        kept = f"{self.kept}; " if self.kept else ""
        return (f"{self.model} under {self.spec}: {work(self.local.flops)} per rank, {self.work_ratio:.3f}/{ranks} of "
                f"one device; {plural(self.local.collective_count, 'collective')} sending "
                f"{size(self.local.sent)}; {staged}activations {size(self.local.activations)} of "
                f"{size(self.whole.activations)}; {kept}{missing}")

    @property
    def figures(self) -> RankFigures:
        """Those of the rank that is described."""
        sent = self.local.sent + (self.stages.sent(self.rank) if self.stages else 0)
        return RankFigures(self.rank, self.local.flops, sent, self.memory)

    def write_page(self, path: str | Path, *, flops_per_second: float = 100e12, bytes_per_second: float = 10e9,
                   steps: int = 8) -> None:
        """Write all of it as one page for a browser, with pictures; the file is there whole or not at all.

        Args:
            flops_per_second, bytes_per_second: of each device, for the bars of time.
            steps: of denoising, in the picture of stages.

        Raises:
            XditError: the file cannot be written.
        """
        write_page(self, path, flops_per_second, bytes_per_second, steps)

    def verdict(self) -> str:
        """The one line to read first: what the spec would give."""
        ranks = self.spec.world_size
        if ranks == 1:
            return f"{self.model} on one device: {work(self.whole.flops)}, {size(self.memory.device)}"
        share = self.local.flops / max(self.whole.flops, 1)
        parts = [f"{share:.1%} of the work on each of {ranks} devices (ideal {1 / ranks:.1%})",
                 f"{size(self.memory.device)} of memory", f"{size(self.figures.sent)} sent"]
        if self.fallbacks:
            parts.append(f"{plural(len(self.fallbacks), 'operator')} computed whole")
        if self.spec.approximate:
            blocks = f", leaving out up to {plural(len(self.left_out), 'block')} in a step" if self.left_out else ""
            parts.append(f"approximate by {self.spec.approximate}{blocks}")
        if self.fit is not None:
            parts.append("fits" if self.fit.fits else "does NOT fit")
        return f"{self.model} under {self.spec}: {', '.join(parts)}"

    def __rich__(self) -> RenderableType:
        ranks = self.spec.world_size
        head = Text.assemble((self.model, "bold"), f" under {self.spec}, rank {self.rank} of {ranks}")
        nodes = sum(self.operators.values())
        blocks = ", ".join(f"{f} x{times}" for f, times in self.functions.items())
        captured = Text(f"Captured {plural(nodes, 'node')} of {plural(len(self.operators), 'operator')} in "
                        f"{self.capture_seconds:.1f} s, passes {self.passes_seconds:.1f} s. Functions: {blocks}")
        return sections(
            Text(self.verdict(), "bold"), Group(head, captured), _costs(self), _memory(self), self.fit, _kept(self),
            self.stages,
            _rows("Where the token axes start", self.seeds, self),
            _rows("Attention", self.attentions, self, sent=True),
            _rows("Convolutions", self.convolutions, self, sent=True),
            _collectives(self), _weights(self),
            _rows("Computed whole, for want of a rule", self.fallbacks, self),
            _replicated(self), _passes(self))

    def __str__(self) -> str:
        return plain(self)


def _costs(e: Explanation) -> Table:
    made = table("One forward", "", ">one device", ">this rank", ">ratio x ranks")
    ratio = e.local.activations * e.spec.world_size / max(e.whole.activations, 1)
    made.add_row("operations", work(e.whole.flops), work(e.local.flops), f"{e.work_ratio:.3f}")
    made.add_row("peak activations", size(e.whole.activations), size(e.local.activations), f"{ratio:.3f}")
    made.add_row("bytes sent", "", size(e.local.sent), "")
    if e.stages:
        made.add_row("bytes to later stages", "", size(e.stages.sent(e.rank)), "")
    made.add_row("collectives", "", f"{e.local.collective_count:,}", "")
    return made


def _memory(e: Explanation) -> Table:
    made = table("Memory of this rank, at the worst moment", "", ">bytes")
    for what, nbytes in by_kind(e.memory).items():
        if nbytes:
            made.add_row(what, size(nbytes))
    return made


def _kept(e: Explanation) -> Text | None:
    if e.kept is None:
        return None
    said = str(e.kept)
    return Text(f"{said[0].upper()}{said[1:]} for each prompt; what changes: {', '.join(e.kept.changes)}")


def _rows(title: str, rows: Iterable[Row], e: Explanation, sent: bool = False) -> Table | None:
    made = table(title, "node", "where", "what", ">times", *([">sent"] if sent else []))
    for row in rows:
        made.add_row(name(row.function, row.node), place(row.module, row.source), row.text, str(row.times),
                     *([size(row.sent)] if sent else []))
    return made if made.row_count else None


def _collectives(e: Explanation) -> Table | None:
    made = table("Collectives, per forward", "kind", "over", "where", "for", ">count", ">sent")
    for t in e.traffic:
        made.add_row(t.kind, f"{t.axis} of {t.ranks}", place(t.module or t.function, t.source), t.why,
                     f"{t.count:,}", size(t.sent))
    return made if made.row_count else None


def _weights(e: Explanation) -> Table | None:
    made = table("Weights that tensor ranks share out", "weight", "layout", ">count")
    for w in e.weights:
        made.add_row(w.name, w.layout, str(w.count))
    return made if made.row_count else None


def _replicated(e: Explanation) -> Table | None:
    share = e.replicated_flops / max(e.local.flops, 1)
    made = table(f"Computed whole by every rank: {share:.1%} of this rank's operations, the largest first",
                 "node", "where", "what", ">times", ">share")
    for row in e.replicated:
        made.add_row(name(row.function, row.node), place(row.module, row.source), row.text, str(row.times),
                     f"{row.flops / max(e.local.flops, 1):.2%}")
    return made if made.row_count else None


def _passes(e: Explanation) -> Table | None:
    made = table("Passes", "pass", "source", ">seconds", ">nodes before", ">after", "noted")
    for p in e.passes:
        noted = ", ".join(f"{count} {kind}" for kind, count in p.matched.items())
        made.add_row(p.name, p.digest, f"{p.seconds:.3f}", f"{p.nodes_before:,}", f"{p.nodes_after:,}", noted)
    return made if made.row_count else None
