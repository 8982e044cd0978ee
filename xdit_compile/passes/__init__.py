"""From the captured program to one rank's local program: the passes, in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode

from xdit_compile.ir.layout import EVERY, LATE, PATCH, Layout, Position
from xdit_compile.ir.mesh import axis_sizes, position_of
from xdit_compile.ir.parameter_groups import ParameterGroup, cut_groups
from xdit_compile.ir.pass_record import source_digest
from xdit_compile.ir.program import Note, Program
from xdit_compile.passes.batch_axis import batch_seeds, lost_factor, merge_seeds
from xdit_compile.passes.canonicalize import canonicalize
from xdit_compile.passes.interpreter import Leave, Seeds, parameter_layouts
from xdit_compile.passes.lower_attention import lower_attention
from xdit_compile.passes.overlap_communication import overlap
from xdit_compile.passes.recorded import Known, analysed, count_of_seeds, remembered, rewritten
from xdit_compile.passes.shard import shard
from xdit_compile.passes.shard_parameters import Arrival, arrivals, parameters_of, shard_parameters
from xdit_compile.passes.simplify import simplify
from xdit_compile.passes.tensor_axis import tensor_seeds
from xdit_compile.passes.token_axis import choose_seeds
from xdit_compile.passes.verifier import check
from xdit_compile.spec import ShardingSpec


@dataclass
class Context:
    """What passes share while one program is compiled."""

    position: Position
    sizes: dict[str, int]
    mode: FakeTensorMode
    seeds: Seeds
    given: Mapping[str, Layout]
    leave: Leave | None
    whole: Program
    order: Sequence[Arrival]


@dataclass(frozen=True)
class Pass:
    """A step from program to program: what carries it out, which facts it needs and which it establishes."""

    name: str
    function: Callable[..., Any]
    run: Callable[[Program, Context], Program]
    requires: frozenset[str]
    provides: frozenset[str]


PASSES: tuple[Pass, ...] = (
    Pass("shard", shard, lambda p, c: shard(p, c.seeds, c.position, c.sizes, c.mode, c.given, c.leave),
         frozenset({"canonical"}), frozenset({"sharded"})),
    Pass("lower_attention", lower_attention, lambda p, c: lower_attention(p, c.sizes, c.mode),
         frozenset({"sharded"}), frozenset({"lowered"})),
    Pass("simplify", simplify, lambda p, c: simplify(p), frozenset({"lowered"}), frozenset()),
    Pass("shard_parameters", shard_parameters,
         lambda p, c: shard_parameters(p, c.order, c.whole, c.position, c.sizes, c.mode),
         frozenset({"lowered"}), frozenset()),
    Pass("overlap_communication", overlap, lambda p, c: overlap(p), frozenset({"lowered"}), frozenset()),
)


NOTHING = ("nothing is split, every rank computes everything: no dimension of what enters the model's blocks saves "
           "work when it is split, because no tokens attend to one another or too much of the model needs all of them")


def validate(passes: Sequence[Pass], facts: frozenset[str]) -> None:
    """Each pass must find what it requires established by those before it."""
    for step in passes:
        assert step.requires <= facts, f"pass {step.name} needs {sorted(step.requires - facts)}"
        facts |= step.provides


validate(PASSES, frozenset({"captured", "canonical"}))

ANALYSES: Mapping[str, Callable[..., Any]] = MappingProxyType({"batch_axis": batch_seeds, "tensor_axis": tensor_seeds,
                                                             "token_axis": choose_seeds})
"""What ``plan`` finds out before any pass that rewrites for ranks."""


def pass_digests() -> dict[str, str]:
    """By the name of each pass of this package, the hash of its source: what was made under others is not ours."""
    functions = {"canonicalize": canonicalize, **ANALYSES, **{step.name: step.function for step in PASSES}}
    return {name: source_digest(function.__module__) for name, function in functions.items()}


def plan_start(program: Program, spec: ShardingSpec, groups: Sequence[ParameterGroup],
               known: Known | None = None) -> tuple[Program, Seeds, Seeds]:
    """The canonical program under ``spec``, and its seeds of the batch and of weights, which cut the same at all times:
    how every plan begins."""
    program = remembered(known, "canonical", lambda: rewritten("canonicalize", canonicalize, program, canonicalize))
    program = replace(program, spec=spec)
    check(program)
    sizes = axis_sizes(spec)
    program, batch = analysed("batch_axis", batch_seeds, program, lambda p: remembered(
        known, ("batch", spec.batch_degree), lambda: batch_seeds(p, sizes)), count_of_seeds)
    program, weights = analysed("tensor_axis", tensor_seeds, program, lambda p: remembered(
        known, ("tensor", spec.tensor_degree, spec.batch_degree), lambda: tensor_seeds(p, sizes, batch, groups)),
        count_of_seeds)
    return program, batch, weights


def plan(program: Program, spec: ShardingSpec, groups: Sequence[ParameterGroup] = (),
         known: Known | None = None) -> tuple[Program, Seeds]:
    """The canonical program under ``spec``, and where to begin sharding it: the same on every rank. ``groups``: of the
    model's parameters, where another program has shared them out; ``known``: of this program from other specs."""
    program, batch, weights = plan_start(program, spec, groups, known)
    sizes = axis_sizes(spec)
    program, tokens = analysed("token_axis", choose_seeds, program, lambda p: choose_seeds(
        p, sizes, {**weights, **batch}), count_of_seeds)
    tokens_and_batch = merge_seeds(batch, tokens)
    seeds = {**weights, **tokens_and_batch}
    lost = NOTHING if not seeds and spec.world_size > 1 else lost_factor(program, sizes, batch, tokens_and_batch)
    if lost:
        program = replace(program, notes=(*program.notes, Note("seed", "main", lost)))
    return program, seeds


def local_groups(program: Program, seeds: Seeds, groups: Sequence[ParameterGroup],
                 rank: int) -> tuple[ParameterGroup, ...]:
    """What ``rank`` has of these groups."""
    assert program.spec is not None
    named = {n.name: i.name for n, i in zip(program.main.graph.find_nodes(op="placeholder"), program.inputs,
                                             strict=True)}
    layouts = {named[name]: layout for name, layout in parameter_layouts(program, seeds).items()}
    return cut_groups(groups, layouts, position_of(rank, program.spec))


def localize(program: Program, seeds: Seeds, rank: int, dump: Callable[[str, Program], None] | None = None, *,
             patch: int = EVERY, late: bool = False, given: Mapping[str, Layout] = MappingProxyType({}),
             leave: Leave | None = None, groups: Sequence[ParameterGroup] = ()) -> Program:
    """Rank ``rank``'s local program.

    Args:
        dump: called with each pass's name and result.
        patch: the time it is for; late: whether of others it has what these had a step before.
        given, leave: how inputs come and results go, where they are not whole on every rank
            (``ProgramInterpreter.main``).
        groups: those of the model's parameters, where they come block by block; by default, of the program's.
    """
    assert program.spec is not None
    position = {**position_of(rank, program.spec), PATCH: patch} | ({LATE: 1} if late else {})
    order: tuple[Arrival, ...] = ()
    if program.spec.parts:
        order = arrivals(program, local_groups(program, seeds, groups or parameters_of(program), rank))
    context = Context(position, axis_sizes(program.spec), FakeTensorMode(allow_non_fake_inputs=True), seeds, given,
                      leave, program, order)
    if dump:
        dump("canonicalize", program)
    for step in PASSES:
        program = rewritten(step.name, step.function, program, lambda p, run=step.run: run(p, context))
        check(program)
        if dump:
            dump(step.name, program)
    return program
