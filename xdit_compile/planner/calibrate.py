"""Measures the machine at hand in some seconds: what the planner needs to know of it."""

from __future__ import annotations

import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from rich.console import RenderableType
from rich.text import Text

from xdit_compile.errors import XditError
from xdit_compile.planner.machine import Link, Machine, Rates
from xdit_compile.planner.work import VIEW
from xdit_compile.report.tables import sections, table
from xdit_compile.report.units import size

Progress = Callable[[str], None]

SPENT = 0.25
"""Seconds that each measurement goes on for at least."""

LEAST = 3
"""Times that a thing is measured at least; the median counts."""

SIZES = (4_096, 1_048_576)
"""Bytes that a rank sends in the two measurements of a link: next to nothing, and much."""

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
    gets the figures of rank 0; those of links are of the slowest rank."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    place = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    rates = {}
    for dtype in _dtypes(place):
        progress(f"products and attention in {dtype}")
        rates[str(dtype).removeprefix("torch.")] = Rates(_products(place, dtype), _attention(place, dtype))
    progress("other work")
    moved, functions, launch = _moved(place), _functions(place), _launch(place)
    progress("links")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    links = tuple(_links(world, local, place)) if world > 1 else ()
    memory = torch.cuda.get_device_properties(place).total_memory if place.type == "cuda" else (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local)
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else f"{platform.machine()} CPU"
    found = Machine(
        name, local, int(memory * USABLE), rates, moved, launch, 0.35 if place.type == "cuda" else 0.8,
        place.type == "cuda", 0.0, 15e-6, _host_copy(place), links or (Link(0, 0, "any", 1e-4, 1e9),),
        max(world // local, 1), functions)
    return found


def _dtypes(place: torch.device) -> list[torch.dtype]:
    if place.type == "cpu":
        return [torch.float32]
    half = [torch.bfloat16] if torch.cuda.is_bf16_supported(including_emulation=False) else []
    return [torch.float32, torch.float16, *half]


def _products(place: torch.device, dtype: torch.dtype) -> float:
    n = 4096 if place.type == "cuda" else 512
    x = torch.randn(n, n, device=place, dtype=dtype)
    y = torch.randn(n, n, device=place, dtype=dtype)
    return 2.0 * n**3 / _seconds(lambda: torch.nn.functional.linear(x, y), place)


def _attention(place: torch.device, dtype: torch.dtype) -> float:
    tokens = 4096 if place.type == "cuda" else 512
    q, k, v = (torch.randn(1, 8, tokens, 64, device=place, dtype=dtype) for _ in range(3))
    attend = torch.nn.functional.scaled_dot_product_attention
    return 4.0 * 8 * tokens**2 * 64 / _seconds(lambda: attend(q, k, v), place)


def _moved(place: torch.device) -> float:
    n = 1 << (26 if place.type == "cuda" else 20)
    x = torch.randn(n, device=place)
    return 8.0 * n / _seconds(lambda: x * 1.5, place)


def _functions(place: torch.device) -> float:
    n = 1 << (26 if place.type == "cuda" else 20)
    x = torch.randn(n, device=place)
    return n / _seconds(lambda: torch.nn.functional.gelu(x, approximate="tanh"), place)


def _launch(place: torch.device) -> float:
    """Of what a block does, on next to no values: products, attention, norms, and what goes between them. A view counts
    as in ``Work.launches``."""
    x, w, b = (torch.zeros(*shape, device=place) for shape in ((1, 2, 16), (16, 16), (16,)))
    f = torch.nn.functional

    def block() -> None:
        h = f.layer_norm(x, (16,)) * 1.5 + x
        q, k, v = (f.linear(h, w, b).reshape(1, 2, 2, 8).transpose(1, 2) for _ in range(3))
        h = x + f.linear(f.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, 2, 16), w, b) * 0.5
        h + f.linear(f.gelu(f.linear(f.layer_norm(h, (16,)) * 1.5 + h, w, b)), w, b) * 0.5

    started, views = 18, 8
    return _seconds(block, place) / (started + VIEW * views)


def _host_copy(place: torch.device) -> float:
    if place.type == "cpu":
        return 1e12
    x = torch.empty(1 << 26, dtype=torch.uint8, pin_memory=True)
    return x.numel() / _seconds(lambda: x.to(place, non_blocking=True), place)


def _seconds(run: Callable[[], object], place: torch.device) -> float:
    """The median time of ``run``."""
    with torch.no_grad():
        run()
        found: list[float] = []
        until = time.perf_counter() + SPENT
        while len(found) < LEAST or time.perf_counter() < until:
            start = time.perf_counter()
            run()
            if place.type == "cuda":
                torch.cuda.synchronize(place)
            found.append(time.perf_counter() - start)
    return median(found)


# Links


def _links(world: int, local: int, place: torch.device) -> Iterator[Link]:
    """Of groups of neighbours, of each size that divides the ranks of a node, and of all: all groups at once, as in a
    run. The widest reaches everywhere."""
    spans = sorted({n for n in range(2, local + 1) if local % n == 0} | {world})
    for span in spans:
        groups = [dist.new_group(list(range(first, first + span))) for first in range(0, world, span)]
        mine = groups[dist.get_rank() // span]
        for pattern, run in (("any", _exchange), ("ring", _pass_on)):
            latency, much = (_slowest(_timed(run, mine, span, nbytes, place), place) for nbytes in SIZES)
            bandwidth = (SIZES[1] - SIZES[0]) / max(much - latency, 1e-9)
            yield Link(0 if span == world else span, 0, pattern, latency, bandwidth)
        for group in groups:
            if group is not None and group is not dist.GroupMember.NON_GROUP_MEMBER:
                dist.destroy_process_group(group)


def _exchange(group: Any, ranks: int, x: torch.Tensor) -> None:
    dist.all_to_all_single(torch.empty_like(x), x, group=group)


def _pass_on(group: Any, ranks: int, x: torch.Tensor) -> None:
    me = dist.get_rank(group)
    send, receive = [0] * ranks, [0] * ranks
    send[(me + 1) % ranks] = receive[(me - 1) % ranks] = x.numel()
    dist.all_to_all_single(torch.empty_like(x), x, receive, send, group=group)


def _timed(run: Callable[..., None], group: Any, ranks: int, nbytes: int, place: torch.device) -> float:
    """The median time of an exchange in which each rank sends so many bytes to others: as often on all ranks."""
    whole = nbytes * ranks // (ranks - 1) if run is _exchange else nbytes
    x = torch.zeros(whole // 4 // ranks * ranks, device=place)
    found: list[float] = []
    times = LEAST
    for i in range(64):
        start = time.perf_counter()
        run(group, ranks, x)
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        found.append(time.perf_counter() - start)
        if i == 1:  # of the second, as the first connects
            times = int(min(max(SPENT / max(_slowest(found[1], place), 1e-6), LEAST), 62)) + 2
        if i + 1 >= times and i > 1:
            break
    return median(found[1:])


def _slowest(seconds: float, place: torch.device) -> float:
    """The largest of all ranks' times."""
    found = torch.tensor([seconds], dtype=torch.float64, device=place)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)


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
             *([f"functions_g_per_s = {machine.functions / 1e9:.4g}"] if math.isfinite(machine.functions) else [])]
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
