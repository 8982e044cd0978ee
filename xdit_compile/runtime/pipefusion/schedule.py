"""PipeFusion's schedule as data: what each stage of a pipeline does, in which order, and how long that takes.

The blocks of a model are cut into stages, one for each rank, and its sequence into patches. After a few synchronous
warm-up steps a patch enters the first stage as soon as the result it is computed from is there, while later patches of
the step before are still in later stages (Fang et al., PipeFusion, arXiv 2405.14430). Every rank steps the sampler for
itself, so the last stage sends its results to all others. No tensors, no devices, no processes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal

from xdit_compile.errors import XditError

WHOLE = -1
"""The unit that is the whole sequence at once; other units are patches, counted from 0."""

RESULT = "result"
"""The name of the edges that carry the model's output from the last stage to another one."""

Kind = Literal["recv", "run", "send", "free"]


class ScheduleError(XditError):
    """Raised when a schedule is malformed, or its stages would wait for ever or use what they do not hold."""


@dataclass(frozen=True)
class Edge:
    """What one stage sends to another for every unit.

    Attributes:
        nbytes, whole: bytes of each patch's message, and of that of a whole step.
    """

    source: int
    target: int
    nbytes: tuple[int, ...]
    whole: int
    name: str

    def __str__(self) -> str:
        return f"{self.name} {self.source}->{self.target}"


@dataclass(frozen=True)
class Op:
    """One thing a stage does. A result keeps the step that made it, though the next one receives and frees it."""

    kind: Kind
    step: int
    unit: int
    edge: Edge | None = None

    def __str__(self) -> str:
        edge = f" {self.edge}" if self.edge else ""
        return f"{self.kind}{edge} step {self.step} {'whole' if self.unit == WHOLE else f'patch {self.unit}'}"


@dataclass(frozen=True)
class Schedule:
    """A whole run.

    Attributes:
        units: of each step; ops: of each stage.
        chained: each step begins with results of the one before as they come, not once all are there.
    """

    units: tuple[tuple[int, ...], ...]
    edges: tuple[Edge, ...]
    ops: tuple[tuple[Op, ...], ...]
    chained: bool = True

    def __str__(self) -> str:
        return "\n".join(line for stage, ops in enumerate(self.ops)
                         for line in (f"stage {stage} of {len(self.ops)}", *(f"  {op}" for op in ops)))


@dataclass(frozen=True)
class Bar:
    """What a stage did from ``start`` to ``end`` (seconds): a run, or a receive it waited in."""

    stage: int
    kind: Kind
    step: int
    unit: int
    start: float
    end: float

    def since(self, start: float) -> Bar:
        """The same, told from ``start`` on."""
        return replace(self, start=self.start - start, end=self.end - start)


@dataclass(frozen=True)
class Timeline:
    """What all stages did, and when: simulated or measured."""

    bars: tuple[Bar, ...]
    stages: int

    @property
    def seconds(self) -> float:
        """From the first start to the last end."""
        return max((b.end for b in self.bars), default=0.0) - min((b.start for b in self.bars), default=0.0)

    def busy(self, first_step: int = 0, last_step: int | None = None) -> tuple[float, ...]:
        """The share of its time that each stage runs, from the first start to the last end of a run of these steps,
        the last one included. What it then runs of other steps counts too."""
        runs = [b for b in self.bars if b.kind == "run"]
        chosen = [b for b in runs if first_step <= b.step and (last_step is None or b.step <= last_step)]
        start, end = min((b.start for b in chosen), default=0.0), max((b.end for b in chosen), default=0.0)
        if start == end:
            raise ScheduleError(f"no stage ran from step {first_step} to "
                                f"{'the last' if last_step is None else f'step {last_step}'}")
        return tuple(sum(max(min(b.end, end) - max(b.start, start), 0.0) for b in runs if b.stage == stage)
                     / (end - start) for stage in range(self.stages))

    def bubble(self, first_step: int = 0, last_step: int | None = None) -> float:
        """The share of that time in which a stage does not run, the mean of all stages."""
        return 1 - sum(self.busy(first_step, last_step)) / self.stages


