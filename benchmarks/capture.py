"""How long does it take to capture a published model, and to make one rank's program of it?

The models are those of examples/published.py: full size, on the meta device, so no weights and no processes.
Each is done in a process of its own, and nothing else runs meanwhile.

    python benchmarks/capture.py
    python benchmarks/capture.py --models flux_dev wan21_14b_720p --spec ulysses=4,ring=2
    python benchmarks/capture.py --json capture.json

"capture" are the seconds from the module to the captured program, "plan" those until it is known what to
shard, "localize" those until rank 0's program is there; CPU seconds in all are beside them, for machines that
do other work meanwhile. "new size" are the CPU seconds in all when the same model is then called with a picture of
another size. Nodes are counted as captured (repeated blocks once) and as they run in one forward.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from xdit_compile.driver.compile_call import compile_program
from xdit_compile.frontend.capture import capture
from xdit_compile.frontend.gc_pause import gc_paused
from xdit_compile.ir.program import Program
from xdit_compile.passes import localize, plan
from xdit_compile.spec import ShardingSpec

sys.path.append(str(Path(__file__).resolve().parents[1]))

from examples.published import PUBLISHED

ANOTHER = {"flux_dev": {"size": 768}}
"""Sizes to go on to, of models whose example takes one."""


@dataclass(frozen=True)
class Result:
    """One model; ``problem`` says why there are no figures."""

    problem: str = ""
    build_seconds: float = 0.0
    capture_seconds: float = 0.0
    plan_seconds: float = 0.0
    localize_seconds: float = 0.0
    cpu_seconds: float = 0.0
    new_size_cpu_seconds: float | None = None
    functions: int = 0
    captured_nodes: int = 0
    running_nodes: int = 0
    local_nodes: int = 0
    local_running_nodes: int = 0
    parameters: int = 0
    peak_bytes: int = 0


def main() -> None:
    options = _options()
    results: dict[str, Result] = {}
    # One task per process: nothing is warm but the imports, which are not timed.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for name in tqdm(options.models, "capturing"):
            results[name] = pool.submit(measure, name, options.spec).result()
    show(options.spec, results)
    if options.json:
        report = {
            "spec": options.spec,
            "torch": torch.__version__,
            "models": {n: asdict(r) for n, r in results.items()},
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def measure(name: str, spec: str) -> Result:
    """Build, capture, plan and localize one model in this process."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    parsed = ShardingSpec.parse(spec)
    start = time.perf_counter()
    model, kwargs = PUBLISHED[name]()
    built, cpu = time.perf_counter(), time.process_time()
    try:
        with gc_paused():
            program = capture(model, (), kwargs)
            captured = time.perf_counter()
            whole, seeds = plan(program, parsed)
            planned = time.perf_counter()
            local = localize(whole, seeds, rank=0)
        done = time.perf_counter()
        spent = time.process_time() - cpu
        again = None
        if name in ANOTHER:
            _, kwargs = PUBLISHED[name](**ANOTHER[name])
            cpu = time.process_time()
            compile_program(capture(model, (), kwargs), parsed)
            again = time.process_time() - cpu
    except Exception as error:  # reported, and the next model is done
        return Result(f"{type(error).__name__}: {error}")
    # In kilobytes on Linux, in bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if os.uname().sysname == "Linux" else 1)
    return Result(
        "",
        built - start,
        captured - built,
        planned - captured,
        done - planned,
        spent,
        again,
        len(program.calls()),
        *nodes(program),
        *nodes(local),
        sum(p.numel() for p in model.parameters()),
        peak,
    )


def nodes(program: Program) -> tuple[int, int]:
    """Operators in the program, and how many of them one forward runs."""
    calls = program.calls()
    found = {name: sum(n.op == "call_function" for n in m.graph.nodes) for name, m in program.functions()}
    return sum(found.values()), sum(count * calls[name] for name, count in found.items())


def show(spec: str, results: dict[str, Result]) -> None:
    """The table."""
    table = Table(title=f"capture and passes, {spec}, torch {torch.__version__}")
    headings = (
        "",
        "parameters",
        "capture s",
        "plan s",
        "localize s",
        "CPU s",
        "new size",
        "functions",
        "nodes captured",
        "nodes run",
        "nodes run by one rank",
        "peak GB",
    )
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    for name, r in results.items():
        if r.problem:
            table.add_row(name, "-")
            continue
        table.add_row(
            name,
            f"{r.parameters / 1e9:.1f} B",
            f"{r.capture_seconds:.1f}",
            f"{r.plan_seconds:.1f}",
            f"{r.localize_seconds:.1f}",
            f"{r.cpu_seconds:.1f}",
            "" if r.new_size_cpu_seconds is None else f"{r.new_size_cpu_seconds:.1f}",
            str(r.functions),
            f"{r.captured_nodes:,}",
            f"{r.running_nodes:,}",
            f"{r.local_running_nodes:,}",
            f"{r.peak_bytes / 1e9:.1f}",
        )
    console = Console()
    # Where the output is a file, rich would fold the table to 80 columns.
    Console(width=console.width if console.is_terminal else 150).print(table)
    for name, r in results.items():
        if r.problem:
            console.print(f"failed: {name}: {r.problem}", style="yellow", markup=False)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/capture.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--models",
        nargs="+",
        choices=PUBLISHED,
        default=[*PUBLISHED],
        metavar="NAME",
        help=f"which of {', '.join(PUBLISHED)} (all)",
    )
    parser.add_argument("--spec", default="ulysses=8", help="how to shard (ulysses=8)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
