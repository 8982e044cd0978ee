"""How fast is a model whose parameters come block by block, or are shared out? A random Flux, one thread per process.

    python benchmarks/weights.py
    python benchmarks/weights.py --rounds 9 --tokens 4096 --json weights.json
    python benchmarks/weights.py --patience 600  # on a machine that has other work now and then
    python benchmarks/weights.py --pairs 1 --tokens 16384 --double 1 --single 3     # shares alone, a long sequence

`ulysses=2,shard=2` against `ulysses=2` on two processes, `offload=block` against nothing on one while the other waits,
and `tensor=2` and `ulysses=2` on two against nothing on one, in turns. "Speed" is the median over rounds of how much
longer the other takes in the same round; "by CPU" counts CPU seconds, those of gloo's threads too, of which there are
no spare cores here. Of the first two pairs results are the same bits.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flux
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from timing import time_undisturbed

from xdit_compile import ShardingSpec, launch, parallelize

PAIRS = (("ulysses=2", "ulysses=2,shard=2"), ("ulysses=1", "offload=block"), ("ulysses=1", "tensor=2"),
         ("ulysses=1", "ulysses=2"))


@torch.no_grad()
def run(size: flux.Size, pairs: Sequence[tuple[str, str]], rounds: int,
        patience: int) -> dict[str, list[dict[str, float]]]:
    """What each spec took in each round, the same on both ranks."""
    given, forwards, results = flux.inputs(size), dict[str, Any](), dict[str, Any]()
    taken: dict[str, list[dict[str, float]]] = {}
    for spec in dict.fromkeys(spec for pair in pairs for spec in pair):
        alone = ShardingSpec.parse(spec).world_size == 1
        if not alone or dist.get_rank() == 0:
            forwards[spec] = parallelize(flux.model(size), spec, ranks=[0] if alone else [0, 1])
            (results[spec],) = forwards[spec](**given)
        dist.barrier()
    for plain, other in pairs[:2]:
        assert other not in results or torch.equal(results[plain], results[other])
    for number in range(rounds):
        for turn, pair in enumerate(pairs):
            for spec in pair if number % 2 else pair[::-1]:
                work = partial(forwards[spec], **given) if spec in forwards else None
                taken.setdefault(f"{turn} {spec}", []).append(time_undisturbed(work, patience)._asdict())
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 512), ("double", 2), ("single", 6), ("tokens", 4096), ("text", 128),
                          ("rounds", 5), ("patience", 0), ("pairs", len(PAIRS))):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    size = flux.Size(options.tokens, options.text, options.hidden, options.double, options.single)
    pairs = PAIRS[:options.pairs]
    taken = launch(run, size, pairs, options.rounds, options.patience, world_size=2, device="cpu")[0]
    made = Table("spec", "seconds", "speed", "by CPU", "others' share of the machine")
    for turn, (plain, other) in enumerate(pairs):
        for spec in (plain, other):
            before, now = taken[f"{turn} {plain}"], taken[f"{turn} {spec}"]
            ratios = [[a[key] / b[key] for a, b in zip(before, now, strict=True)] for key in ("seconds", "cpu_seconds")]
            made.add_row(spec, f"{statistics.median(t['seconds'] for t in now):.2f}",
                         *(f"{statistics.median(r):.3f}" for r in ratios),
                         f"{statistics.median(t['others'] for t in now):.0%}")
    Console().print(made)
    if options.json:
        options.json.write_text(json.dumps(taken, indent=2))


if __name__ == "__main__":
    main()
