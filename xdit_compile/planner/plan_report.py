"""What a plan says: a table of specs, the best first, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from xdit_compile.planner.costs import Seconds
from xdit_compile.report.tables import sections, table
from xdit_compile.report.units import plural, size
from xdit_compile.spec import ShardingSpec

SHOWN = 12
"""Rows of specs, and of reasons, in the text; the JSON has all."""

ALIKE = 1.02
"""Times nearer to each other than this are said to be the same."""


@dataclass(frozen=True)
class Option:
    """A spec and what it takes.

    Attributes:
        seconds: of a whole loop; cost: by which options are ranked: seconds, or for throughput seconds per sample.
        memory: bytes of a rank on its device.
        checked: whether it is counted as the passes plan it, which would refuse it if it did not go; else estimated.
        approximate: whether results differ from those of one device by more than rounding.
    """

    spec: ShardingSpec
    seconds: Seconds
    cost: float
    memory: float
    checked: bool
    approximate: bool

    def to_dict(self) -> dict[str, Any]:
        return {"spec": str(self.spec), "seconds": self.seconds.total, "cost": self.cost, "parts": self.seconds.parts(),
                "memory": int(self.memory), "checked": self.checked, "approximate": self.approximate}


@dataclass(frozen=True)
class Refused:
    """A spec that cannot be, and why."""

    spec: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """Specs for one call of a model on a machine.

    Attributes:
        options: those that are proposed, the best first; estimated: others, of which it was only estimated what they
            take; refused: those that cannot be.
        folklore: what guidance first and then Ulysses would take.
        faster, with_faster: times the bandwidth of links, and the seconds of the best with such links.
        planning: seconds that the plan took.
    """

    model: str
    machine: str
    world: int
    goal: str
    exact: bool
    steps: int
    calls: int
    options: tuple[Option, ...]
    estimated: tuple[Option, ...]
    refused: tuple[Refused, ...]
    folklore: Option | None
    faster: float
    with_faster: float
    planning: float

    @property
    def best(self) -> Option:
        return self.options[0]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"model": self.model, "machine": self.machine, "world_size": self.world, "goal": self.goal,
                "exact": self.exact, "steps": self.steps, "calls_per_step": self.calls,
                "options": [o.to_dict() for o in self.options], "estimated": [o.to_dict() for o in self.estimated],
                "refused": [{"spec": r.spec, "reason": r.reason} for r in self.refused],
                "folklore": self.folklore and self.folklore.to_dict(),
                "links_faster": self.faster, "seconds_with_faster_links": self.with_faster,
                "planning_seconds": self.planning}

    def line(self) -> str:
        """What was chosen and why, in one line."""
        first, *others = self.options
        text = f"auto: {first.spec} for {self.model} on {self.machine}: {duration(first.cost)} {self._unit}"
        if first.approximate:
            text += ", approximate after its exact steps"
        if others:
            more = difference(first.seconds, others[0].seconds)
            text += f"; next {others[0].spec}, {duration(others[0].cost)}: {more}"
        return text

    @property
    def _unit(self) -> str:
        return "a sample" if self.goal == "throughput" else f"for {plural(self.steps, 'step')}"

    def __rich__(self) -> RenderableType:
        head = Text(f"{self.model} on {self.machine}, {plural(self.world, 'device')}, {plural(self.steps, 'step')}"
                    f"{f' of {self.calls} calls' if self.calls > 1 else ''}, for {self.goal}"
                    f"{', exact' if self.exact else ''}; planned in {self.planning:.1f} s")
        return sections(head, self._table(), Text("\n".join(self.reasons())), self._refused())

    def _table(self) -> Table:
        made = table("Specs, the best first", "spec", ">seconds", ">a step", ">memory", "where the time goes", "")
        for option in (*self.options, *sorted(self.estimated, key=lambda o: o.cost))[:SHOWN]:
            marks = [*(["approximate"] if option.approximate else []), *([] if option.checked else ["estimated"])]
            made.add_row(str(option.spec), f"{option.cost:.3g}", duration(option.seconds.total / self.steps),
                         size(option.memory), _parts(option.seconds), ", ".join(marks))
        return made

    def _refused(self) -> Table | None:
        made = table("Refused", "spec", "why")
        seen: dict[str, list[str]] = {}
        for r in self.refused:
            seen.setdefault(r.reason, []).append(r.spec)
        for reason, specs in list(seen.items())[:SHOWN]:
            more = f" and {len(specs) - 2} more" if len(specs) > 2 else ""
            made.add_row("; ".join(specs[:2]) + more, reason)
        return made if seen else None

    def reasons(self) -> Iterator[str]:
        """Why the best is the best, a line each."""
        best = self.best
        yield f"Best: {best.spec}. " + ("Approximate after its exact steps: patches attend to keys and values of the "
                                        "step before." if best.approximate else "Exact.")
        for other in self.options[1:2]:
            yield (f"Next: {other.spec}, {ratio(other, best)}: {difference(best.seconds, other.seconds)}.")
        gain = best.seconds.total - self.with_faster
        yield (f"With links of {self.faster:g} times the bandwidth it would take {duration(self.with_faster)}, "
               f"{gain / best.seconds.total:.0%} less.")
        if self.folklore is not None and self.folklore.spec != best.spec:
            yield (f"Guidance first, then Ulysses ({self.folklore.spec}): {ratio(self.folklore, best)}: "
                   f"{difference(best.seconds, self.folklore.seconds)}.")


def ratio(option: Option, best: Option) -> str:
    """How much longer it takes."""
    times = option.cost / best.cost
    return "takes as long" if times < ALIKE else f"takes {times:.2f} times as long"


def difference(best: Seconds, other: Seconds) -> str:
    """What another choice has more of, in words: the largest two."""
    mine, theirs = best.parts(), other.parts()
    more = sorted(((theirs.get(n, 0.0) - mine.get(n, 0.0), n) for n in mine.keys() | theirs.keys()), reverse=True)
    said = [f"{duration(s)} more of {n}" for s, n in more[:2] if s > 0.01 * best.total]
    return ", ".join(said) or "no part of it differs by a hundredth"


def _parts(seconds: Seconds) -> str:
    return ", ".join(f"{name} {s / seconds.total:.0%}" for name, s in list(seconds.parts().items())[:3])


def duration(seconds: float) -> str:
    """For people."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
