"""The choice: every spec costed, those refused with the reason, and what stands behind the best."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from torch import nn

from xdit_compile.errors import SpecError, XditError
from xdit_compile.frontend.program_cache import captured
from xdit_compile.ir.beside import ALONE, Beside
from xdit_compile.ir.call_arguments import Inputs, call_arguments
from xdit_compile.ir.parameter_groups import ParameterGroup, parameter_groups
from xdit_compile.ir.program import Program
from xdit_compile.planner.candidates import approximate, candidates, smaller
from xdit_compile.planner.costs import Loop, Seconds, encoder_seconds, loop_seconds, takes_turns
from xdit_compile.planner.device_memory import (
    MARGIN,
    STAGED_MARGIN,
    beside_coming,
    beside_held,
    counted_memory,
    estimated_values,
    held_parameters,
)
from xdit_compile.planner.machine import Machine
from xdit_compile.planner.plan_report import Option, Plan, Refused
from xdit_compile.planner.work import Staged, Work, WorkCounter
from xdit_compile.report.units import size
from xdit_compile.spec import ShardingSpec

GOALS = ("latency", "throughput")

CHECKED = 2
"""So many of the best, which differ in more than patches, are counted as the passes plan them, and are proposals."""

SLACK = 0.05
"""An estimate may be too high by so much; the best is proposed when no estimate less that is below it."""

FASTER = 4.0
"""Times the bandwidth of links, for the question what a faster one would gain."""


@dataclass(frozen=True)
class Question:
    """What is asked of a planner.

    Attributes:
        exact: whether specs whose results are approximate are refused; goal: one of GOALS.
        memory: bytes of a device, where it is not the machine's; beside: what else a pipeline keeps there.
        base: the words of the spec that are no degrees.
    """

    machine: Machine
    world: int
    loop: Loop = field(default_factory=Loop)
    goal: str = "latency"
    exact: bool = False
    memory: int | None = None
    beside: Beside = ALONE
    base: ShardingSpec = field(default_factory=ShardingSpec)

    @property
    def most(self) -> int:
        return self.machine.memory if self.memory is None else self.memory


def plan_call(model: nn.Module, inputs: Inputs, question: Question,
              progress: Callable[[str], None] = lambda _: None) -> Plan:
    """The best specs for one call of ``model``, which may be on the meta device, as may the inputs.

    Raises:
        SpecError: no spec can be proposed; says why the best ones were refused. CaptureError: as ``capture``.
    """
    args, kwargs = call_arguments(model, inputs)
    program = captured(model, args, kwargs)
    return Planner(program, parameter_groups(model), type(model).__name__).plan(question, progress)


class Planner:
    """Plans one captured call for one question after the other."""

    def __init__(self, program: Program, groups: Sequence[ParameterGroup] = (), model: str = "the model") -> None:
        self.program, self.groups, self.model = program, groups, model
        self.counter = WorkCounter(program)
        self._exact: dict[ShardingSpec, Work | Staged] = {}

    def plan(self, question: Question, progress: Callable[[str], None] = lambda _: None) -> Plan:
        """The best specs first.

        Raises:
            SpecError: none can be proposed.
        """
        start = time.perf_counter()
        tried, refused = self._estimated(question, progress)
        options: list[Option] = []
        others: list[Option] = []

        def least(option: Option) -> float:
            return option.cost if option.checked or options else option.cost * (1 - SLACK)

        while tried and len(options) < CHECKED:
            tried.sort(key=least)
            option = tried.pop(0)
            if any(replace(option.spec, num_patches=o.spec.num_patches) == o.spec for o in options
                   if o.spec.pipefusion_degree == option.spec.pipefusion_degree):
                others.append(option)
                continue
            progress(f"checking {option.spec}")
            try:
                found = option if option.checked else self._checked(option, question)
            except XditError as error:
                refused.append(_refused(option.spec, error))
                if isinstance(error, _TooLarge) and (less := self._less(option.spec, question)):
                    tried.append(less)
                continue
            # It may be slower than it looked; then others come first.
            (options if found.checked and all(found.cost <= least(o) for o in tried) else tried).append(found)
        if not options:
            raise SpecError(f"no spec for {question.world} devices of {question.machine.name} can be proposed for "
                            f"{self.model}: " + "; ".join(f"{r.spec}: {r.reason}" for r in refused[:4]))
        faster = self._seconds(options[0].spec, replace(question, machine=question.machine.faster(FASTER)))
        return Plan(self.model, question.machine.name, question.world, question.goal, question.exact,
                    question.loop.steps, question.loop.calls, tuple(options), (*others, *tried), tuple(refused),
                    self._folklore(question), FASTER, faster.total, time.perf_counter() - start)

    def option(self, spec: ShardingSpec, question: Question) -> Option:
        """What ``spec`` takes, as the passes plan it.

        Raises:
            SpecError: it does not fit the call, or the devices.
        """
        return self._checked(self.quick(spec, question), question)

    def quick(self, spec: ShardingSpec, question: Question) -> Option:
        """What it takes by an estimate, in memory of any size.

        Raises:
            SpecError: it does not fit the call, as far as an estimate sees.
        """
        return self._option(spec, question, self.counter.quick)

    def _estimated(self, question: Question, progress: Callable[[str], None]) -> tuple[list[Option], list[Refused]]:
        tried: list[Option] = []
        refused: list[Refused] = []
        for spec in candidates(question.base, question.world, question.loop, False, question.goal == "throughput"):
            if question.exact and approximate(spec):
                refused.append(Refused(str(spec), "approximate: patches attend to keys and values of the step before, "
                                                  "and exactness was asked for"))
                spec = replace(spec, num_patches=1)
                if any(o.spec == spec for o in tried):
                    continue
            progress(f"counting {spec}")
            try:
                tried.append(self._fitting(spec, question))
            except XditError as error:
                refused.append(_refused(spec, error))
        return tried, refused

    def _fitting(self, spec: ShardingSpec, question: Question) -> Option:
        """The option of a spec, or of the same with weights in shares where a device would not hold it."""
        option = self.quick(spec, question)
        found = option if option.memory <= question.most else self._less(spec, question)
        if found is None:
            raise _too_large(option, question)
        return found

    def _less(self, spec: ShardingSpec, question: Question) -> Option | None:
        """The first of the specs that put less on each device than ``spec`` that fits, as far as an estimate sees."""
        for other in smaller(spec, any(e.cut for e in question.beside.encoders)):
            with suppress(XditError):  # where groups take turns, fewer ranks can hold shares
                less = self.quick(other, question)
                if less.memory <= question.most:
                    return less
        return None

    def _option(self, spec: ShardingSpec, question: Question,
                count: Callable[[ShardingSpec], Work | Staged]) -> Option:
        work = count(self._of_one_turn(spec, question.loop))
        values = self._values(work, spec, question)
        memory = values + self.resident(spec, question) + max(beside_coming(question.beside, spec) - values, 0)
        seconds = loop_seconds(work, self.counter.whole, spec, question.machine, question.loop).plus(
            encoder_seconds(question.beside.encoders, spec, question.machine))
        data = spec.data_degree if question.goal == "throughput" else 1
        return Option(spec, seconds, seconds.total / data, memory, False, approximate(spec))

    def _of_one_turn(self, spec: ShardingSpec, loop: Loop) -> ShardingSpec:
        """The spec of the group that makes one call, where groups of guidance or samples of their own take turns."""
        if takes_turns(spec, loop):
            return replace(spec, cfg_degree=1, data_degree=1, vae_degree=1, encoders="everywhere")
        return spec

    def _values(self, work: Work | Staged, spec: ShardingSpec, question: Question) -> float:
        turn = self._of_one_turn(spec, question.loop)
        groups = turn.batch_degree if turn.batch_degree <= question.loop.batch else 1
        return estimated_values(work, self.counter.whole, spec, groups)

    def _checked(self, option: Option, question: Question) -> Option:
        """The same as the passes plan it, with the memory of its programs where that is close."""
        made = replace(self._option(option.spec, question, self._counted), checked=True)
        margin = STAGED_MARGIN if option.spec.pipefusion_degree > 1 else MARGIN
        if question.most / margin < made.memory < question.most * margin:
            spec = self._of_one_turn(option.spec, question.loop)
            estimate = held_parameters(self.counter.whole.parameters, spec) + self._values(
                self._counted(spec), option.spec, question)
            made = replace(made, memory=made.memory - estimate + counted_memory(self.program, spec, self.groups))
        if made.memory > question.most:
            raise _too_large(made, question)
        return made

    def resident(self, spec: ShardingSpec, question: Question) -> float:
        """Bytes that are on a rank's device between calls: parameters, and what else a pipeline keeps there."""
        return held_parameters(self.counter.whole.parameters, spec) + beside_held(question.beside, spec)

    def _counted(self, spec: ShardingSpec) -> Work | Staged:
        if spec not in self._exact:
            self._exact[spec] = self.counter.exact(spec)
        return self._exact[spec]

    def _seconds(self, spec: ShardingSpec, question: Question) -> Seconds:
        return self._option(spec, question, self._counted).seconds

    def _folklore(self, question: Question) -> Option | None:
        """Guidance first, then Ulysses: what people are told to use."""
        for spec in folklore(question):
            try:
                return self._option(spec, question, self._counted)
            except XditError:
                continue
        return None


def folklore(question: Question) -> Iterable[ShardingSpec]:
    """``cfg`` as far as there is guidance, all other devices for Ulysses; without ``cfg`` where that does not go."""
    world, loop = question.world, question.loop
    if world % 2 == 0 and (loop.calls > 1 or loop.batch % 2 == 0):
        yield replace(question.base, cfg_degree=2, ulysses_degree=world // 2)
    yield replace(question.base, ulysses_degree=world)


class _TooLarge(SpecError):
    """What a rank takes is more than a device has."""


def _too_large(option: Option, question: Question) -> _TooLarge:
    held = beside_held(question.beside, option.spec)
    others = f", {size(held)} of it other components of the pipeline" if held else ""
    return _TooLarge(f"does not fit: a rank takes {size(option.memory)}{others}, a device has {size(question.most)}")


def _refused(spec: ShardingSpec, error: XditError) -> Refused:
    return Refused(str(spec), str(error).removeprefix(f"{spec} ").splitlines()[0])
