"""Timing work that several processes of a machine do together, with an eye on what else the machine does."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

DISTURBED = 0.05
"""The share of this machine's CPU in the hands of other processes from which on seconds say little."""


class Taken(NamedTuple):
    """What some work took, the same on every rank.

    Attributes:
        seconds: until the slowest rank was done.
        cpu_seconds: CPU time of all ranks and all their threads, those of gloo too.
        others: the share of this machine's CPU that other processes took meanwhile; NaN where not known.
    """

    seconds: float
    cpu_seconds: float
    others: float


def time_once(work: Callable[[], object] | None) -> Taken:
    """Time ``work``, which begins on all ranks at once. A rank without any waits, its core left alone."""
    # gloo's barrier blocks on a condition variable, so that waiting takes no CPU time.
    dist.barrier()
    before = _clocks()
    if work is not None:
        work()
    after = _clocks()
    dist.barrier()
    mine = torch.tensor([after.wall - before.wall, after.own - before.own], dtype=torch.float64)
    ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, mine if work is not None else mine * 0)
    walls, owns = torch.stack(ranks).unbind(1)
    cpu = owns.sum().item()
    return Taken(walls.max().item(), cpu, _others(before, _clocks(), cpu))


def time_undisturbed(work: Callable[[], object] | None, patience: int) -> Taken:
    """Time ``work`` when other processes leave this machine alone.

    Up to ``patience`` seconds are spent waiting for that; then it is timed as it is.
    """
    for _ in range(patience):
        before = _clocks()
        time.sleep(1)
        if not _others(before, _clocks(), 0.0) > DISTURBED:
            taken = time_once(work)
            if not taken.others > DISTURBED:
                return taken
    return time_once(work)


class _Clocks(NamedTuple):
    wall: float
    own: float
    machine: tuple[float, float]
    """CPU seconds of all processes, and what the cores could have done; both 0 where that is not known."""


def _clocks() -> _Clocks:
    machine = (0.0, 0.0)
    if os.path.exists("/proc/stat"):
        with open("/proc/stat") as file:
            user, nice, system, idle, waiting, irq, softirq, steal, *_ = map(int, file.readline().split()[1:])
        busy = user + nice + system + irq + softirq + steal
        tick = os.sysconf("SC_CLK_TCK")
        machine = (busy / tick, (busy + idle + waiting) / tick)
    return _Clocks(time.perf_counter(), time.process_time(), machine)


def _others(before: _Clocks, after: _Clocks, cpu: float) -> float:
    """The share of other processes between two moments in which all ranks together took ``cpu`` seconds."""
    # One view of the machine for all ranks, because what they do next depends on it.
    busy, whole = (b - a for a, b in zip(before.machine, after.machine, strict=True))
    machine = torch.tensor([busy, whole], dtype=torch.float64)
    dist.broadcast(machine, 0)
    busy, whole = machine.tolist()
    return max(0.0, busy - cpu) / whole if whole else float("nan")
