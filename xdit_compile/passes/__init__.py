"""From the captured program to one rank's local program: the passes, in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from torch._subclasses.fake_tensor import FakeTensorMode

from xdit_compile.layout import EVERY, PATCH, Layout, Position
from xdit_compile.mesh import axis_sizes, position_of
from xdit_compile.passes.batch import batch_seeds, joined, lost_factor
from xdit_compile.passes.canonicalize import canonicalize
from xdit_compile.passes.check import check
from xdit_compile.passes.lower import lower_attention
from xdit_compile.passes.overlap import overlap
from xdit_compile.passes.seeds import choose_seeds
from xdit_compile.passes.shard import Leave, Seeds, shard
from xdit_compile.passes.simplify import simplify
from xdit_compile.program import Note, Program
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


@dataclass(frozen=True)
class Pass:
    """A step from program to program: which facts it needs and which it establishes."""

    name: str
    run: Callable[[Program, Context], Program]
    requires: frozenset[str]
    provides: frozenset[str]


PASSES: tuple[Pass, ...] = (
    Pass("shard", lambda p, c: shard(p, c.seeds, c.position, c.sizes, c.mode, c.given, c.leave),
         frozenset({"canonical"}), frozenset({"sharded"})),
    Pass("lower_attention", lambda p, c: lower_attention(p, c.sizes, c.mode),
         frozenset({"sharded"}), frozenset({"lowered"})),
    Pass("simplify", lambda p, c: simplify(p), frozenset({"lowered"}), frozenset()),
    Pass("overlap", lambda p, c: overlap(p), frozenset({"lowered"}), frozenset()),
)


NOTHING = ("nothing is split, every rank computes everything: no dimension of what enters the model's blocks saves "
           "work when it is split, because no tokens attend to one another or too much of the model needs all of them")


def validate(passes: Sequence[Pass], facts: frozenset[str]) -> None:
    """Each pass must find what it requires established by those before it."""
    for step in passes:
        assert step.requires <= facts, f"pass {step.name} needs {sorted(step.requires - facts)}"
        facts |= step.provides


validate(PASSES, frozenset({"captured", "canonical"}))


def plan(program: Program, spec: ShardingSpec) -> tuple[Program, Seeds]:
    """The canonical program under ``spec``, and where to begin sharding it: the same on every rank."""
    program = replace(canonicalize(program), spec=spec)
    check(program)
    sizes = axis_sizes(spec)
    batch = batch_seeds(program, sizes)
    seeds = joined(batch, choose_seeds(program, sizes, batch))
    lost = NOTHING if not seeds and spec.world_size > 1 else lost_factor(program, sizes, batch, seeds)
    if lost:
        program = replace(program, notes=(*program.notes, Note("seed", "main", lost)))
    return program, seeds


def localize(program: Program, seeds: Seeds, rank: int, dump: Callable[[str, Program], None] | None = None, *,
             patch: int = EVERY, given: Mapping[str, Layout] = MappingProxyType({}),
             leave: Leave | None = None) -> Program:
    """Rank ``rank``'s local program.

    Args:
        dump: called with each pass's name and result.
        patch: the time it is for.
        given, leave: how inputs come and results go, where they are not whole on every rank (``shard.Walk.main``).
    """
    assert program.spec is not None
    context = Context({**position_of(rank, program.spec), PATCH: patch}, axis_sizes(program.spec),
                      FakeTensorMode(allow_non_fake_inputs=True), seeds, given, leave)
    if dump:
        dump("canonicalize", program)
    for step in PASSES:
        program = step.run(program, context)
        check(program)
        if dump:
            dump(step.name, program)
    return program