def step_ops(stage: int, stages: int, units_before: tuple[int, ...] | None, units: tuple[int, ...], step: int,
             edges: Sequence[Edge]) -> tuple[Op, ...]:
    """What one stage does for one denoising step. Only the first stage computes from the sample; the others receive
    results when they have done their part of the step, for by then all have been there.

    Args:
        units_before: of the step before, if its results are outstanding and this step's sample is computed from them
            element by element; None if none is needed. Patch for patch if the units are the same; otherwise all
            results are received before the first unit and freed after the last.
    """
    results, into, out = _at(stage, stages, edges)
    ops: list[Op] = []
    for unit in units:
        first, last = _needs(units_before or (), units, unit)
        ops += [Op("recv", step - 1, u, e) for u in first for e in results if stage == 0]
        ops += [Op("recv", step, unit, e) for e in into]
        ops += [Op("run", step, unit)]
        ops += [Op("send", step, unit, e) for e in out]
        ops += [Op("free", step, unit, e) for e in into]
        ops += [Op("recv", step - 1, u, e) for u in last for e in results if stage > 0]
        ops += [Op("free", step - 1, u, e) for u in last for e in results]
    return tuple(ops)


def drain_ops(stage: int, stages: int, units: tuple[int, ...], step: int, edges: Sequence[Edge]) -> tuple[Op, ...]:
    """What one stage does to have all results of ``step``, of which none was received yet."""
    kinds: tuple[Kind, ...] = ("recv", "free")
    return tuple(Op(kind, step, u, e) for u in units for e in _at(stage, stages, edges)[0] for kind in kinds)


def schedule(stages: int, patches: int, steps: int, warmup: int, edges: Sequence[Edge], *,
             chained: bool = True) -> Schedule:
    """A run of ``steps`` steps, the first ``warmup`` of which are whole.

    Args:
        chained: False if the sampler needs all results of a step before the next one begins.
    """
    if stages < 1 or patches < 1 or steps < 0 or warmup < 0:
        raise ScheduleError(f"{stages} stages, {patches} patches, {steps} steps, {warmup} of them to warm up")
    for edge in edges:
        inside = 0 <= edge.source < stages and 0 <= edge.target < stages
        forward = edge.source > edge.target if edge.name == RESULT else edge.source < edge.target
        if not inside or not forward or (edge.name == RESULT and edge.source != stages - 1):
            raise ScheduleError(f"{edge} among {stages} stages: a result leaves the last one, all else goes forward")
        if len(edge.nbytes) != patches:
            raise ScheduleError(f"{edge} has sizes for {len(edge.nbytes)} patches of {patches}")
    if len({str(e) for e in edges}) < len(edges):
        raise ScheduleError(f"edges of the same name: {', '.join(map(str, edges))}")
    units = tuple((WHOLE,) if step < warmup else tuple(range(patches)) for step in range(steps))
    ops: list[list[Op]] = [[] for _ in range(stages)]
    for stage, made in enumerate(ops):
        for step, now in enumerate(units):
            made += step_ops(stage, stages, units[step - 1] if step and chained else None, now, step, edges)
            if not chained or step == steps - 1:
                made += drain_ops(stage, stages, now, step, edges)
    return Schedule(units, tuple(edges), tuple(map(tuple, ops)), chained)


def schedule_of_run(stages: int, steps: Sequence[tuple[tuple[int, ...], tuple[int, ...] | None]],
           edges: Sequence[Edge]) -> Schedule:
    """The schedule of a run that was not known beforehand: of each step its units, and those of the step before if its
    sample was computed from their results as they came."""
    ops: list[list[Op]] = [[] for _ in range(stages)]
    for stage, made in enumerate(ops):
        for step, (units, before) in enumerate(steps):
            made += step_ops(stage, stages, before, units, step, edges)
            if step == len(steps) - 1 or steps[step + 1][1] is None:
                made += drain_ops(stage, stages, units, step, edges)
    return Schedule(tuple(units for units, _ in steps), tuple(edges), tuple(map(tuple, ops)))


def check(schedule: Schedule, blocking: bool = False) -> None:
    """Raise an error that names the operation where a schedule is not sound.

    Args:
        blocking: also require that no stages wait for each other if a send ends only when its receive begins. The
            runtime's sends do not.

    Raises:
        ScheduleError: messages of an edge are not received as sent, a stage runs without what it needs or out of
            order, something is not freed or too early, or stages wait for each other for ever.
    """
    for stage, ops in enumerate(schedule.ops):
        orders = list(_orders(schedule, stage))
        wanted, found = dict.fromkeys(chain.from_iterable(orders)), Counter(ops)
        for op in (*found, *wanted):
            if op not in wanted or found[op] != 1:
                what = "has no place here" if op not in wanted else "is there twice" if found[op] else "is missing"
                raise ScheduleError(f"stage {stage}: {op} {what}")
        at = {op: i for i, op in enumerate(ops)}
        for early, late in orders:
            if at[early] > at[late]:
                raise ScheduleError(f"stage {stage}: {late} comes before {early}")
    for edge in schedule.edges:
        sends = [op for op in schedule.ops[edge.source] if (op.kind, op.edge) == ("send", edge)]
        receives = [op for op in schedule.ops[edge.target] if (op.kind, op.edge) == ("recv", edge)]
        for send, receive in zip(sends, receives, strict=True):
            if receive != _received(send):
                raise ScheduleError(f"stage {edge.target}: {receive} where stage {edge.source} does {send}")
    for wait in (False, True) if blocking else (False,):
        for _ in _played(schedule, wait):
            pass


