"""What the command ``calibrate`` does, and its flags."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from xdit_compile.planner.auto import machine_file
from xdit_compile.planner.calibrate import Calibration, measure, write
from xdit_compile.runtime.launch import init_from_env, launch

HELP = """\
Measure this machine for the planner: matrix products, attention, other work, and, between ranks, links by the size of a
group. Takes some seconds. Under torchrun all its ranks take part; alone, it starts as many as --world-size says.

examples:
  xdit-compile calibrate
  xdit-compile calibrate -o my.toml --world-size 4
  torchrun --nproc-per-node 8 -m xdit_compile.cli calibrate -o my.toml
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The flags of ``calibrate``."""
    command.add_argument("-o", "--output", metavar="FILE", help="the file, which is there whole or not at all "
                         "(default: where spec=\"auto\" and plan look for it)")
    command.add_argument("--world-size", type=int, default=1, metavar="N", help="processes to start (default 1)")
    command.add_argument("--json", action="store_true", help="print the report as JSON")


def run(options: argparse.Namespace, progress: Callable[[str], None]) -> Calibration:
    """Carry it out.

    Raises:
        XditError: the file cannot be written.
    """
    path = Path(options.output) if options.output else machine_file()
    if "RANK" in os.environ:
        init_from_env()
        made = calibrated(str(path), progress)
        dist.destroy_process_group()
        return made
    if options.world_size > 1:
        return launch(calibrated, str(path), world_size=options.world_size)[0]
    return calibrated(str(path), progress)


def calibrated(path: str, progress: Callable[[str], None] = lambda _: None) -> Calibration:
    """What one rank does; rank 0 writes the file."""
    start = time.perf_counter()
    found = measure(progress)
    if not dist.is_initialized() or dist.get_rank() == 0:
        write(found, Path(path))
    return Calibration(found, path, time.perf_counter() - start)
