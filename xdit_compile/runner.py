"""Calls of a parallel model: each is agreed upon, captured and compiled when it is new, and run."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from xdit_compile.calls import bind_call, named_leaves
from xdit_compile.errors import CaptureError, RankMismatch, SpecError, XditError
from xdit_compile.givenup import absent_of, give_up
from xdit_compile.passes import NOTHING
from xdit_compile.runtime.crew import Crew
from xdit_compile.runtime.deferred import Deferred, concrete
from xdit_compile.runtime.digest import digests
from xdit_compile.runtime.executor import Executor
from xdit_compile.runtime.flow import Flow
from xdit_compile.runtime.lanes import Lane, Lanes
from xdit_compile.runtime.schedule import RESULT
from xdit_compile.source import Runnable, Source
from xdit_compile.spec import ALL
from xdit_compile.steps import times_among
from xdit_compile.structure import flatten
from xdit_compile.weights import Weights

RESTARTS = 8
"""First steps in a row that are more than a pipeline's terms of guidance."""


@dataclass(frozen=True)
class Ready:
    """A program that can run, and the ranks that run it together: all of them, or the group whose turn it is."""

    kind: Any
    compiled: Runnable
    executor: Executor | Flow
    crew: Crew
    turns: bool


class Runner:
    """The state behind a parallel model: a program for each kind of call seen so far.

    A call's batch is shared out among ``cfg`` and ``data`` if it can be. A batch too small for that is a call that
    groups take turns in: one of the calls that guidance makes in a row.
    """

    def __init__(self, model: nn.Module, crew: Crew, check_inputs: bool, source: Source,
                 weights: Weights | None = None) -> None:
        self.model, self.crew, self.check_inputs, self.source = model, crew, check_inputs, source
        self.weights = weights
        self.programs: dict[int, Ready] = {}
        """By the identity of the kind of call, which ``Ready`` keeps alive."""
        self.lanes, self.steps, self.restarts = Lanes(), 0, 0
        self.stages: dict[str, int] = {}
        """Of blocks seen so far: their weights are on the ranks of that stage, whatever call comes."""
        self.used: set[str] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.crew.spec.pipefusion_degree == 1:
            args, kwargs = tuple(map(concrete, args)), {n: concrete(a) for n, a in kwargs.items()}
        bound = bind_call(self.model, args, kwargs)
        tensors, _ = flatten((bound.args, bound.kwargs))
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            raise XditError("a parallel model computes no gradients, but an input requires them; "
                            "call it under torch.no_grad() or detach the input")
        try:
            kind = self.source.find(bound.args, bound.kwargs)
            ready = self.programs.get(id(kind))
            # Also which program: a rank that has to capture one waits for the others to do so too.
            facts = {"program": ready.compiled.name if ready else "still to be made"}
            named, others = named_leaves(bound)
            later = _samples(ready, tensors, named)
            if self.check_inputs:
                facts |= digests({n: concrete(t) for n, t in named.items() if n not in later}) | others
            agreed = ready is None or not (ready.turns or later)
            if agreed:
                self.crew.control.agree("the call's inputs", facts)
            self.crew.counts["calls"] += 1
            ready = ready or self._prepare(bound.args, bound.kwargs)
            results: Sequence[torch.Tensor]
            if isinstance(ready.executor, Flow):
                later = _samples(ready, tensors, named)
                results = self._through_stages(ready, ready.executor, tensors, named, later, facts, agreed)
            elif ready.turns:
                results = self._in_turn(ready, ready.executor, tensors, facts)
            else:
                results = self._together(ready, ready.executor, tensors)
        except (RankMismatch, CaptureError, SpecError):
            # All ranks raise alike, before any collective: the next call may well succeed.
            raise
        except BaseException:
            self.crew.forget()
            raise
        return ready.compiled.answer.finish((bound.args, bound.kwargs), tensors, results)

    def _together(self, ready: Ready, executor: Executor, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """The results, computed by all ranks."""
        self.crew.counts["shared"] += ready.crew is self.crew
        with self.crew.control.guard("the forward pass", ready.crew.groups.bind()):
            return executor(tensors)

    def _in_turn(self, ready: Ready, executor: Executor, tensors: Sequence[torch.Tensor],
                 facts: Mapping[str, str]) -> Sequence[Deferred]:
        """The results as promised by the group whose turn it is, which computes them now."""
        turns, results = self.crew.turns, None
        assert turns is not None
        owner = turns.next(self)
        if owner == turns.mine:
            with self.crew.control.guard("the forward pass", ready.crew.groups.bind()):
                try:
                    ready.crew.control.agree("the call's inputs", facts)
                except RankMismatch as error:
                    # The other groups are elsewhere and must be told: to them it is a failure.
                    raise XditError(str(error)) from error
                results = executor(tensors)
        return turns.promise(owner, results, ready.compiled.answer.likes, facts)

    def _through_stages(self, ready: Ready, flow: Flow, tensors: Sequence[torch.Tensor],
                        named: Mapping[str, torch.Tensor], later: Collection[str], facts: Mapping[str, str],
                        agreed: bool) -> Sequence[Deferred]:
        """The results as the last stage will send them.

        Args:
            later: names of samples, which may be deferred on some ranks and settled on others.
            agreed: whether ranks have just compared what they call the model with. Else they do so at the first step of
                a loop; after that they are at different steps, and a digest travels with the first values.
        """
        stream, spec, turns = flow.stream, ready.crew.spec, self.crew.turns if ready.turns else None
        others = {n: concrete(t) for n, t in named.items() if n not in later}
        times = [others.pop(n).double() for n in sorted(times_among(others))]
        time = tuple(x for t in times if t.numel() for x in (t.min().item(), t.max().item()))
        owner = turns.next(self) if turns else 0
        mine = turns is None or owner == turns.mine
        lane = Lane((), time, time, 0, 1)
        if later:
            key = (id(ready), owner, tuple(digests(others).items()))
            lane = self.lanes.next(key, time, self.crew.epoch, flow.caches if mine else list)
            if lane.steps == 1 < self.steps:
                flow.begin()
            self._notice(lane.steps)
            if lane.steps == 1 and self.check_inputs and not agreed:
                samples = digests({n: concrete(named[n]) for n in later})
                self.crew.control.agree("the call's inputs", {**facts, **samples})
        exact = spec.warmup_steps == ALL or lane.steps <= int(spec.warmup_steps)
        last = stream.audience[(owner + 1) * len(stream.column) - 1]
        with self.crew.control.guard("the forward pass", (*ready.crew.groups.bind(), *stream.groups())):
            return flow(tensors, lane, exact, facts, ready.compiled.answer.likes, last, mine)

    def _notice(self, steps: int) -> None:
        """Say so once if no call of a pipeline follows another, because something else than times changes."""
        self.steps, self.restarts = steps, self.restarts + 1 if steps == 1 else 0
        if self.restarts == RESTARTS and self.crew.running and self.crew.rank == 0:
            warnings.warn(f"each call of {type(self.model).__name__} is taken for the first of a loop, because its "
                          "inputs change from step to step, its sample and times aside: all steps are exact, and "
                          "stages run one after the other", stacklevel=6)

    def _prepare(self, args: Any, kwargs: Any) -> Ready:
        """Capture and compile a new kind of call."""
        try:
            kind = self.source.make(args, kwargs)
            compiled, crew = self._compiled(kind)
        except Exception as error:
            # Told to the others, who else would wait for this rank's plan. All failing alike, the group lives on.
            self.crew.control.agree("the plan", {"error": f"{type(error).__name__}: {error}"})
            raise
        self.crew.control.agree("the plan", compiled.digest())
        executor = self._executor(compiled, crew)
        if compiled.idle and crew.spec.sequence_degree > 1 and self.crew.rank == 0:
            warnings.warn(f"{type(self.model).__name__} under {crew.spec}: {NOTHING}", stacklevel=4)
        if compiled.lost and self.crew.rank == 0:
            warnings.warn(f"{type(self.model).__name__} under {crew.spec}: {compiled.lost}", stacklevel=4)
        turns = crew is not self.crew and self.crew.turns is not None and (
            not compiled.answer.changes_arguments)
        self.programs[id(kind)] = Ready(kind, compiled, executor, crew, turns)
        return self.programs[id(kind)]

    def _compiled(self, kind: Any) -> tuple[Runnable, Crew]:
        """The program for this rank, and who runs it."""
        crew = self.crew
        try:
            return self.source.compiled(kind, crew.spec, crew.rank, self.stages), crew
        except SpecError:
            if crew.part is None:
                raise
        return self.source.compiled(kind, crew.part.spec, crew.part.rank, self.stages), crew.part

    def _executor(self, compiled: Runnable, crew: Crew) -> Executor | Flow:
        """What runs the program here. All ranks come to it together."""
        stage = compiled.stage
        names = compiled.parameters
        if self.weights is not None:
            self.weights.load(self.model, names, torch.device("cuda", torch.cuda.current_device()) if
                              torch.cuda.is_available() else torch.device("cpu"))
        if absent := absent_of(self.model, names):
            raise XditError(f"{absent[0]} and {len(absent) - 1} more that this rank needs are on the meta device: give "
                            "parallelize weights=FOLDER")
        if stage is None:
            return Executor(compiled.body, self.model, compiled.steady, self.crew.counts)
        crew.stream.connect([(e.source, e.target) for e in stage.edges if e.name != RESULT])
        self.stages |= {path: i for i, paths in enumerate(stage.blocks) for path in paths}
        self.used |= names
        give_up(self.model, [path for path, i in self.stages.items() if i != crew.stage], self.used)
        return Flow(stage, self.model, crew.stream, self.crew.counts)


def _samples(ready: Ready | None, tensors: Sequence[torch.Tensor], named: Mapping[str, torch.Tensor]) -> set[str]:
    """The names of arguments that stages take patch by patch."""
    if ready is None or not isinstance(ready.executor, Flow):
        return set()
    places = {id(tensors[i]) for i in ready.executor.stage.samples}
    return {n for n, t in named.items() if id(t) in places}
