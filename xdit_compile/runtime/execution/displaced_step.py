"""Runs steps in which ranks have of others what these had a step before, while what they have now travels.

DistriFusion (arXiv 2402.19481): the collectives that a step starts are waited for by the next.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed import ProcessGroup

from xdit_compile.ir.program import Program
from xdit_compile.runtime.execution.executor import NONE, Executor, Shares
from xdit_compile.runtime.execution.held_inputs import State, unwatched
from xdit_compile.spec import ALL

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DisplacedStep:
    """One rank's programs, of exact steps and of all others, each with what it keeps from step to step (``Executor``'s
    ``invariant``). Both end with the same collectives, which the next step takes as its caches."""

    exact: tuple[Program, Program | None]
    late: tuple[Program, Program | None]


class OnTheWay:
    """What one condition's loop has sent and not read yet; and how many steps it has made. What nobody will read is
    waited for when the loop is over, at the latest when the process ends."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self.steps = 0
        weakref.finalize(self, _arrive_at_last, self.tensors)

    def taken(self) -> list[torch.Tensor]:
        """What is on the way, which the caller waits for."""
        tensors = [*self.tensors]
        self.tensors.clear()
        return tensors

    def arrive(self) -> None:
        """Wait for what nobody will read."""
        for tensor in self.taken():
            torch.ops._c10d_functional.wait_tensor.default(tensor)


def _arrive_at_last(tensors: list[torch.Tensor]) -> None:
    try:
        while tensors:
            torch.ops._c10d_functional.wait_tensor.default(tensors.pop(0))
    except RuntimeError as error:  # of a peer or a group that is gone, which whoever needs it is told
        log.info("what was on the way to a step that never came did not arrive: %s", error)


class DisplacedStepExecutor:
    """The programs bound to a model. Called with the flat argument tensors, and what the loop has sent.

    Args:
        counts: counts in ``displaced`` the steps that were not exact, and in ``paced`` all.
    """

    def __init__(self, step: DisplacedStep, model: nn.Module, counts: Counter[str], shares: Shares = NONE,
                 state: State = unwatched) -> None:
        self.step, self._counts = step, counts
        self._exact, self._late = (Executor(p, model, i, counts, shares, state) for p, i in (step.exact, step.late))
        spec = step.exact[0].spec
        assert spec is not None
        self._warmup = spec.warmup_steps
        self._loops: weakref.WeakSet[OnTheWay] = weakref.WeakSet()

    @property
    def programs(self) -> tuple[Program, ...]:
        return (*self._exact.programs, *self._late.programs)

    def check_groups(self, groups: Sequence[ProcessGroup]) -> None:
        for one in (self._exact, self._late):
            one.check_groups(groups)

    def forget(self, suspect: bool = False) -> None:
        for loop in self._loops:
            loop.arrive()
        for one in (self._exact, self._late):
            one.forget(suspect)

    def begin(self) -> OnTheWay:
        """What a loop begins with."""
        loop = OnTheWay()
        self._loops.add(loop)
        return loop

    def __call__(self, tensors: Sequence[torch.Tensor], loop: OnTheWay) -> tuple[torch.Tensor, ...]:
        """The results of the next step of ``loop``."""
        exact = not loop.tensors or self._warmup == ALL or loop.steps < int(self._warmup)
        if exact:
            loop.arrive()
        results = self._exact(tensors) if exact else self._late(tensors, caches=loop.taken())
        count = self.step.exact[0].for_next_step
        loop.tensors += results[len(results) - count:]
        results = results[: len(results) - count]
        loop.steps += 1
        self._counts["paced"] += 1
        self._counts["displaced"] += not exact
        return tuple(results)
