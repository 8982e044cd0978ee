"""Calls of a parallel model: each is agreed upon, captured and compiled when it is new, and run."""

from __future__ import annotations

import inspect
import logging
import time
import warnings
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from xdit_compile.driver.checkpoint import Checkpoint
from xdit_compile.driver.program_source import ProgramSource, Runnable
from xdit_compile.errors import SpecError, XditError
from xdit_compile.frontend.caller import check_call, unwatched
from xdit_compile.frontend.offload_hooks import take_off
from xdit_compile.ir import host_values
from xdit_compile.ir.call_arguments import bind_call, named_leaves
from xdit_compile.ir.mesh import SHARD, position_of
from xdit_compile.ir.parameter_groups import ParameterGroup, parameter_groups
from xdit_compile.ir.pytree import flatten
from xdit_compile.ir.released_parameters import (
    absence,
    arrive,
    missing_parameters,
    release_parameters,
    wait_for,
)
from xdit_compile.ir.step_inputs import condition, condition_among, timestep_inputs
from xdit_compile.passes import NOTHING
from xdit_compile.progress import progress
from xdit_compile.runtime.control.agreement_channel import Facts
from xdit_compile.runtime.control.one_call_at_a_time import alone
from xdit_compile.runtime.control.replicas import FACT, Replicas
from xdit_compile.runtime.control.tensor_digest import Fingerprint
from xdit_compile.runtime.deferred.deferred_tensor import DeferredTensor, materialize
from xdit_compile.runtime.execution.cached_step import CachedStepExecutor
from xdit_compile.runtime.execution.displaced_step import DisplacedStep, DisplacedStepExecutor
from xdit_compile.runtime.execution.executor import NONE, Executor
from xdit_compile.runtime.execution.loop_invariant_cache import LATE
from xdit_compile.runtime.execution.parameter_store import ParameterStore
from xdit_compile.runtime.parallel_group import CheckInputs, ParallelGroup, check_when
from xdit_compile.runtime.pipefusion.denoising_loops import DenoisingLoop, DenoisingLoops, Step
from xdit_compile.runtime.pipefusion.loop_boundaries import LoopBoundaries, times_later
from xdit_compile.runtime.pipefusion.schedule import RESULT
from xdit_compile.runtime.pipefusion.stage_executor import StageExecutor
from xdit_compile.spec import ALL, ShardingSpec

log = logging.getLogger(__name__)

PLAIN = frozenset({torch.Tensor, nn.Parameter, DeferredTensor})
"""Types of tensors that a call may be made with."""

SteppingExecutor = CachedStepExecutor | DisplacedStepExecutor

RESTARTS = 8
"""First steps in a row that are more than a pipeline's terms of guidance."""


@dataclass(frozen=True)
class ReadyProgram:
    """A program that can run, and the ranks that run it together: all of them, or the group whose turn it is."""

    kind: Any
    compiled: Runnable
    executor: Executor | StageExecutor | SteppingExecutor
    group: ParallelGroup
    round_robin: bool