def simulate(schedule: Schedule, run_seconds: Callable[[int, int], float],
             transfer_seconds: Callable[[Edge, int], float]) -> Timeline:
    """When each stage runs and waits, if sends are asynchronous and an edge carries one message at a time.

    Args:
        run_seconds: of a stage and a unit; transfer_seconds: of an edge and a unit.
    """
    now = [0.0] * len(schedule.ops)
    idle = dict.fromkeys(schedule.edges, 0.0)
    arrival: dict[Op, float] = {}
    bars: list[Bar] = []
    for stage, op in _played(schedule, blocking=False):
        end = start = now[stage]
        if op.kind == "run":
            end = start + run_seconds(stage, op.unit)
        elif op.kind == "send" and op.edge:
            idle[op.edge] = max(start, idle[op.edge]) + transfer_seconds(op.edge, op.unit)
            arrival[_received(op)] = idle[op.edge]
        elif op.kind == "recv":
            end = max(start, arrival[op])
        now[stage] = end
        if op.kind == "run" or end > start:
            bars.append(Bar(stage, op.kind, op.step, op.unit, start, end))
    return Timeline(tuple(bars), len(schedule.ops))


def _at(stage: int, stages: int, edges: Iterable[Edge]) -> tuple[list[Edge], list[Edge], list[Edge]]:
    """The edges that bring results to a stage, the others that end there, and all that begin there."""
    ending = [e for e in edges if e.target == stage]
    return ([e for e in ending if e.name == RESULT], [e for e in ending if e.name != RESULT],
            [e for e in edges if e.source == stage])


def _needs(before: tuple[int, ...], units: tuple[int, ...], unit: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The units of the step before that ``unit`` is the first, and those that it is the last, to be computed from."""
    if before == units:
        return (unit,), (unit,)
    return before if unit == units[0] else (), before if unit == units[-1] else ()


def _orders(schedule: Schedule, stage: int) -> Iterator[tuple[Op, Op]]:
    """All that a stage does, as pairs of what has to come before what. The first run comes before itself."""
    results, into, out = _at(stage, len(schedule.ops), schedule.edges)
    before: tuple[int, ...] = ()
    previous: Op | None = None
    for step, units in enumerate(schedule.units):
        for unit in units:
            run = Op("run", step, unit)
            yield previous or run, run
            yield from ((run, Op("send", step, unit, e)) for e in out)
            yield from ((Op("recv", step, unit, e), run) for e in into)
            yield from ((run, Op("free", step, unit, e)) for e in into)
            yield from ((Op("recv", step, unit, e), Op("free", step, unit, e)) for e in results)
            # Without a chain the results of a step were used once they were received.
            first, last = _needs(before, units, unit) if schedule.chained else (before, ())
            late = schedule.chained and stage > 0
            yield from ((Op("recv", step - 1, u, e), run) for u in first for e in results if not late)
            yield from ((run, Op("recv", step - 1, u, e)) for u in last for e in results if late)
            yield from ((run, Op("free", step - 1, u, e)) for u in last for e in results)
            previous = run
        before = units


def _received(send: Op) -> Op:
    """The receive of what is sent."""
    return replace(send, kind="recv")


def _played(schedule: Schedule, blocking: bool) -> Iterator[tuple[int, Op]]:
    """Stages and what they do in an order in which it can happen. As a stage does one thing after the other, whatever
    can happen next never stands in the way of anything else: if this comes to a halt, so does every order."""
    at = [0] * len(schedule.ops)
    sent: set[Op] = set()

    def head(stage: int) -> Op | None:
        return schedule.ops[stage][at[stage]] if at[stage] < len(schedule.ops[stage]) else None

    def ready(op: Op) -> bool:
        if op.kind == "recv":
            return op in sent
        return not (blocking and op.kind == "send" and op.edge) or head(op.edge.target) == _received(op)

    moved = True
    while moved:
        moved = False
        for stage in range(len(at)):
            while (op := head(stage)) and ready(op):
                at[stage], moved = at[stage] + 1, True
                if op.kind == "send":
                    sent.add(_received(op))
                yield stage, op
    if stuck := [f"stage {stage} in {op}" for stage in range(len(at)) if (op := head(stage))]:
        raise ScheduleError(f"stages wait for ever{' if sends block' if blocking else ''}: {', '.join(stuck)}")
