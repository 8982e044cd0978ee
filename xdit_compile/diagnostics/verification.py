"""Whether a parallel model is right: the result of ``verify``, and how it reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rich.console import RenderableType
from rich.text import Text

from xdit_compile.diagnostics.blame import NodeDifference
from xdit_compile.diagnostics.difference import Difference
from xdit_compile.report.tables import name, place, sections, table
from xdit_compile.report.text import jsonable, plain
from xdit_compile.report.units import plural
from xdit_compile.spec import ShardingSpec

Cause = Literal["", "capture", "rewriting", "execution", "stages", "approximate"]


@dataclass(frozen=True)
class OutputDifference:
    """One tensor among the model's results, and the largest differences found on any rank."""

    index: int
    shape: tuple[int, ...]
    dtype: str
    absolute: float
    relative: float


@dataclass(frozen=True)
class Verification:
    """What comparing found; the same on every rank.

    Attributes:
        outputs: every tensor among the results.
        cause: where a difference comes from. ``capture``: the captured program is not the model;
            ``rewriting``: ``nodes`` are the first values that ranks hold wrongly; ``execution``: every value
            is right when nodes run one by one, so it is what the backend makes of the program; ``stages``: no rank
            has all parameters any more, so that the node cannot be found; verify under ``ulysses`` finds it;
            ``approximate``: the spec asks for less than all, and ``verify_approximate`` says what of it is lost.
    """

    model: str
    spec: ShardingSpec
    tolerance: float
    outputs: tuple[OutputDifference, ...]
    cause: Cause = ""
    nodes: tuple[NodeDifference, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every output is within the tolerance."""
        return not any(Difference(o.absolute, o.relative).exceeds(self.tolerance) for o in self.outputs)

    @property
    def worst(self) -> float:
        """The largest relative difference of any output."""
        return max((o.relative for o in self.outputs), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as what JSON can say."""
        return jsonable(self) | {"spec": str(self.spec), "ok": self.ok}

    def summary(self) -> str:
        """One line."""
        where = f"{self.model} under {self.spec} on {plural(self.spec.world_size, 'rank')}"
        if self.ok:
            return (f"{where}: {plural(len(self.outputs), 'output')} equal to one device's within {self.tolerance:g} "
                    f"(largest relative difference {self.worst:.2g})")
        return f"{where}: DIFFERS by {self.worst:.2g} (tolerance {self.tolerance:g}). {_blame(self)}"

    def __rich__(self) -> RenderableType:
        outputs = table("Outputs", "output", "type", ">absolute", ">relative")
        for o in self.outputs:
            outputs.add_row(str(o.index), f"{o.dtype} {list(o.shape)}", f"{o.absolute:.3g}", f"{o.relative:.3g}")
        nodes = table("The first values that differ, in order", "node", "where", "layout", "ranks", ">absolute",
                      ">relative")
        for n in self.nodes:
            nodes.add_row(name(n.function, f"{n.node} = {n.operator}"), place(n.module, n.source), n.layout,
                          ",".join(map(str, n.ranks)), f"{n.absolute:.3g}", f"{n.relative:.3g}")
        return sections(Text(self.summary()), outputs, nodes if self.nodes else None)

    def __str__(self) -> str:
        return plain(self)


def _blame(v: Verification) -> str:
    if v.cause == "capture":
        return ("The captured program already differs from the model on one device: its forward depends on "
                "something that is no input, such as a Python value that changes between calls, or draws "
                "random numbers.")
    if v.cause == "stages":
        return ("No rank has all parameters any more, so that the first operator that differs cannot be named; verify "
                "the model under ulysses=2, which names it.")
    if v.cause == "approximate":
        return (f"The spec approximates by {v.spec.approximate}: verify --approximate says how far a loop of steps "
                "ends from one device's; without these words the results are equal.")
    if v.cause == "execution":
        return f"Run node by node every value is right: the difference is made by backend={v.spec.backend}."
    first = v.nodes[0]
    ranks = f"rank{'' if len(first.ranks) == 1 else 's'} {','.join(map(str, first.ranks))}"
    where = ", ".join(filter(None, (first.module, first.source, ranks)))
    return f"First at {first.function}.{first.node} ({first.operator}): {where}."
