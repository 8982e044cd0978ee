"""How many times as fast is a denoising loop in two stages, under pipefusion=2, as on one process?

A random mid-size Flux, the same on all ranks; one thread per process; the same loop of element-wise steps, in turns:
alone on one process while the others wait without using their cores, then in stages.

    python benchmarks/pipefusion.py
    python benchmarks/pipefusion.py --rounds 5 --steps 12 --spec pipefusion=2,patches=8 --timeline flow.svg
    python benchmarks/pipefusion.py --patience 600  # on a machine that has other work now and then

"Times as fast" is the ratio of medians, "in pairs" the median of the ratios within each round. "Without warm-up" leaves
out the first step, which is exact and runs one stage after the other, on both sides. The bubble is the share of their
time, from the first to the last patch, in which stages do not compute; predicted is that of the schedule.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import flux
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from timing import DISTURBED, time_undisturbed
from torch import Tensor
from tqdm import trange

from xdit_compile import ShardingSpec, launch, parallelize, timeline
from xdit_compile.runtime.deferred.deferred_tensor import materialize


def loop(model: Any, inputs: dict[str, Any], steps: int) -> tuple[Tensor, float]:
    """The sample after so many steps, and the seconds of the first."""
    sample, start, first = inputs["hidden_states"], time.perf_counter(), 0.0
    for i in range(steps):
        (out,) = model(**inputs | {"hidden_states": sample, "timestep": torch.tensor([1.0 - i / steps])})
        if i == 0:
            out = materialize(out)
            first = time.perf_counter() - start
        sample = sample - out / steps
    return materialize(sample), first


def run(size: flux.Size, spec: str, steps: int, rounds: int, patience: int, picture: str | None) -> dict[str, Any]:
    """The figures; runs on every rank of an initialised group."""
    alone, inputs = flux.model(size), flux.inputs(size)
    model = parallelize(flux.model(size), spec)
    taken: dict[str, list[dict[str, float]]] = {"alone": [], "stages": []}
    firsts: list[float] = []
    bubbles, quiet = [], dist.get_rank() != 0
    with torch.no_grad():
        exact, stale = (loop(m, inputs, 3)[0] for m in (alone, model))
        for _ in trange(rounds, desc="rounds", disable=quiet):
            for name, its in (("alone", alone if not quiet else None), ("stages", model)):
                work = its and (lambda its=its: firsts.append(loop(its, inputs, steps)[1]))
                time_taken = time_undisturbed(work, patience)
                taken[name].append({**time_taken._asdict(), "first": firsts[-1] if firsts else 0.0})
            bubbles.append(timeline(model))
    (ready,) = model.runners["forward"].programs.values()
    if not quiet and picture:
        bubbles[-1].draw(picture)
    return {"taken": taken, "sent": ready.executor.communicator.sent / (3 + rounds * steps),
            "difference": ((stale - exact).abs().max() / exact.abs().max()).item(),
            "bubbles": [(t.measured.bubble(1), t.predicted.bubble(1)) for t in bubbles],
            "parameters": sum(p.nbytes for p in model.parameters() if not p.is_meta),
            "all_parameters": sum(p.nbytes for p in alone.parameters())}


def table(result: dict[str, Any], spec: str) -> Table:
    """The figures of rank 0, for people."""
    alone, stages = result["taken"]["alone"], result["taken"]["stages"]

    def ratio(seconds: Any) -> tuple[float, float]:
        a, b = [seconds(t) for t in alone], [seconds(t) for t in stages]
        return statistics.median(a) / statistics.median(b), statistics.median(x / y for x, y in zip(a, b, strict=True))

    whole, rest = ratio(lambda t: t["seconds"]), ratio(lambda t: t["seconds"] - t["first"])
    made = Table(title=f"one process and {spec}")
    for column in ("", "times as fast", "in pairs"):
        made.add_column(column)
    made.add_row("whole loop", *(f"{x:.2f}" for x in whole))
    made.add_row("without warm-up", *(f"{x:.2f}" for x in rest))
    one, both = (sum(t["cpu_seconds"] for t in its) for its in (alone, stages))
    made.add_row("by CPU time", f"{2 * one / both:.2f}")
    measured, predicted = (statistics.median(b[i] for b in result["bubbles"]) for i in (0, 1))
    made.add_row("bubble, measured and predicted", f"{measured:.1%}", f"{predicted:.1%}")
    made.add_row("kB sent a step", f"{result['sent'] / 1e3:.1f}")
    made.add_row("parameters of this rank, MB", f"{result['parameters'] / 1e6:.1f}",
                 f"of {result['all_parameters'] / 1e6:.1f}")
    made.add_row("difference after three steps", f"{result['difference']:.1e}")
    if any(t["others"] > DISTURBED for t in alone + stages):
        made.caption = "other processes were busy: say little of the seconds"
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--spec", default="pipefusion=2,patches=8", help="sharding spec (default: %(default)s)")
    for name, default in (("tokens", 1024), ("text", 128), ("hidden", 512), ("double", 4), ("single", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--patience", type=int, default=0, help="seconds to wait for a quiet machine, each time")
    parser.add_argument("--timeline", metavar="SVG", help="draw the last round")
    parser.add_argument("--json", type=Path, help="write all figures")
    options = parser.parse_args()
    size = flux.Size(options.tokens, options.text, options.hidden, options.double, options.single)
    spec = ShardingSpec.parse(options.spec)
    results = launch(run, size, str(spec), options.steps, options.rounds, options.patience, options.timeline,
                     world_size=spec.world_size)
    Console().print(table(results[0], str(spec)))
    if options.json:
        options.json.write_text(json.dumps(results[0], indent=1))


if __name__ == "__main__":
    main()
