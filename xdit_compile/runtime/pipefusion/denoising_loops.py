"""What a denoising loop keeps from step to step, and when a new loop begins, which must use nothing of it.

A loop is one condition's way through the steps: a pipeline that calls its model with the condition and without it has
two. Calls belong to a loop if all their tensors but the sample and the times are equal. A loop begins anew when times
go back or start again, when it missed a step, and with each call of a pipeline: values of another picture, prompt or
resolution are never read.

Where conditions or times lie on a device, a call that looks like the next of a loop is taken for that, and looked at
one call later, when its values have arrived.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from xdit_compile.errors import XditError

Times = tuple[float, ...]

LATE = ("the call before was taken for the next step of a denoising loop, and began another one: its times or its "
        "prompt lie on a device and became known only now. What it gave has used keys and values of the loop before. "
        "Begin this loop again, and say check_inputs='always', which waits for what tells loops apart at each call")


@dataclass(frozen=True)
class Step:
    """A call of the model: what tells which loop it is a step of.

    Attributes:
        program: which program of which ranks it runs.
        condition: its tensors but the sample and the times.
        key: what is equal for conditions of equal values; ``times``: its times. Both may wait for a device.
        epoch: which loop this is, where that is known.
        make: what a new loop keeps from step to step.
        apart: whether two calls with one condition at one time leave open whose the next is: outside of a pipeline's
            call, in which they come in one order.
    """

    program: Hashable
    condition: Sequence[torch.Tensor]
    key: Callable[[], Hashable]
    times: Callable[[], Times]
    epoch: int
    make: Callable[[], Any]
    apart: bool = False


@dataclass
class DenoisingLoop:
    """A condition's steps so far.

    Attributes:
        caches: what is kept from step to step: memory of stages' programs, or what a step left for the next.
        steps: how many there were; ``first`` (None: whatever comes goes on) and ``last`` are their times, ``seen``
            counts the loop's.
        looks: what tells the objects of its last step's condition, and the program of it, from others.
    """

    caches: Any
    first: Times | None
    last: Times
    seen: int
    steps: int = 0
    looks: tuple[Hashable, Sequence[tuple[weakref.ref[torch.Tensor], int]]] = ("", ())

    def looks_like(self, step: Step) -> bool:
        """Whether the objects are those of the last step, not written into since as far as PyTorch counts."""
        program, known = self.looks
        return program == step.program and len(known) == len(step.condition) and all(
            ref() is t and version == _version(t) for (ref, version), t in zip(known, step.condition, strict=True))

    def goes_on(self, times: Times, seen: int) -> bool:
        """Whether a step at ``times`` follows the last one."""
        if self.first is None:
            return True
        if times == self.first or seen - self.seen > 1:
            return False
        moves = [(new - last) * (last - first)
                 for new, last, first in zip(times, self.last, self.first, strict=True)]
        return all(move >= 0 for move in moves)


class DenoisingLoops:
    """The loops of one model."""

    def __init__(self) -> None:
        self._loops: dict[Hashable, DenoisingLoop] = {}
        self._epoch = self._seen = 0
        self._times: Times | None = None
        self._guessed: tuple[Step, DenoisingLoop] | None = None
        self._calls: Counter[Hashable] = Counter()
        """Of each kind, at the times of the last call."""
        self._now: Counter[Hashable] = Counter()
        """Of each condition, at the times of the last call; ``_twice``: those with several at the times before."""
        self._twice: frozenset[Hashable] = frozenset()

    def branch(self, kind: Hashable, times: Times, epoch: int) -> int:
        """How many calls of this kind there were before at these times: those of guidance come in one order at each
        step."""
        if (epoch, times) != (self._epoch, self._times):
            self._calls.clear()
        self._calls[kind] += 1
        return self._calls[kind] - 1

    def end(self) -> None:
        """No loop goes on. Calls are counted on: another may follow at the same times."""
        self._loops.clear()

    def next(self, step: Step, likely: bool = False) -> DenoisingLoop:
        """The loop of a call, one step further.

        Args:
            likely: whether a call that is made with the same objects as one before is most likely the next of its loop.

        Raises:
            XditError: the call before has turned out not to have been what it was taken for.
        """
        if self._guessed is not None and self._guessed[0].epoch != step.epoch:
            self._guessed = None  # of a pipeline's call that was given up
        self.settle()
        if likely and step.epoch == self._epoch:
            for loop in self._loops.values():
                if loop.looks_like(step):
                    guess = replace(loop, steps=loop.steps + 1)
                    self._guessed = step, guess
                    return guess
        return self._known(step)

    def settle(self) -> None:
        """Look whether the last call was what it was taken for. Raises as `next`."""
        if self._guessed is None:
            return
        (step, guess), self._guessed = self._guessed, None
        found = self._known(step)
        if found.caches is not guess.caches or found.steps != guess.steps:
            self._loops.clear()
            raise XditError(LATE)

    def _known(self, step: Step) -> DenoisingLoop:
        key, times = (step.program, step.key()), step.times()
        if step.epoch != self._epoch:
            self._loops.clear()
            self._epoch = step.epoch
        if times != self._times:
            self._seen += 1
            self._twice = frozenset(k for k, calls in self._now.items() if calls > 1)
            self._now.clear()
        self._times = times
        self._now[key] += 1
        self._loops = {k: loop for k, loop in self._loops.items() if self._seen - loop.seen <= 1}
        loop = self._loops.get(key)
        # Two calls with one condition at one time are of two samples, or begin another loop: nobody knows whose the
        # next is.
        mixed = step.apart and (self._now[key] > 1 or key in self._twice)
        if loop is None or mixed or not loop.goes_on(times, self._seen):
            loop = self._loops[key] = DenoisingLoop(loop.caches if loop else step.make(), times, times, self._seen)
        loop.last, loop.seen, loop.steps = times, self._seen, loop.steps + 1
        loop.looks = step.program, [(weakref.ref(t), _version(t)) for t in step.condition]
        return loop

    def hold(self) -> None:
        """Let the next steps go on, whatever their times."""
        self.settle()
        for loop in self._loops.values():
            loop.first = None


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
