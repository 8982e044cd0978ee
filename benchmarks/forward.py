"""How many times as fast is one forward of a random Flux on several processes of this machine?

Every way to split it runs on the same weights and inputs in the same processes, in turns: one thread per
process, the plain model in one process while the others wait without using their cores.

    python benchmarks/forward.py
    python benchmarks/forward.py --rounds 15 --json forward.json
    python benchmarks/forward.py --tokens 256 --text 64 --hidden 256 --double 2 --single 2
    python benchmarks/forward.py --patience 600  # on a machine that has other work now and then
    python benchmarks/forward.py --contestants single ulysses ulysses-inductor diffusers
    python benchmarks/forward.py --contestants tensor diffusers-tensor cache-dit-tensor

"seconds" is the median over the rounds of the slowest rank, "times as fast" the median of the plain model
divided by it, "in pairs" the median of the ratios within each round (slow drifts of the machine disturb it less), "at
best" the ratio of the fastest rounds. "CPU s" are the seconds of CPU time that all ranks
together use for one forward, "by CPU" how many times as fast it would be if nothing else counted: a figure
that other work on the machine hardly disturbs, though it leaves out every wait. Bytes are those that one rank
gives to others in one forward, FLOPs and parameters those of one rank.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import flux
import rounds
import torch
from contestants import CONTESTANTS, DEFAULT
from rich.console import Console
from rich.table import Table
from timing import DISTURBED

from xdit_compile.runtime.launch import launch


def main() -> None:
    options = _options()
    size = flux.Size(options.tokens, options.text, options.hidden, options.double, options.single)
    names = list(dict.fromkeys(["single", *options.contestants]))
    count = (options.rounds, options.warmup, options.patience)
    ranks = launch(rounds.run, size, names, *count, world_size=options.world_size)
    figures = {name: summary(name, [rank[name] for rank in ranks]) for name in names}
    others = statistics.fmean(share for f in figures.values() for share in f.get("others", ()))
    for figure in figures.values():
        compare(figure, figures["single"])
    show(size, options.world_size, options.rounds, figures, others)
    if options.json:
        report = {
            "size": vars(size),
            "world_size": options.world_size,
            "rounds": options.rounds,
            "torch": torch.__version__,
            "machine": platform.machine(),
            "other_work": others,
            "contestants": figures,
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def summary(name: str, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """One contestant's results on all ranks as one: a round takes as long as its slowest rank."""
    if ranks[0]["problem"]:
        return {"problem": ranks[0]["problem"]}
    working = ranks if CONTESTANTS[name].build else ranks[:1]
    seconds, cpu, others = ([t[of] for t in ranks[0]["taken"]] for of in ("seconds", "cpu_seconds", "others"))
    return {
        "ranks": len(working),
        "about": CONTESTANTS[name].about,
        "median_seconds": statistics.median(seconds),
        "best_seconds": min(seconds),
        "seconds": seconds,
        "others": others,
        "cpu_seconds": statistics.median(cpu),
        "first_call_seconds": max(r["first_call"] for r in working),
        "max_difference": max(r["error"] for r in working),
        "flops_per_rank": max(r["flops"] for r in working),
        "parameters_per_rank": max(r["parameters"] for r in working),
        "collectives": working[0]["collectives"],
        "bytes_per_rank": max(r["bytes"] for r in working),
        "control_bytes_per_rank": max(r["control_bytes"] for r in working),
    }


def compare(figure: dict[str, Any], single: dict[str, Any]) -> None:
    """Add how many times as fast as the plain model it is."""
    if "problem" not in figure:
        figure["times_as_fast"] = single["median_seconds"] / figure["median_seconds"]
        figure["times_as_fast_in_pairs"] = statistics.median(
            a / b for a, b in zip(single["seconds"], figure["seconds"], strict=True)
        )
        figure["times_as_fast_at_best"] = single["best_seconds"] / figure["best_seconds"]
        figure["times_as_fast_by_cpu"] = single["cpu_seconds"] / figure["cpu_seconds"] * figure["ranks"]


def show(
    size: flux.Size, world_size: int, count: int, figures: dict[str, dict[str, Any]], others: float
) -> None:
    """The table."""
    title = (
        f"one forward of Flux, {size.tokens} + {size.text} tokens, hidden {size.hidden}, {size.double} + "
        f"{size.single} blocks, float32: {world_size} processes with one thread each, {count} rounds"
    )
    caption = (
        None if others != others else f"other processes took {others:.0%} of this machine's CPU meanwhile"
    )
    if others > DISTURBED:
        caption = f"[bold yellow]{caption}: the seconds say little, run again when it is idle"
    problems: list[str] = []
    table = Table(title=title, caption=caption)
    for heading in (
        "",
        "seconds",
        "times as fast",
        "in pairs",
        "at best",
        "CPU s",
        "by CPU",
        "max difference",
        "GFLOP per rank",
        "M parameters",
        "collectives",
        "MB sent per rank",
    ):
        table.add_column(heading, justify="right" if heading else "left")
    for name, f in figures.items():
        if "problem" in f:
            problems.append(f"{name}: {f['problem']}")
            table.add_row(name, "-")
            continue
        table.add_row(
            name,
            f"{f['median_seconds']:.3f}",
            f"{f['times_as_fast']:.2f}",
            f"{f['times_as_fast_in_pairs']:.2f}",
            f"{f['times_as_fast_at_best']:.2f}",
            f"{f['cpu_seconds']:.3f}",
            f"{f['times_as_fast_by_cpu']:.2f}",
            f"{f['max_difference']:.1e}",
            f"{f['flops_per_rank'] / 1e9:.2f}",
            f"{f['parameters_per_rank'] / 1e6:.2f}",
            str(sum(f["collectives"].values())),
            f"{f['bytes_per_rank'] / 1e6:.2f}",
        )
    console = Console()
    # Where the output is a file, rich would fold the table to 80 columns.
    Console(width=console.width if console.is_terminal else 150).print(table)
    for problem in problems:
        console.print(f"did not run: {problem}", style="yellow", markup=False)


def _options() -> argparse.Namespace:
    assert __doc__ is not None
    about = "\n".join(f"  {c.name:18}{c.about}" for c in CONTESTANTS.values())
    parser = argparse.ArgumentParser(
        prog="python benchmarks/forward.py",
        description=__doc__,
        epilog=f"contestants:\n{about}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokens", type=int, default=1024, help="image tokens (1024)")
    parser.add_argument("--text", type=int, default=256, help="text tokens (256)")
    parser.add_argument("--hidden", type=int, default=512, help="width, heads of 64 (512)")
    parser.add_argument("--double", type=int, default=4, help="double-stream blocks (4)")
    parser.add_argument("--single", type=int, default=8, help="single-stream blocks (8)")
    parser.add_argument("--world-size", type=int, default=2, help="processes (2)")
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds (9)")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before those (2)")
    parser.add_argument(
        "--patience",
        type=int,
        default=0,
        metavar="SECONDS",
        help="for each forward, wait that long for other processes to leave the machine alone (0)",
    )
    parser.add_argument(
        "--contestants",
        nargs="+",
        choices=CONTESTANTS,
        default=DEFAULT,
        metavar="NAME",
        help=f"which to run, 'single' always ({' '.join(DEFAULT)})",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
