"""What a denoising loop keeps from step to step, and when a new loop begins, which must use nothing of it.

A loop is one condition's way through the steps: a pipeline that calls its model with the condition and without it has
two. Calls belong to a loop if all their tensors but the sample and the times are equal. A loop begins anew when times
go back or start again, when it missed a step, and with each call of a pipeline: values of another picture, prompt or
resolution are never read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

Times = tuple[float, ...]


@dataclass
class DenoisingLoop:
    """A condition's steps so far.

    Attributes:
        caches: what is kept from step to step: memory of stages' programs, or what a step left for the next.
        steps: how many there were; ``first`` (None: whatever comes goes on) and ``last`` are their times, ``seen``
            counts the loop's.
    """

    caches: Any
    first: Times | None
    last: Times
    seen: int
    steps: int = 0

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
        self._calls: Counter[Hashable] = Counter()
        """Of each kind, at the times of the last call."""

    def branch(self, kind: Hashable, times: Times, epoch: int) -> int:
        """How many calls of this kind there were before at these times: those of guidance come in one order at each
        step."""
        if (epoch, times) != (self._epoch, self._times):
            self._calls.clear()
        self._calls[kind] += 1
        return self._calls[kind] - 1

    def end(self) -> None:
        """No loop goes on."""
        self._loops.clear()
        self._calls.clear()

    def next(self, key: Hashable, times: Times, epoch: int,
             make: Callable[[], Any]) -> DenoisingLoop:
        """The loop of a call, one step further.

        Args:
            key: of the condition.
            epoch: which loop this is, where that is known.
            make: new memory for it.
        """
        if epoch != self._epoch:
            self._loops.clear()
            self._epoch = epoch
        self._seen += times != self._times
        self._times = times
        self._loops = {k: loop for k, loop in self._loops.items() if self._seen - loop.seen <= 1}
        loop = self._loops.get(key)
        if loop is None or not loop.goes_on(times, self._seen):
            loop = self._loops[key] = DenoisingLoop(loop.caches if loop else make(), times, times, self._seen)
        loop.last, loop.seen, loop.steps = times, self._seen, loop.steps + 1
        return loop

    def hold(self) -> None:
        """Let the next steps go on, whatever their times."""
        for loop in self._loops.values():
            loop.first = None