class ModelRunner:
    """The state behind a parallel model: a program for each kind of call seen so far.

    A call's batch is shared out among ``cfg`` and ``data`` if it can be. A batch too small for that is a call that
    groups take turns in: one of the calls that guidance makes in a row.
    """

    def __init__(self, model: nn.Module, group: ParallelGroup, check_inputs: CheckInputs, source: ProgramSource,
                 weights: Checkpoint | None = None) -> None:
        check_when(check_inputs)
        self.model, self.group, self.source = model, group, source
        self.check_inputs = group.spec.world_size > 1 and check_inputs  # one rank agrees with itself
        self.weights = weights
        self.programs: dict[int, ReadyProgram] = {}
        """By the identity of the kind of call, which ``ReadyProgram`` keeps alive."""
        self.loops, self.steps, self.restarts = DenoisingLoops(), 0, 0
        self.boundaries, self.changes = LoopBoundaries(), 0
        self.stages: dict[str, int] = {}
        """Of blocks seen so far: their weights are on the ranks of that stage, whatever call comes."""
        self.used: set[str] = set()
        self._told: set[int] = set()
        """Kinds of calls that are known to come again."""
        self.begun: tuple[int, frozenset[Hashable]] = (0, frozenset())
        """Of the denoising loop: the pipeline's call that it is in, and the keys of its loops."""
        self.replicas = Replicas()
        self.store: ParameterStore | None = None
        """Shares of parameters, once the first program is made that takes some."""
        self.offloaded = False
        """Whether offloading of others was taken off, and programs do it in its place, whatever the spec says."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.group.spec.pipefusion_degree == 1:
            try:
                args, kwargs = tuple(map(materialize, args)), {n: materialize(a) for n, a in kwargs.items()}
            except RecursionError:
                flatten((args, kwargs))  # says which object it is
                raise
        bound = bind_call(self.model, args, kwargs)
        tensors, _ = flatten((bound.args, bound.kwargs))
        check_call(tensors, PLAIN)
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            raise XditError("a parallel model computes no gradients, but an input requires them; "
                            "call it under torch.no_grad() or detach the input")
        with alone(self.group.timeout):
            return self._called(bound, tensors)

    def _called(self, bound: inspect.BoundArguments, tensors: Sequence[torch.Tensor]) -> Any:
        self.group.counts["calls"] += 1
        ready = None
        try:
            if self.store is not None:
                self.store.check(self.model)
            named, others = named_leaves(bound)
            kind, fresh, changed = self._find(bound, named, others)
            if self.group.spec.keeps_steps and self.programs:
                # A loop that ended on one rank alone would leave ranks waiting for each other.
                others = {**others, "the model": "other than at the last call" if changed else "as it was"}
            ready = self.programs.get(id(kind))
            if ready is None:
                self.take_over()
            samples = _samples(ready, tensors, named)
            fingerprint = self._fingerprint(ready, {n: t for n, t in named.items() if n not in samples}, others)
            # What is new is compared before it runs, all else while it does.
            waits = fresh or ready is None or self.check_inputs == "always"
            loop = None
            if ready is not None and samples:
                loop = self._loop(ready, named, samples, fingerprint)
            if loop is not None and loop.steps == 1 and self.check_inputs:
                # Later ones are promised patch by patch, of values that all ranks are sent.
                begun = Fingerprint({}, {n: materialize(named[n]) for n in samples})
                self._agree(lambda: {**fingerprint(), **begun()}, True)
            else:
                self._agree(fingerprint, waits)
            if ready is None:
                ready = self._prepare(bound.args, bound.kwargs)
            elif id(kind) not in self._told:
                self._told.add(id(kind))
                log.info("program %s of %s used again", ready.compiled.name, type(self.model).__name__)
            output_spec = ready.compiled.output_spec
            if output_spec.written:
                output_spec.check(tensors, (*self.model.parameters(), *self.model.buffers(),
                                            *ready.compiled.body.constants.values()))
            results: Sequence[torch.Tensor]
            if isinstance(ready.executor, StageExecutor):
                if loop is None and (samples := _samples(ready, tensors, named)):
                    loop = self._loop(ready, named, samples, fingerprint)
                results = self._through_stages(ready, ready.executor, tensors, loop)
            elif ready.round_robin:
                results = self._in_turn(ready, self._bound(ready, ready.executor, tensors, named))
            else:
                results = self._together(ready, self._bound(ready, ready.executor, tensors, named))
        except BaseException as error:
            # What all ranks raise alike before any collective ends nothing: the next call may well succeed.
            self.group.control.fail(error, "a call of the model")
            # Looked for only now: another parallel model may have given up what this one reads.
            if isinstance(error, RuntimeError) and ready is not None and (
                    absent := missing_parameters(self.model, ready.compiled.parameters)):
                raise absence(self.model, absent, "load the model anew") from error
            raise
        return output_spec.finish((bound.args, bound.kwargs), tensors, results)

    def take_over(self) -> bool:
        """Take offloading of others off the model, whose programs bring its weights block by block from then on.

        Raises:
            CaptureError, SpecError: they cannot.
        """
        device = take_off(self.model)
        if device is None:
            return False
        if not self.offloaded and self.group.spec.offload == "none" and self.group.rank == 0:
            log.warning("what offloads %s was taken off; programs do it in its place (offload=block)",
                        type(self.model).__name__)
        self.offloaded = True
        self._under(self.group.spec)  # says if that does not go together
        self.programs.clear()
        wait_for(self.model, device)
        return True

    def _under(self, spec: ShardingSpec) -> ShardingSpec:
        """What programs are compiled for."""
        return replace(spec, offload="block") if self.offloaded else spec

    def _fingerprint(self, ready: ReadyProgram | None, given: Mapping[str, torch.Tensor],
                     others: Mapping[str, str]) -> Fingerprint:
        """What all ranks must be called with."""
        # Also which program: a rank that has to capture one waits for the others to do so too.
        program = {"program": ready.compiled.name if ready else "still to be made"}
        if not self.check_inputs:
            return Fingerprint(program, {})
        return Fingerprint({**program, **others}, {n: materialize(t) for n, t in given.items()})

    def _agree(self, fingerprint: Facts, waits: bool) -> None:
        """Compare what ranks call the model with, and outside of a pipeline, which does so itself, its weights."""
        control = self.group.control
        if not self.check_inputs or self.group.running:
            control.agree_meanwhile("the call's inputs", fingerprint, waits)
        else:
            held = {FACT: self.replicas.summary({"": self.model}, self.source.state)}
            control.agree_meanwhile("the call's inputs", lambda: {**fingerprint(), **held}, waits,
                                    self.replicas.resolve(control.ranks))

    def _find(self, bound: inspect.BoundArguments, named: Mapping[str, torch.Tensor],
              others: Mapping[str, str]) -> tuple[Any, bool, bool]:
        """The kind of a call, whether it begins a loop, and whether the model has changed. Where one begins, or the
        model has changed, nothing is kept of steps before."""
        begun = self.boundaries.begins(self.group.epoch if self.group.running else None, named,
                                       (condition_among(named), *others.values()))
        kind = self.source.find(bound.args, bound.kwargs, begun.here)
        if begun.before:
            # What is costly to compare is compared now; what is cheap was, at the call before too.
            counted = self.source.changes
            kind = self.source.find(bound.args, bound.kwargs, True)
            if self.source.changes != counted:
                raise XditError(f"{type(self.model).__name__} {LATE}")
        changed, self.changes = self.changes != self.source.changes, self.source.changes
        if begun.here or begun.before or changed:
            # Before loops are gone: what they have sent and nobody will read is waited for.
            for ready in self.programs.values():
                ready.executor.forget(begun.before)
            if self.group.spec.keeps_steps:
                self.loops.end()
        return kind, begun.here or begun.before, changed

    def _bound(self, ready: ReadyProgram, executor: Executor | SteppingExecutor, tensors: Sequence[torch.Tensor],
               named: Mapping[str, torch.Tensor]) -> Callable[[], Sequence[torch.Tensor]]:
        """What computes the results of this call. All ranks ask for it, also those that will not compute them."""
        if isinstance(executor, Executor):
            return lambda: executor(tensors)
        # Whether this step goes on from the one before is known when its time is, wherever that lies.
        epoch, times, rest = self.group.epoch, times_later(named)(), condition(named)
        # Within a pipeline's call, what a step is made with may change from step to step.
        texts = Fingerprint({}, {} if self.group.running else rest)
        branch = self.loops.branch(id(ready), times, epoch) if self.group.running else 0
        loop = self.loops.next(Step((id(ready), branch), list(rest.values()), lambda: tuple(texts().items()),
                                    lambda: times, epoch, executor.begin, not self.group.running))
        if loop.steps == 1:
            loop.caches = executor.begin()
        return lambda: executor(tensors, loop.caches)

    def _together(self, ready: ReadyProgram, compute: Callable[[], Sequence[torch.Tensor]]) -> Sequence[torch.Tensor]:
        """The results, computed by all ranks."""
        self.group.counts["shared"] += ready.group is self.group
        with self.group.control.guard("the forward pass", ready.group.process_groups.bind()):
            return compute()

    def _in_turn(self, ready: ReadyProgram, compute: Callable[[], Sequence[torch.Tensor]]) -> Sequence[DeferredTensor]:
        """The results as promised by the group whose turn it is, which computes them now."""
        round_robin, results = self.group.round_robin, None
        assert round_robin is not None
        owner = round_robin.next(self)
        if owner == round_robin.mine:
            with self.group.control.guard("the forward pass", ready.group.process_groups.bind()):
                results = compute()
        return round_robin.promise(owner, results, ready.compiled.output_spec.likes)

    def _loop(self, ready: ReadyProgram, named: Mapping[str, torch.Tensor], samples: Collection[str],
              fingerprint: Fingerprint) -> DenoisingLoop:
        """The loop that a call of stages is a step of.

        Args:
            samples: names of what stages take patch by patch.
            fingerprint: of all others, unless ranks compare nothing.
        """
        executor, round_robin = ready.executor, self.group.round_robin if ready.round_robin else None
        assert isinstance(executor, StageExecutor)
        others = {n: materialize(t) for n, t in named.items() if n not in samples}
        times = timestep_inputs(others)
        condition = {n: t for n, t in others.items() if n not in times}
        texts = fingerprint if self.check_inputs else Fingerprint({}, condition)
        mine = round_robin is None or round_robin.turn(self) == round_robin.mine
        step = Step((id(ready), round_robin.turn(self) if round_robin else 0), list(condition.values()),
                    lambda: tuple((n, text) for n, text in texts().items() if n in condition), times_later(others),
                    self.group.epoch, executor.caches if mine else list, not self.group.running)
        # Outside of a pipeline, a sample that comes from elsewhere may be the first of a loop.
        follows = self.group.running or all(
            isinstance(t := named[n], DeferredTensor) and t.tape is executor.communicator.tape for n in samples)
        waits = self.check_inputs == "always" or all(map(host_values.on_host, others.values()))
        loop = self.loops.next(step, follows and not waits)
        self.group.late[id(self)] = self.loops.settle
        if loop.steps == 1 and self._loop_begins((step.program, step.key())):
            executor.begin()
        self._notice(loop.steps)
        return loop

    def _through_stages(self, ready: ReadyProgram, executor: StageExecutor, tensors: Sequence[torch.Tensor],
                        loop: DenoisingLoop | None) -> Sequence[DeferredTensor]:
        """The results as the last stage will send them. Without a loop, a step is exact."""
        communicator, spec = executor.communicator, ready.group.spec
        round_robin = self.group.round_robin if ready.round_robin else None
        owner = round_robin.next(self) if round_robin else 0
        mine = round_robin is None or owner == round_robin.mine
        loop = loop or DenoisingLoop((), None, (), 0, 1)
        exact = spec.warmup_steps == ALL or loop.steps <= int(spec.warmup_steps)
        last = communicator.audience[(owner + 1) * len(communicator.column) - 1]
        with self.group.control.guard("the forward pass", (*ready.group.process_groups.bind(), *communicator.all())):
            return executor(tensors, loop, exact, ready.compiled.output_spec.likes, last, mine)

    def _loop_begins(self, key: Hashable) -> bool:
        """Whether a loop's first step is that of a loop, and not of another term of guidance in the same loop."""
        first = self.steps > 1 or self.restarts >= RESTARTS or self.group.epoch != self.begun[0] or key in self.begun[1]
        self.begun = (self.group.epoch, frozenset({key}) if first else self.begun[1] | {key})
        return first

    def _notice(self, steps: int) -> None:
        """Say so once if no call of a pipeline follows another, because something else than times changes."""
        self.steps, self.restarts = steps, self.restarts + 1 if steps == 1 else 0
        if self.restarts == RESTARTS and self.group.running and self.group.rank == 0:
            warnings.warn(f"each call of {type(self.model).__name__} is taken for the first of a loop, because its "
                          "inputs change from step to step, its sample and times aside: all steps are exact, and "
                          "stages run one after the other", stacklevel=6)

    def _prepare(self, args: Any, kwargs: Any) -> ReadyProgram:
        """Capture and compile a new kind of call."""
        start = time.perf_counter()
        try:
            with unwatched():
                kind = self.source.make(args, kwargs)
                middle = time.perf_counter()
                with progress(f"planning {type(self.model).__name__} under {self._under(self.group.spec)}"):
                    compiled, group = self._compiled(kind)
        except Exception as error:
            # Told to the others, who else would wait for this rank's plan. All failing alike, the group lives on.
            self.group.control.agree("the plan", {"error": f"{type(error).__name__}: {error}"})
            raise
        log.info("program %s of %s under %s: captured or found in %.2f s, planned in %.2f s", compiled.name,
                 type(self.model).__name__, group.spec, middle - start, time.perf_counter() - middle)
        self.group.control.agree("the plan", compiled.digest())
        try:
            with progress(f"getting the weights of {type(self.model).__name__}"):
                self._get_weights(compiled, self._under(group.spec), group.rank)
        except Exception as error:
            self.group.control.agree("getting ready", {"error": f"{type(error).__name__}: {error}"})
            raise
        self.group.control.agree("getting ready", {})
        if self.weights is not None and self.check_inputs:
            self.replicas.summary({"": self.model})
            self.replicas.compare(self.group.control)
            if group.spec.parts:
                self.group.control.agree("the files of weights", {"files": self.weights.digest()})
        with self.group.control.guard("getting ready", tuple(self.group.groups_of_all())):
            executor = self._executor(compiled, group)
        if compiled.unsharded and group.spec.sequence_degree > 1 and self.group.rank == 0:
            warnings.warn(f"{type(self.model).__name__} under {group.spec}: {NOTHING}", stacklevel=4)
        if compiled.lost and self.group.rank == 0:
            warnings.warn(f"{type(self.model).__name__} under {group.spec}: {compiled.lost}", stacklevel=4)
        round_robin = group is not self.group and self.group.round_robin is not None and (
            not compiled.output_spec.changes_arguments)
        if compiled.stage is not None or self.store is not None or compiled.step is not None:
            # Weights that were given up just now, and tables made, are no change that another call makes.
            self.source.find(args, kwargs)
            self.changes = self.source.changes
        self.programs[id(kind)] = ReadyProgram(kind, compiled, executor, group, round_robin)
        return self.programs[id(kind)]

    def _compiled(self, kind: Any) -> tuple[Runnable, ParallelGroup]:
        """The program for this rank, and who runs it."""
        group, groups = self.group, self._groups()
        try:
            return self.source.compiled(kind, self._under(group.spec), group.rank, self.stages, groups), group
        except SpecError:
            if group.subgroup is None:
                raise
        group = group.subgroup
        return self.source.compiled(kind, self._under(group.spec), group.rank, self.stages, groups), group

    def _groups(self) -> Sequence[ParameterGroup]:
        """Of the model's parameters, where they come block by block: found once, so that all programs share them."""
        if self.store is not None:
            return tuple(self.store.groups.values())
        return parameter_groups(self.model) if self._under(self.group.spec).parts else ()

    def _get_weights(self, compiled: Runnable, spec: ShardingSpec, rank: int) -> None:
        """Read those that this rank needs and was not given.

        Raises:
            XditError: some are nowhere.
        """
        names = compiled.parameters
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        if self.weights is not None:
            self.weights.load(self.model, names, device)
        if absent := missing_parameters(self.model, names):
            raise absence(self.model, absent, "give parallelize weights=FOLDER")
        if spec.parts:
            if self.store is None:
                self.store = ParameterStore(compiled.groups, position_of(rank, spec)[SHARD], spec.shard_degree,
                                            spec.offload != "none")
            self.store.take(self.model, compiled.shares, self.weights.spans if self.weights else None, device)
            if self.offloaded:
                arrive(self.model)

    def _executor(self, compiled: Runnable, group: ParallelGroup) -> Executor | StageExecutor | SteppingExecutor:
        """What runs the program here. All ranks come to it together."""
        stage, shares, source = compiled.stage, self.store or NONE, self.source

        def state() -> object | None:
            return source.state

        if compiled.step is not None:
            kind = DisplacedStepExecutor if isinstance(compiled.step, DisplacedStep) else CachedStepExecutor
            stepping = kind(compiled.step, self.model, self.group.counts, shares, state)  # type: ignore[arg-type]
            stepping.check_groups(group.process_groups.all())
            return stepping
        if stage is None:
            executor = Executor(compiled.body, self.model, compiled.invariant, self.group.counts, shares, state)
            executor.check_groups(group.process_groups.all())
            return executor
        group.communicator.connect([(e.source, e.target) for e in stage.edges if e.name != RESULT])
        new = {path: i for i, paths in enumerate(stage.blocks) for path in paths if path not in self.stages}
        self.stages |= new
        self.used |= compiled.parameters
        # Adapters that came later stay on every rank, where they are edited.
        release_parameters(self.model, [path for path, i in new.items() if i != group.stage], self.used)
        return StageExecutor(stage, self.model, group.communicator, self.group.counts, shares, state)


def _samples(ready: ReadyProgram | None, tensors: Sequence[torch.Tensor],
             named: Mapping[str, torch.Tensor]) -> set[str]:
    """The names of arguments that stages take patch by patch."""
    if ready is None or not isinstance(ready.executor, StageExecutor):
        return set()
    places = {id(tensors[i]) for i in ready.executor.stage.samples}
    return {n for n, t in named.items() if id(t) in places}
