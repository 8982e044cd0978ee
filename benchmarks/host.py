"""What does a call cost that computes next to nothing? All of its time is host time, which a GPU would wait for.

The graph of FLUX.1-dev (19 double-stream and 38 single-stream blocks) at a tiny width, on one process of one thread:

* plain: the model as it is;
* whole: ``torch.compile(model, fullgraph=True)`` (``--compile``);
* ours: ``parallelize(model, "ulysses=1")``, eager, or with ``--compile`` ``backend=inductor``;
* runner: of ours, what is not the program itself: which program the call is for, whether ranks agree, its results;
* of N: ours as rank 0 of N (``--ranks 8``, ``ulysses=8``), whose process groups are fake: they send nothing, and what
  other ranks hold is what this one does.

    python benchmarks/host.py
    python benchmarks/host.py --compile --double 2 --single 4
    python benchmarks/host.py --compile --ranks 8
    python benchmarks/host.py --compile --ranks 8 --cpu
    python benchmarks/host.py --profile 25          # where ours spends its time

Timed in turns; the least of each and the median of the ratios within a round are shown.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import flux
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm import trange

from xdit_compile import parallelize
from xdit_compile.runtime import parallel_group
from xdit_compile.runtime.control.agreement_channel import DIGEST, AgreementChannel
from xdit_compile.runtime.control.control_plane import ControlPlane
from xdit_compile.runtime.execution.executor import Executor


class Clock:
    """Adds up the seconds that programs themselves take, as ``now`` counts them."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.seconds = 0.0
        run = Executor.__call__

        def timed(executor: Executor, *args: Any, **kwargs: Any) -> Any:
            start = now()
            try:
                return run(executor, *args, **kwargs)
            finally:
                self.seconds += now() - start

        Executor.__call__ = timed  # type: ignore[method-assign]


def step(call: Callable[..., Any], inputs: dict[str, Any], calls: int,
         now: Callable[[], float] = time.perf_counter) -> float:
    """Seconds for each of some calls that follow each other as in a denoising loop."""
    start = now()
    for i in range(calls):
        call(**{**inputs, "timestep": torch.full_like(inputs["timestep"], 1 - (i + 1) / (calls + 1))})
    return (now() - start) / calls


class FakeGloo:
    """All ranks hold what this one sends."""

    def alltoall_base(self, got: torch.Tensor, sent: torch.Tensor, *_: Any) -> FakeGloo:
        got.copy_(sent)
        return self

    def wait(self) -> None: ...


class FakeControl(ControlPlane):
    """That of a rank whose peers are not there: it compares, in its thread, with copies of its own."""

    def __init__(self, ranks: Sequence[int], *_: Any) -> None:
        super().__init__(ranks[:1])
        self.ranks = tuple(ranks)
        self._heart = cast(Any, SimpleNamespace(call=0, label="", known=None, waiting=False, ended=0, connections=[],
                                                      step=int, needing_others=nullcontext))
        self._close = cast(Any, SimpleNamespace(alive=True))
        self._channels.append(AgreementChannel(FakeGloo(), self.ranks, lambda text: text[:DIGEST].ljust(DIGEST), print))

    def agree(self, what: str, mine: Mapping[str, str]) -> None: ...

    def guard(self, label: str, groups: Sequence[Any] = ()) -> AbstractContextManager[Any]:
        return nullcontext()

    def patiently(self, what: str, make: Callable[[], Any]) -> Any:
        return make()


def of_many(model: nn.Module, spec: str, ranks: int) -> Callable[..., Any]:
    """The model as rank 0 of so many."""
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=ranks)
    parallel_group.ControlPlane = FakeControl  # type: ignore[misc]
    return parallelize(model, f"ulysses={ranks},{spec}", ranks=range(ranks))


@torch.no_grad()
def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    size = flux.Size(options.tokens, options.text, options.hidden, options.double, options.single, options.head_dim)
    model, inputs = flux.model(size), flux.inputs(size)
    spec = "backend=inductor" if options.compile else "backend=eager"
    ways: dict[str, Callable[..., Any]] = {"plain": flux.model(size), "ours": parallelize(model, spec)}
    if options.ranks > 1:
        ways[f"of {options.ranks}"] = of_many(flux.model(size), spec, options.ranks)
    if options.compile:
        ways["whole"] = torch.compile(flux.model(size), fullgraph=True)
    for call in ways.values():
        step(call, inputs, 2)
    if options.profile:
        with cProfile.Profile() as profile:
            step(ways["ours"], inputs, options.calls * 5)
        pstats.Stats(profile).sort_stats("tottime").print_stats(options.profile)
    now = time.thread_time if options.cpu else time.perf_counter
    clock, found = Clock(now), {name: list[float]() for name in (*ways, "runner")}
    for _ in trange(options.rounds, desc="rounds"):
        for name, call in ways.items():
            clock.seconds = 0.0
            found[name].append(step(call, inputs, options.calls, now))
            if name == "ours":
                found["runner"].append(found[name][-1] - clock.seconds / options.calls)
    return found


def show(found: dict[str, list[float]], base: str) -> None:
    table = Table("", "ms a call", f"of {base}")
    for name, seconds in found.items():
        ratio = statistics.median(a / b for a, b in zip(seconds, found[base], strict=True))
        table.add_row(name, f"{min(seconds) * 1e3:.2f}", f"{ratio:.3f}")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"double": 19, "single": 38, "hidden": 64, "tokens": 16, "text": 8, "rounds": 11, "calls": 5,
                          "profile": 0, "ranks": 1, "head_dim": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--compile", action="store_true", help="compiled by inductor, both")
    parser.add_argument("--cpu", action="store_true", help="CPU time of the calling thread, which other work on the "
                                                           "machine disturbs less")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(options)
    show(found, "whole" if options.compile else "plain")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
