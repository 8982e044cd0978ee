"""Measures the machine at hand in some seconds: what the planner needs to know of it."""

from __future__ import annotations

import math
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import RenderableType
from rich.text import Text

from xdit_compile.errors import XditError
from xdit_compile.planner.device_rates import DeviceRates
from xdit_compile.planner.machine import Link, Machine, Rates
from xdit_compile.report.tables import sections, table
from xdit_compile.report.units import size
from xdit_compile.runtime.control.full_duplex import full_duplex

Progress = Callable[[str], None]

LITTLE, MUCH = 4_096, {"cpu": 524_288, "cuda": 67_108_864}
"""Bytes that a rank sends in the two measurements of a link: next to nothing, and, by the kind of device, as much as in
a model that is run there."""

USABLE = 0.92
"""Of a device's memory; CUDA, NCCL and the allocator take the rest."""


@dataclass(frozen=True)
class Calibration:
    """A machine as it was measured; ``path``: the file that was written; ``seconds`` that it took."""

    machine: Machine
    path: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {"path": self.path, "seconds": self.seconds, "toml": written(self.machine)}

    def __rich__(self) -> RenderableType:
        m = self.machine
        rates = table("Rates of a device", "dtype", ">matrix products", ">attention")
        for dtype, r in m.rates.items():
            rates.add_row(dtype, f"{r.products / 1e9:.4g} GFLOPS", f"{r.attention / 1e9:.4g} GFLOPS")
        links = table("Links", "between")
        for link in m.links:
            links.add_row(str(link))
        return sections(Text(f"{m.name}: {m.world_size} devices of {size(m.memory)}, measured in {self.seconds:.1f} s, "
                             f"written to {self.path}"), rates, links)


def measure(progress: Progress = lambda _: None) -> Machine:
    """The machine that this process is on, and, under torchrun, the links between its ranks: all take part. Every rank
    gets the same figures, those of the slowest rank."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    place = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    device = DeviceRates(place)
    rates, packing = {}, math.inf
    for dtype in device.dtypes():
        progress(f"products and attention in {dtype}")
        products, packing = device.products(dtype)
        rates[str(dtype).removeprefix("torch.")] = Rates(products, device.attention(dtype))
    progress("other work")
    moved = device.moved()
    functions, launch, host_copy = device.functions(moved), device.launch(), device.host_copy()
    progress("links")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    links = tuple(_links(world, local, device)) if world > 1 else ()
    memory = torch.cuda.get_device_properties(place).total_memory if place.type == "cuda" else (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local)
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else f"{platform.machine()} CPU"
    found = Machine(
        name, local, int(memory * USABLE), rates, moved, launch, 0.35 if place.type == "cuda" else 0.8,
        place.type == "cuda", 0.0, 15e-6, host_copy, links or (Link(0, 0, "any", 1e-4, 1e9),),
        max(world // local, 1), functions, packing)
    return found


# Links


def _links(world: int, local: int, device: DeviceRates) -> Iterator[Link]:
    """Of groups of neighbours, of each size that divides the ranks of a node, and of all: all groups at once, as in a
    run. The widest reaches everywhere."""
    spans = sorted({n for n in range(2, local + 1) if local % n == 0} | {world})
    for span in spans:
        groups = [dist.new_group(list(range(first, first + span))) for first in range(0, world, span)]
        mine = full_duplex(groups[dist.get_rank() // span])
        for pattern, ring in (("any", False), ("ring", True)):
            sizes = LITTLE, MUCH[device.place.type]
            latency, much = (device.seconds_after_work(_exchange(mine, nbytes, ring, device.place)) for nbytes in sizes)
            bandwidth = (sizes[1] - sizes[0]) / max(much - latency, 1e-9)
            yield Link(0 if span == world else span, 0, pattern, latency, bandwidth)
        for group in groups:
            if group is not None and group is not dist.GroupMember.NON_GROUP_MEMBER:
                dist.destroy_process_group(group)


def _exchange(group: dist.ProcessGroup, nbytes: int, ring: bool, place: torch.device) -> Callable[[], object]:
    """An exchange in which each rank sends so many bytes: to all others alike, or to its neighbour in a ring."""
    me, ranks = group.rank(), group.size()
    rows = [nbytes // 4 // (ranks - 1)] * ranks
    sent, received = (([rows[0] * (ranks - 1) * (i == (me + step) % ranks) for i in range(ranks)] for step in (1, -1))
                      if ring else (rows, rows))
    x = torch.zeros(sum(sent), device=place)
    y = torch.empty(sum(received), device=place)
    return lambda: group.alltoall_base(y, x, received, sent, dist.AllToAllOptions()).wait()


# Files


def written(machine: Machine) -> str:
    """The machine as TOML, with four digits."""
    lines = [f"# Measured by xdit-compile calibrate with torch {torch.__version__}.", f'name = "{machine.name}"',
             f"devices = {machine.devices}", f"nodes = {machine.nodes}", "", "[device]",
             f"memory_gb = {machine.memory / 1e9:.4g}", f"element_wise_gb_per_s = {machine.moved / 1e9:.4g}",
             f"launch_us = {machine.launch * 1e6:.4g}", f"left_by_a_compiler = {machine.compiled:.4g}",
             f"asynchronous = {str(machine.asynchronous).lower()}", f"overlap = {machine.overlap:.4g}",
             f"collective_us = {machine.collective * 1e6:.4g}",
             f"host_copy_gb_per_s = {machine.host_copy / 1e9:.4g}",
             *([f"functions_g_per_s = {machine.functions / 1e9:.4g}"] if math.isfinite(machine.functions) else []),
             *([f"packing_gb_per_s = {machine.packing / 1e9:.4g}"] if math.isfinite(machine.packing) else [])]
    for dtype, rates in machine.rates.items():
        lines += ["", f"[rates.{dtype}]", f"products_tflops = {rates.products / 1e12:.4g}",
                  f"attention_tflops = {rates.attention / 1e12:.4g}"]
    for link in machine.links:
        lines += ["", "[[links]]", *([f"devices = {link.devices}"] if link.devices else []),
                  *([f"ranks = {link.ranks}"] if link.ranks else []), f'pattern = "{link.pattern}"',
                  f"latency_us = {link.latency * 1e6:.4g}", f"gb_per_s = {link.bandwidth / 1e9:.4g}",
                  *(["shared = true"] if link.shared else [])]
    return "\n".join(lines) + "\n"


def write(machine: Machine, path: Path) -> None:
    """Write its file, whole or not at all.

    Raises:
        XditError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as drafts:
            draft = Path(drafts) / "machine.toml"
            draft.write_text(written(machine))
            draft.replace(path)
    except OSError as error:
        raise XditError(f"the machine's file cannot be written to {path}: {error.strerror}") from error
