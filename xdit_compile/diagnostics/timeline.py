"""When the stages of a pipeline ran, and when the schedule says they should have."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from xdit_compile.diagnostics.timeline_plot import draw
from xdit_compile.driver.model_runner import ReadyProgram
from xdit_compile.driver.parallel_model import Parallel
from xdit_compile.errors import XditError
from xdit_compile.pipelines.parallel_pipeline import ParallelPipeline
from xdit_compile.report.operations import program_flops
from xdit_compile.runtime.pipefusion.schedule import Bar, Timeline, schedule_of_run, simulate
from xdit_compile.runtime.pipefusion.stage_executor import StageExecutor


@dataclass(frozen=True)
class Timelines:
    """The last denoising loop of one pipeline of stages, from its first step that is not exact.

    Attributes:
        measured: what the stages did, by the clocks of their machines.
        predicted: the schedule, if a unit took as long as its share of the operations and nothing were waited for but
            what it needs; scaled to the time that the stages ran in all.
    """

    measured: Timeline
    predicted: Timeline

    def draw(self, path: str | Path) -> None:
        """Write a picture of both: SVG, PNG or PDF, by the name of the file."""
        draw({"predicted": self.predicted, "measured": self.measured}, path)

    def __str__(self) -> str:
        return (f"{self.measured.seconds:.2f} s, stages idle {self.measured.bubble():.0%} of it; predicted "
                f"{self.predicted.seconds:.2f} s and {self.predicted.bubble():.0%}")


def timeline(parallel: Any) -> Timelines:
    """How a model or pipeline under ``pipefusion`` ran last. All ranks ask together, when results are used.

    Raises:
        XditError: nothing ran in stages.
    """
    models = vars(parallel).values() if isinstance(parallel, ParallelPipeline) else [parallel]
    found = [(ready, ready.executor) for m in models if isinstance(m, Parallel)
             for runner in m.runners.values() for ready in runner.programs.values()
             if isinstance(ready.executor, StageExecutor)]
    found = [(ready, executor) for ready, executor in found if executor.history]
    if not found:
        raise XditError("nothing ran in stages yet: parallelize with pipefusion=2 or more and run a denoising loop")
    return _of(*found[-1])


def _of(ready: ReadyProgram, executor: StageExecutor) -> Timelines:
    spec = ready.group.spec
    mine = [astuple(bar) for bar in executor.bars], {unit: program_flops(p) for unit, p in executor.stage.units.items()}
    everyone = [([Bar(*bar) for bar in bars], work) for bars, work in ready.group.gather(
        "timeline(), which all ranks ask for together", mine)]
    stages = [everyone[i * spec.ranks_per_stage] for i in range(spec.pipefusion_degree)]
    bars = [bar for its, _ in stages for bar in its]
    start = min((b.start for b in bars), default=0.0)
    measured = Timeline(tuple(b.since(start) for b in bars), len(stages))
    run = sum(b.end - b.start for b in bars if b.kind == "run")
    work = sum(stages[b.stage][1][b.unit] for b in bars if b.kind == "run")
    plan = schedule_of_run(len(stages), executor.history, executor.stage.edges)
    predicted = simulate(plan, lambda stage, unit: stages[stage][1][unit] * run / max(work, 1), lambda edge, unit: 0.0)
    return Timelines(measured, predicted)
