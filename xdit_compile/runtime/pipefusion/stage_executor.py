"""One rank's stage of a pipeline over patches, run step by step (PipeFusion, arXiv 2405.14430).

A call of the model does what the schedule says for this stage and returns without waiting for later stages: its results
are promised patch by patch. In the next call the first stage computes patch p of the sample from patch p of these.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils import _pytree as pytree

from xdit_compile.ir.program import Program
from xdit_compile.runtime.deferred.deferred_tensor import DeferredTensor, materialize
from xdit_compile.runtime.deferred.patch_propagation import Cut
from xdit_compile.runtime.execution.executor import NONE, Executor, Shares
from xdit_compile.runtime.execution.held_inputs import State, unwatched
from xdit_compile.runtime.pipefusion.denoising_loops import DenoisingLoop
from xdit_compile.runtime.pipefusion.schedule import RESULT, WHOLE, Bar, Edge, Op, step_ops
from xdit_compile.runtime.pipefusion.stage_communicator import PatchedResults, Shapes, StageCommunicator


@dataclass(frozen=True)
class StageProgram:
    """What one rank of a stage runs.

    Attributes:
        invariant: computes what ``once`` takes as ``invariant``, when its arguments have changed.
        once: run once per step: returns the values ``held``, then results that are the same for all patches.
        units: run for each patch, and for WHOLE: returns what is sent, then the other results.
        held: names of what ``once`` computes for ``units``.
        samples: how arguments come in pieces, by their place.
        sends: names of the values for each later stage; ``returns``: names of all, in the order of ``units``' results.
        receives: names of the values from each earlier stage; ``shapes``: of one of them in one unit.
        cuts: how the model's results come in pieces.
        results, fixed: places of the model's results among those of ``units``, and of ``once``.
        edges: all that is sent between stages; blocks: those of each stage.
    """

    invariant: Program | None
    once: Program
    units: Mapping[int, Program]
    held: tuple[str, ...]
    samples: Mapping[int, Cut]
    sends: Mapping[int, tuple[str, ...]]
    returns: tuple[str, ...]
    receives: Mapping[int, tuple[str, ...]]
    shapes: Mapping[tuple[str, int], tuple[tuple[int, ...], torch.dtype]]
    cuts: tuple[Cut | None, ...]
    results: tuple[int, ...]
    fixed: tuple[int, ...]
    edges: tuple[Edge, ...]
    blocks: tuple[tuple[str, ...], ...]

    @property
    def parameters(self) -> set[str]:
        """The names of those that this stage uses."""
        return parameters_of(self.invariant, self.once, *self.units.values())

    @property
    def shares(self) -> set[str]:
        """The names of groups of parameters of which this stage uses a share."""
        return shares_of(self.invariant, self.once, *self.units.values())

    @property
    def patches(self) -> tuple[int, ...]:
        """The units of a step that is not exact."""
        return tuple(u for u in self.units if u != WHOLE) or (WHOLE,)


def parameters_of(*programs: Program | None) -> set[str]:
    """The names of those that the programs use."""
    return {i.name for p in programs if p for i in p.inputs if i.kind == "parameter"}


def shares_of(*programs: Program | None) -> set[str]:
    """The names of groups of parameters of which the programs use a share."""
    return {i.name for p in programs if p for i in p.inputs if i.kind == "parameter_share"}


class StageExecutor:
    """A stage's programs bound to a model and to the ranks of its pipeline.

    Attributes:
        drained: how often a step waited for all results of the one before, because they were used otherwise than
            element-wise.
        bars: what this stage did in the last denoising loop and when, in seconds of this machine's clock.
        history: of each of its steps the units, and those of the step before that it was computed from.
    """

    def __init__(self, stage: StageProgram, model: nn.Module, communicator: StageCommunicator,
                 counts: Counter[str] | None = None, shares: Shares = NONE,
                 state: State = unwatched) -> None:
        self.stage, self.communicator = stage, communicator
        self._once = Executor(stage.once, model, stage.invariant, counts, shares, state)
        self._units = {unit: Executor(program, model, shares=shares, state=state)
                       for unit, program in stage.units.items()}
        self.bars: list[Bar] = []
        self.history: list[tuple[tuple[int, ...], tuple[int, ...] | None]] = []
        self.drained = 0
        self._plays: int | None = None
        if stage.once.spec is not None and stage.once.spec.backend != "eager":
            self._rehearse()

    def _rehearse(self) -> None:
        """Run every program once on some values: what is compiled at its first call is so by all stages at the same
        time, and not by each while the next ones wait."""
        for executor in (self._once, *self._units.values()):
            made = {i.name: _some(n.meta["val"]) for program in executor.programs for n, i in zip(
                program.main.graph.find_nodes(op="placeholder"), program.inputs, strict=True)
                if i.kind not in ("parameter", "constant", "invariant", "parameter_share")}
            last = max((int(n[4:]) for n in made if n.startswith("arg_")), default=-1)
            arguments = [made.get(f"arg_{i}", torch.empty(0)) for i in range(last + 1)]
            executor(arguments, made, [made[i.name] for i in executor.program.inputs if i.kind == "cache"])

    def begin(self) -> None:
        """A new denoising loop."""
        self.bars, self.history, self._plays = [], [], None

    def forget(self, suspect: bool = False) -> None:
        """Keep nothing of what was computed of arguments that do not change; ``suspect``: as `Executor.forget`."""
        self._once.forget(suspect)

    def caches(self) -> list[torch.Tensor]:
        """Memory for what is kept from step to step."""
        program = self.stage.units[WHOLE]
        holders = program.main.graph.find_nodes(op="placeholder")
        return [_zeros(n.meta["val"]) for n, i in zip(holders, program.inputs, strict=True) if i.kind == "cache"]

    def __call__(self, tensors: Sequence[torch.Tensor], loop: DenoisingLoop, exact: bool,
                 likes: Sequence[torch.Tensor], owner: int, mine: bool) -> list[DeferredTensor]:
        """The results of one call, promised.

        Args:
            tensors: the arguments; samples may be deferred.
            loop: what is kept of this condition's steps; exact: whether this step uses none of it.
            likes: tensors shaped as the results.
            owner: the global rank that will send the results; mine: whether this rank's pipeline computes them.
        """
        communicator, units = self.communicator, (WHOLE,) if exact else self.stage.patches
        tensors, before = self._prepared(tensors, units)
        if WHOLE not in units and self._plays not in (None, communicator.tape.plays):
            self._drains()
        call = communicator.promise(self.stage.cuts, units)
        if not (mine and communicator.last):
            for unit in units:
                communicator.expect(call, unit, likes, owner)
        if mine:
            _Step(self, tensors, loop, call, before, len(self.history)).run()
        communicator.advance()
        self._plays = communicator.tape.plays if WHOLE not in units else None
        return communicator.deferred(call, likes)

    def _prepared(self, tensors: Sequence[torch.Tensor],
                  units: Sequence[int]) -> tuple[list[torch.Tensor], list[PatchedResults]]:
        """The arguments, whole but for samples whose patches follow from those of earlier results; and these."""
        made, before = list(tensors), dict[PatchedResults, None]()
        for i, t in enumerate(tensors):
            if not isinstance(t, DeferredTensor):
                continue
            if t.promise.values is None and WHOLE not in units and t.tape is self.communicator.tape and (
                    t.cut == self.stage.samples.get(i)):
                before |= dict.fromkeys(_sources(t))
                continue
            if t.promise.values is None:
                t.tape.played_for = "the model, which takes its sample otherwise than its results come"
            made[i] = materialize(t)
        return made, list(before)

    def _drains(self) -> None:
        """Say once that steps wait for each other."""
        self.drained += 1
        if self.drained == 1 and self.communicator.stage == 0:
            why = self.communicator.tape.played_for or "a callback"
            warnings.warn(f"all stages wait between steps, because all of the results were needed by {why}; values "
                          "are the same, but patches of one step do not follow those of the step before", stacklevel=6)


class _Step:
    """One call: what is at hand while the schedule is carried out."""

    def __init__(self, executor: StageExecutor, tensors: Sequence[torch.Tensor], loop: DenoisingLoop,
                 call: PatchedResults, before: Sequence[PatchedResults], number: int) -> None:
        self.executor, self.stage, self.communicator = executor, executor.stage, executor.communicator
        self.tensors, self.loop = tensors, loop
        self.call, self.before, self.number = call, before, number
        self.values: dict[str, torch.Tensor] = {}
        self.coming: dict[tuple[int, int], Callable[[], list[torch.Tensor]]] = {}
        self.once: Sequence[torch.Tensor] = ()
        self.made: Sequence[torch.Tensor] = ()

    def run(self) -> None:
        stage, communicator, units = self.stage, self.communicator, self.call.units
        for unit in units[:2]:
            self._post(unit)
        self.once = self.executor._once(self.tensors)
        self.values |= dict(zip(stage.held, self.once, strict=False))
        same = {c.units for c in self.before}
        units_before = same.pop() if len(same) == 1 else (WHOLE,) if same else None
        ops = step_ops(communicator.stage, len(communicator.column), units_before, units, self.number, stage.edges)
        self.executor.history.append((units, units_before))
        do = {"recv": self._receive, "run": self._run, "send": self._send, "free": self._free}
        for op in ops:
            do[op.kind](op)
        communicator.collect(self.before)

    def _post(self, unit: int) -> None:
        """Begin to receive what ``unit`` takes from other stages."""
        for source, names in self.stage.receives.items():
            self.coming[source, unit] = self.communicator.receive(source, self._message(names, unit), self._device)

    def _message(self, names: Sequence[str], unit: int) -> Shapes:
        return [self.stage.shapes[name, unit] for name in names]

    @property
    def _device(self) -> torch.device:
        return self.tensors[0].device

    def _receive(self, op: Op) -> None:
        assert op.edge is not None
        start = time.time()
        if op.edge.name == RESULT:
            for call in (c for c in self.before if c.values is None):
                for unit in (op.unit,) if op.unit in call.units else call.units:
                    call.wait(unit)
        else:
            names = self.stage.receives[op.edge.source]
            tensors = self.coming.pop((op.edge.source, op.unit))()
            self.values |= dict(zip(names, tensors, strict=True))
            units = self.call.units
            if (ahead := units.index(op.unit) + 2) < len(units) and op.edge.source == max(self.stage.receives):
                self._post(units[ahead])
        self._bar(op, start)

    def _run(self, op: Op) -> None:
        start = time.time()
        arguments = [self._argument(i, t, op.unit) for i, t in enumerate(self.tensors)]
        self.made = self.executor._units[op.unit](arguments, self.values, self.loop.caches)
        # What is sent leaves later, when the next patch may have written into the memory that is kept.
        kept = {c.untyped_storage().data_ptr() for c in self.loop.caches}
        self.made = [t.clone() if t.untyped_storage().data_ptr() in kept else t for t in self.made]
        if self.communicator.last:
            mine = dict(zip(self.stage.results, self.made[len(self.stage.returns):], strict=True))
            # Copied, as the caller may write into results, and these may be kept.
            fixed = map(torch.clone, self.once[len(self.stage.held):])
            mine |= dict(zip(self.stage.fixed, fixed, strict=True))
            end = op.unit in (WHOLE, self.call.units[-1])
            self.communicator.publish(self.call, op.unit, [
                mine[i] if end or self.stage.cuts[i] else mine[i].new_empty([0]) for i in range(len(self.stage.cuts))])
        self._bar(op, start)

    def _argument(self, place: int, tensor: torch.Tensor, unit: int) -> torch.Tensor:
        cut = self.stage.samples.get(place)
        if unit == WHOLE or cut is None:
            return tensor
        if isinstance(tensor, DeferredTensor):
            # Only the stages that use the sample make its pieces.
            return tensor.promise.piece(tensor.place, unit) if self._uses(place) else tensor
        return cut.piece(tensor, unit)

    def _uses(self, place: int) -> bool:
        return any(i.kind == "argument" and i.name == f"arg_{place}" for i in self.stage.units[WHOLE].inputs)

    def _send(self, op: Op) -> None:
        assert op.edge is not None
        if op.edge.name == RESULT:
            return  # published with the run that made it, to all at once
        returned = dict(zip(self.stage.returns, self.made, strict=False))
        self.communicator.send(op.edge.target, [returned[name] for name in self.stage.sends[op.edge.target]])

    def _free(self, op: Op) -> None:
        assert op.edge is not None
        if op.edge.name != RESULT:  # results are joined when the step is over
            for name in self.stage.receives[op.edge.source]:
                del self.values[name]

    def _bar(self, op: Op, start: float) -> None:
        self.executor.bars.append(Bar(self.communicator.stage, op.kind, op.step, op.unit, start, time.time()))


def _zeros(like: torch.Tensor) -> torch.Tensor:
    """A tensor with memory, as the fake one has none."""
    return torch.zeros(like.shape, dtype=like.dtype, device=like.device)


def _some(like: torch.Tensor) -> torch.Tensor:
    """Different numbers, as equal ones would hide what a compiler does wrong; and what is an index everywhere."""
    if not like.is_floating_point():
        return _zeros(like)
    return torch.linspace(-1, 1, like.numel(), device=like.device).reshape(like.shape).to(like.dtype)


def _sources(tensor: DeferredTensor) -> list[PatchedResults]:
    """The calls that a deferred tensor is computed from."""
    found: dict[PatchedResults, None] = {}
    queue, seen = [tensor.promise], set()
    while queue:
        promise = queue.pop()
        if promise in seen or promise.values is not None:
            continue
        seen.add(promise)
        if isinstance(promise, PatchedResults):
            found[promise] = None
        else:
            queue += [t.promise for t in pytree.tree_leaves(promise.operands()) if isinstance(t, DeferredTensor)]
    return list(found)
