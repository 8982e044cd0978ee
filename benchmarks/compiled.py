"""How long does compiled code take to make and to run, against torch.compile of the whole model?

A random Flux (diffusers) on one process of one thread, the same weights and inputs for both:

* whole: ``torch.compile(model, fullgraph=True)``;
* ours: ``parallelize(model, "backend=inductor")``: the captured graph, each kind of block compiled once;
* graph: of that the compiled graph alone, without looking up which graph a call is for and whether ranks agree.

    python benchmarks/compiled.py
    python benchmarks/compiled.py --rounds 41 --json compiled.json
    python benchmarks/compiled.py --double 2 --single 2 --hidden 128 --tokens 64 --text 16 --rounds 5
    python benchmarks/compiled.py --cold-rounds 0  # only how fast both run

A cold start is the first call, with capture, passes and compiling, in a fresh process whose cache of compiled code is
empty; a warm one the same with the cache that the cold one has left. What inductor does once on a machine (it tries
what the C++ compiler and the processor can do) is done before, by a function of one addition, for both alike. Starts
are given in seconds, and in CPU seconds of the process and of the compilers that it starts, which other work on the
machine disturbs less. Running is timed in turns in one process: medians of all rounds, and the median of the ratios
within each.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flux
import torch
from rich.console import Console
from rich.table import Table
from torch._dynamo.utils import counters
from tqdm import trange

from xdit_compile import parallelize
from xdit_compile.ir.call_arguments import call_arguments
from xdit_compile.ir.pytree import flatten

WAYS: dict[str, Callable[[Any], Any]] = {
    "whole": lambda model: torch.compile(model, fullgraph=True),
    "ours": lambda model: parallelize(model, "backend=inductor"),
}


def main() -> None:
    options = _options()
    size = flux.Size(options.tokens, options.text, options.hidden, options.double, options.single)
    if options.start:
        print(json.dumps(start(options.start, size)))
        return
    report = {"size": vars(size), "torch": torch.__version__, "threads": torch.get_num_threads(),
              "starts": [starts(sys.argv[1:]) for _ in trange(options.cold_rounds, desc="starts")],
              "running": running(size, options.rounds)}
    show(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2))


@torch.no_grad()
def start(way: str, size: flux.Size) -> dict[str, Any]:
    """What the first call takes in this process."""
    model, inputs = flux.model(size), flux.inputs(size)
    torch.compile(lambda x: x + 1)(torch.ones(8))
    counters.clear()
    before, cpu = time.perf_counter(), _cpu_seconds()
    WAYS[way](model)(**inputs)
    found = {"seconds": time.perf_counter() - before}
    # Compilers are counted when they have ended.
    from torch._inductor.async_compile import shutdown_compile_workers

    shutdown_compile_workers()
    return found | {"cpu": _cpu_seconds() - cpu, "graphs": counters["stats"]["unique_graphs"],
                    "found in the cache": counters["inductor"]["fxgraph_cache_hit"]}


def _cpu_seconds() -> float:
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used)


def starts(arguments: list[str]) -> dict[str, Any]:
    """By way, a cold start and a warm one."""
    found: dict[str, Any] = {}
    for way in WAYS:
        with tempfile.TemporaryDirectory() as cache:
            env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
            for kind in ("cold", "warm"):
                command = [sys.executable, __file__, *arguments, "--start", way]
                said = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
                found[f"{way} {kind}"] = json.loads(said.splitlines()[-1])
    return found


@torch.no_grad()
def running(size: flux.Size, rounds: int) -> dict[str, Any]:
    """Seconds of each round by way, in turns, and the largest difference of the results."""
    model, inputs = flux.model(size), flux.inputs(size)
    ways = {name: make(model) for name, make in WAYS.items()}
    results = [way(**inputs)[0] for way in ways.values()]
    (ready,) = ways["ours"].runners["forward"].programs.values()
    tensors, _ = flatten(call_arguments(model, inputs))
    ways["graph"] = lambda **inputs: ready.executor(tensors)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    for _ in trange(rounds + 2, desc="rounds"):
        order.append(order.pop(0))  # so that none always begins
        for name in order:
            before = time.perf_counter()
            ways[name](**inputs)
            taken[name].append(time.perf_counter() - before)
    return {"seconds": {name: t[2:] for name, t in taken.items()},
            "difference": (results[0] - results[1]).abs().max().item()}


def show(report: dict[str, Any]) -> None:
    table = Table("", "whole", "ours", "ours / whole", title="compiled: seconds")
    for kind in ("cold", "warm"):
        for figure in ("seconds", "cpu"):
            both = [[s[f"{way} {kind}"][figure] for s in report["starts"]] for way in WAYS]
            if report["starts"]:
                whole, ours = map(statistics.median, both)
                label = "start" if figure == "seconds" else "start, CPU seconds"
                table.add_row(f"{kind} {label}", f"{whole:.1f}", f"{ours:.1f}", f"{ours / whole:.2f}")
    taken = report["running"]["seconds"]
    for label, way in (("a call", "ours"), ("a call, the graph alone", "graph")):
        whole, ours = (statistics.median(taken[name]) for name in ("whole", way))
        pairs = statistics.median(b / a for a, b in zip(taken["whole"], taken[way], strict=True))
        best = min(taken[way]) / min(taken["whole"])
        table.add_row(label, f"{whole:.3f}", f"{ours:.3f}",
                      f"{ours / whole:.3f}, in pairs {pairs:.3f}, at best {best:.3f}")
    Console().print(table)
    Console().print(f"largest difference of the results: {report['running']['difference']:.1e}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, text in (
        ("tokens", 256, "image tokens"), ("text", 64, "text tokens"), ("hidden", 384, "width, a multiple of 64"),
        ("double", 8, "double-stream blocks"), ("single", 16, "single-stream blocks"),
        ("rounds", 21, "calls of each that are timed"), ("cold-rounds", 1, "cold and warm starts of each"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default {default})")
    parser.add_argument("--json", type=Path, help="also write every figure to this file")
    parser.add_argument("--start", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
