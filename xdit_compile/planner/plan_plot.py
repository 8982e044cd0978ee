"""Time against the number of devices, a line for each method, as a picture."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from xdit_compile.errors import XditError
from xdit_compile.planner.machine import Machine
from xdit_compile.planner.plan import Planner, Question
from xdit_compile.report.picture import figure
from xdit_compile.spec import ShardingSpec

Curves = Mapping[str, Sequence[tuple[int, float]]]
"""By method: numbers of devices, and seconds of a loop."""


def curves(planner: Planner, question: Question, sized: Callable[[int], Machine]) -> dict[str, list[tuple[int, float]]]:
    """Seconds of each method alone, of guidance with Ulysses, and of the best mix, on 1, 2, 4, ... devices up to those
    of the question; a method that does not go with so many has no point there.

    Args:
        sized: the machine with so many devices.
    """
    found: dict[str, list[tuple[int, float]]] = {}
    world = 1
    while world <= question.world:
        asked = replace(question, world=world, machine=sized(world))
        for name, spec in _methods(asked, world).items():
            try:
                option = planner.quick(spec, asked)
            except XditError:
                continue
            found.setdefault(name, []).append((world, option.cost))
        try:
            best = planner.plan(asked).best
            found.setdefault("best mix", []).append((world, best.cost))
        except XditError:
            pass
        world *= 2
    return found


def draw(planner: Planner, question: Question, sized: Callable[[int], Machine], path: str | os.PathLike[str]) -> None:
    """Write that as an SVG picture, which is there whole or not at all.

    Raises:
        XditError: matplotlib cannot be imported, or the file cannot be written.
    """
    with figure(7.0, 4.5, Path(path), "the plan") as made:
        axes = made.subplots()
        for name, points in curves(planner, question, sized).items():
            best = name == "best mix"
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name, zorder=3 if best else 2,
                      linewidth=2.5 if best else 1.2, color="black" if best else None)
        worlds = [2**i for i in range(question.world.bit_length())]
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(worlds, [str(n) for n in worlds])
        axes.set_xlabel("devices")
        axes.set_ylabel("seconds a sample" if question.goal == "throughput" else "seconds")
        axes.set_title(f"{planner.model} on {question.machine.name}, {question.loop.steps} steps", parse_math=False)
        axes.grid(True, which="both", linewidth=0.3)
        axes.legend(frameon=False, fontsize=8)


def _methods(question: Question, world: int) -> dict[str, ShardingSpec]:
    base, made = question.base, {}
    made["ulysses"] = replace(base, ulysses_degree=world)
    made["ring"] = replace(base, ring_degree=world)
    made["tensor"] = replace(base, tensor_degree=world)
    if not question.exact and world > 1:
        made["pipefusion"] = replace(base, pipefusion_degree=world)
    if world % 2 == 0 and question.loop.calls > 1:
        made["cfg, then ulysses"] = replace(base, cfg_degree=2, ulysses_degree=world // 2)
    return made
