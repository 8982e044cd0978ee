"""Runs the parts one after the other in a process of their own, within a budget of time.

A process, because an error on a GPU may leave it useless for whatever comes next: another one then goes on. Figures
are told as soon as they are there, so that a part that has to be ended leaves those that it had.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import platform
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from tqdm import tqdm


class Part(NamedTuple):
    """A function of a module, and what it is about.

    Attributes:
        needs: seconds without which it is not begun; most: those after which it is ended. A rehearsal asks for neither.
    """

    module: str
    function: str
    about: str
    needs: float
    most: float


PARTS: dict[str, Part] = {
    "checks": Part("gpu_parts.checks", "checks", "attention kernels against float64, an artifact written and read",
                   15, 60),
    "ranks": Part("gpu_parts.ranks", "ranks", "two ranks that share one device, over gloo, against one", 30, 120),
    "flux": Part("gpu_parts.full_size", "flux",
                 "a step of FLUX.1-dev: ours, plain, torch.compile of all; host, memory", 60, 240),
    "local": Part("gpu_parts.local", "local", "the program of one of N ranks without a network, against 1/N", 50, 150),
    "graphs": Part("gpu_parts.full_size", "graphs", "FLUX.1-dev with and without CUDA graphs", 30, 90),
    "wan": Part("gpu_parts.full_size", "wan", "two blocks of Wan 14B at 720p: ours, plain, torch.compile of all",
                30, 120),
    "compiling": Part("gpu_parts.checks", "compiling", "inductor and AOTInductor, against the model as it is", 20, 120),
    "rings": Part("gpu_parts.local", "rings", "as local, with rings", 40, 120),
}
"""In the order in which they are worth having."""


class Options(NamedTuple):
    """How the campaign is run; ``deadline`` is by ``time.time()``."""

    device: str
    tiny: bool
    own: bool
    deadline: float


def machine(options: Options) -> dict[str, Any]:
    """Where the figures come from."""
    import torch

    from gpu_parts.models import why_own

    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "device": options.device,
                             "cuda": torch.version.cuda, "diffusers": None}
    if why := why_own(options.own):
        found["without_diffusers"] = f"own models of the same sizes are measured: {why}"
    else:
        found["diffusers"] = importlib.import_module("diffusers").__version__
    if options.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"name": properties.name, "memory_bytes": properties.total_memory,
                  "capability": f"{properties.major}.{properties.minor}", "devices": torch.cuda.device_count()}
    else:
        found |= {"name": platform.machine(), "cores": os.cpu_count()}
    return found


def serve(pipe: Connection, options: Options, parts: Mapping[str, Part], first: bool) -> None:
    """What the process of the parts does: tell of each what it finds."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from gpu_parts.run import Run, failure

    if first:
        pipe.send(("machine", "", machine(options)))
    for name, part in parts.items():
        pipe.send(("part", name, None))
        run = Run(options.device, options.tiny, options.own, options.deadline,
                  tell=lambda key, value, name=name: pipe.send(("figure", name, (key, value))),  # type: ignore[misc]
                  begin=lambda text, name=name: pipe.send(("begin", name, text)))  # type: ignore[misc]
        if not options.tiny and run.left < part.needs:
            pipe.send(("skipped", name, f"{run.left:.0f} s were left, of about {part.needs:.0f} s that it needs"))
            continue
        try:
            getattr(importlib.import_module(part.module), part.function)(run)
        except Exception as error:
            pipe.send(("failed", name, failure(error)))
        else:
            pipe.send(("done", name, None))
        run.figures = {}
        run.free()
        run.synchronize()  # raises where the device cannot be used again; the parent goes on with another process


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def campaign(parts: Mapping[str, Part], options: Options, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The report; ``keep`` is called with it after each part."""
    start = time.time()
    report: dict[str, Any] = {
        "schema": 1, "rehearsal": options.tiny or options.device != "cuda", "tiny": options.tiny, "machine": {},
        "parts": {name: {"about": part.about, "status": "skipped", "reason": "the time was over before it",
                         "seconds": 0.0, "figures": {}} for name, part in parts.items()}}
    left = dict(parts)
    with tqdm(total=len(parts), unit="part", desc="campaign") as bar:
        while left and time.time() < options.deadline:
            before = len(left)
            _run(left, options, report, keep, bar)
            if len(left) == before:  # it ended before it began a part
                name = next(iter(left))
                del left[name]
                _end(report, name, "error", time.time(), {"error": "its process ended before it began"})
    report["seconds"] = round(time.time() - start, 1)
    keep(report)
    return report


def _run(left: dict[str, Part], options: Options, report: dict[str, Any], keep: Callable[[dict[str, Any]], None],
         bar: Any) -> None:
    """One process, until it ends; what it was done with is taken out of ``left``."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, options, dict(left), not report["machine"]))
    process.start()
    theirs.close()
    current, since, end = "", time.time(), options.deadline
    try:
        while ours.poll(max(end - time.time(), 0.0)):
            kind, name, value = ours.recv()
            if kind == "machine":
                report["machine"] = value
            elif kind == "part":
                current, since = name, time.time()
                most = left.pop(name).most
                end = options.deadline if options.tiny else min(since + most, options.deadline)
                bar.set_description(name)
            elif kind == "figure":
                report["parts"][name]["figures"][value[0]] = value[1]
            elif kind == "begin":
                bar.set_postfix_str(str(value)[:60])
            else:
                reason = {"done": {}, "skipped": {"reason": value}, "failed": value}[kind]
                _end(report, name, {"done": "ok", "skipped": "skipped", "failed": "error"}[kind], since, reason)
                current = ""
                keep(report)
                bar.update()
        if current:
            enough = "the time was over while it ran" if end == options.deadline else f"not done in {end - since:.0f} s"
            _end(report, current, "skipped", since, {"reason": enough})
    except EOFError:
        process.join()
        if current:
            _end(report, current, "error", since, {"error": f"its process ended with exit code {process.exitcode}"})
    finally:
        if process.is_alive():
            process.kill()
        process.join()
    if current:
        keep(report)
        bar.update()


def _end(report: dict[str, Any], name: str, status: str, since: float, more: dict[str, Any]) -> None:
    part = report["parts"][name]
    part.pop("reason", None)
    part |= {"status": status, "seconds": round(time.time() - since, 1), **more}
    if status == "ok" and (wrong := [key for key, value in part["figures"].items()
                                     if isinstance(value, dict) and "error" in value]):
        part |= {"status": "error", "error": f"{', '.join(wrong)} failed"}
