"""What the stages of a pipeline have to do, keep and send."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from rich.console import RenderableType
from rich.table import Table

from xdit_compile.diagnostics.timeline_plot import draw
from xdit_compile.passes.pipefusion import Pipeline, stage_costs
from xdit_compile.report.tables import sections, table
from xdit_compile.report.units import plural, size, work
from xdit_compile.runtime.pipefusion.schedule import RESULT, WHOLE, Edge, Timeline, check, schedule, simulate
from xdit_compile.spec import ALL, ShardingSpec


@dataclass(frozen=True)
class StageCosts:
    """One rank of a stage, in one step of denoising.

    Attributes:
        blocks: paths of its blocks; parameters: bytes of what it uses.
        once: operations that all patches share; units: operations of each patch, and ``whole`` of an exact step.
        kept: bytes of keys, values and the like that stay from step to step.
        sent: bytes to other ranks of the stage.
    """

    blocks: tuple[str, ...]
    parameters: int
    once: int
    units: tuple[int, ...]
    whole: int
    kept: int
    sent: int

    @property
    def flops(self) -> int:
        """Operations of a step in patches."""
        return self.once + sum(self.units)


@dataclass(frozen=True)
class Stages:
    """All stages of one program, and what goes from stage to stage.

    Attributes:
        patches: how the sample is cut, by the names of arguments.
    """

    spec: ShardingSpec
    stages: tuple[StageCosts, ...]
    edges: tuple[Edge, ...]
    patches: tuple[str, ...]

    def sent(self, rank: int) -> int:
        """Bytes that ``rank`` sends to later stages in a step of patches; results aside."""
        stage = rank // self.spec.ranks_per_stage % self.spec.pipefusion_degree
        return sum(sum(e.nbytes) for e in self.edges if e.source == stage and e.name != RESULT)

    def timeline(self, steps: int, flops_per_second: float, bytes_per_second: float) -> Timeline:
        """So many steps by the schedule.

        Args:
            flops_per_second: of each rank; bytes_per_second: of each link between two stages.
        """
        warmup = steps if self.spec.warmup_steps == ALL or self.spec.patches == 1 else int(self.spec.warmup_steps)
        plan = schedule(len(self.stages), self.spec.patches, steps, warmup, self.edges)
        check(plan)

        def seconds(stage: int, unit: int) -> float:
            costs = self.stages[stage]
            shared = costs.once / (1 if unit == WHOLE else len(costs.units))
            return (shared + (costs.whole if unit == WHOLE else costs.units[unit])) / flops_per_second

        return simulate(plan, seconds, lambda edge, unit: (
            edge.whole if unit == WHOLE else edge.nbytes[unit]) / bytes_per_second)

    def draw(self, path: str | Path, steps: int, flops_per_second: float, bytes_per_second: float) -> None:
        """Write a picture of that: SVG, PNG or PDF, by the name of the file."""
        draw({"predicted": self.timeline(steps, flops_per_second, bytes_per_second)}, path)

    def __rich__(self) -> RenderableType:
        rows = table(f"Stages, per step of {plural(max(self.spec.patches, 1), 'patch', 'patches')}", "stage", "blocks",
                     ">parameters", ">operations", ">once", ">kept", ">to its ranks", ">to later stages")
        for i, s in enumerate(self.stages):
            blocks = f"{s.blocks[0]} to {s.blocks[-1]} ({len(s.blocks)})" if len(s.blocks) > 1 else s.blocks[0]
            rows.add_row(str(i), blocks, size(s.parameters), work(s.flops), work(s.once), size(s.kept), size(s.sent),
                         size(self.sent(i * self.spec.ranks_per_stage)))
        return sections(rows, self._edges(), self._patches())

    def _edges(self) -> Table:
        made = table("Between stages, per step", "what", "from", "to", ">bytes", ">largest patch")
        for e in self.edges:
            made.add_row(e.name, str(e.source), str(e.target), size(sum(e.nbytes)), size(max(e.nbytes)))
        return made

    def _patches(self) -> Table | None:
        made = table("Patches", "of")
        for line in self.patches:
            made.add_row(line)
        return made if self.patches else None


def stages_of(pipeline: Pipeline, edges: tuple[Edge, ...]) -> Stages:
    """The costs of all stages; counts, and makes no programs."""
    spec = pipeline.whole.spec
    assert spec is not None
    made = []
    for stage, (once, units) in zip(pipeline.stages, stage_costs(pipeline), strict=True):
        patches = [t for unit, t in units.items() if unit != WHOLE] or [units[WHOLE]]
        held = {i.name: n.meta["val"] for p in (stage.once, stage.body) for i, n in zip(
            p.inputs, p.main.graph.find_nodes(op="placeholder"), strict=True) if i.kind == "parameter"}
        made.append(StageCosts(
            stage.blocks, sum(math.prod(t.shape) * t.dtype.itemsize for t in held.values()), once.flops,
            tuple(t.flops for t in patches), units[WHOLE].flops, units[WHOLE].stale_bytes if spec.patches > 1 else 0,
            once.sent + sum(t.sent for t in patches)))
    return Stages(spec, tuple(made), edges, tuple(
        f"{name}: {layout}" for name, layout in pipeline.seeds.items() if any(len(d.segments) for d in layout.dims)))
