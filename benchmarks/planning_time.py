"""What it takes to plan FLUX.1-dev for 8 and for 64 devices, by parts.

    python benchmarks/planning_time.py

The model is on the meta device, at its full size. Estimating is for all specs, checking for the best of them.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import xdit_compile
from xdit_compile.planner.costs import Loop
from xdit_compile.planner.machine import machine
from xdit_compile.planner.plan import Planner, Question

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))  # not the benchmark of that name

import published

MACHINES = ("8xh100", "8xl40-pcie", "8x8xh100", "8x8xl40-pcie+ethernet-100g")

STEPS = 28


class Laps:
    """Seconds of the processor by what was said to be done: each goes on until the next is said."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.times: dict[str, int] = {}
        self._last, self._doing = time.process_time(), ""

    def __call__(self, said: str) -> None:
        now = time.process_time()
        if self._doing:
            self.seconds[self._doing] = self.seconds.get(self._doing, 0.0) + now - self._last
        self._last, self._doing = now, said.partition(" ")[0]
        self.times[self._doing] = self.times.get(self._doing, 0) + 1


def page() -> str:
    """What there is to say, with a table."""
    start = time.process_time()
    model, inputs = published.flux_dev()
    made = time.process_time()
    program = xdit_compile.capture(model, inputs)
    captured = time.process_time()
    lines = [f"Planning FLUX.1-dev at 1024x1024, {STEPS} steps, from nothing for each machine. Seconds of a core.",
             f"To make the model took {made - start:.1f} s, its capture {captured - made:.1f} s.", "",
             "| machine | devices | estimated | seconds | checked | seconds | planning, all | chosen |",
             "|---|---:|---:|---:|---:|---:|---:|---|"]
    for name in MACHINES:
        here, laps = machine(name), Laps()
        begin = time.process_time()
        plan = Planner(program).plan(Question(here, here.world_size, Loop(STEPS)), laps)
        laps("end")
        total = time.process_time() - begin
        parts = " | ".join(f"{laps.times[part]} specs | {laps.seconds[part]:.1f}" for part in ("counting", "checking"))
        lines.append(f"| {name} | {here.world_size} | {parts} | {total:.1f} | {plan.best.spec} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python benchmarks/planning_time.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="the page (default: printed)")
    options = parser.parse_args()
    text = page()
    if options.output:
        options.output.write_text(text)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
