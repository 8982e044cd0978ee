"""Runs a pass and writes down what it did, with the program that it made."""

from __future__ import annotations

import inspect
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from xdit_compile.ir.pass_record import PassRecord
from xdit_compile.ir.program import Program

T = TypeVar("T")
Known = dict[Any, Any]
"""What passes have found of one captured program, by what it depends on: for who plans it under many specs."""


def rewritten(name: str, function: Callable[..., Any], program: Program,
              run: Callable[[Program], Program]) -> Program:
    """``run(program)``, whose history has one more record: of the pass ``name``, which ``function`` carries out."""
    start = time.perf_counter()
    made = run(program)
    seconds = time.perf_counter() - start
    before, after = _operators(program), _operators(made)
    matched = Counter(note.kind for note in made.notes) - Counter(note.kind for note in program.notes)
    changed = {op: after[op] - before[op] for op in sorted(before.keys() | after.keys()) if after[op] != before[op]}
    return replace(made, history=(*program.history, PassRecord(
        name, function.__module__, seconds, before.total(), after.total(), dict(matched), changed)))


def remembered(known: Known | None, key: Any, make: Callable[[], T]) -> T:
    """What ``make`` makes, unless that is known already. What it raises is not kept: errors speak of their spec."""
    if known is None:
        return make()
    if key not in known:
        known[key] = make()
    return known[key]


def analysed(name: str, function: Callable[..., Any], program: Program, run: Callable[[Program], T],
             found: Callable[[T], Mapping[str, int]]) -> tuple[Program, T]:
    """``program``, with a record of the analysis ``name``, and its result; ``found`` says how much that is."""
    start = time.perf_counter()
    result = run(program)
    seconds = time.perf_counter() - start
    nodes = _operators(program).total()
    return replace(program, history=(*program.history, PassRecord(
        name, function.__module__, seconds, nodes, nodes, found(result), {}))), result


def count_of_seeds(seeds: Mapping[str, Any]) -> dict[str, int]:
    """What an analysis that looks for seeds has found."""
    return {"seed": len(seeds)}


def _operators(program: Program) -> Counter[str]:
    """How many nodes of each operator a program has; placeholders and outputs are none."""
    targets = (n.target for _, module in program.functions() for n in module.graph.nodes
               if n.op in ("call_function", "call_module"))
    return Counter(t.__name__ if inspect.isroutine(t) else str(t) for t in targets)
