"""Stopping a call after the same step on all ranks, at no cost while nobody wants to.

Ranks are not at the same step at once, and one that stopped by itself would leave the others in a collective. A handle
that wants to stop asks all of them how far they are; each answers at once, in the thread that listens, and from then on
waits at its next step. Nobody can have passed the step after that of the farthest, where all are told to stop.
"""

from __future__ import annotations

import threading


class Stopping:
    """Of one rank."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._number, self._steps = -1, 0
        self._held = -1
        """The call that waits at its next step."""
        self._last: int | None = None
        """The step after which that one stops."""

    def begin(self, number: int) -> None:
        """A call begins, of which it may have been asked already how far it is."""
        with self._changed:
            self._number, self._steps = number, 0

    def hold(self, number: int) -> int:
        """How many steps a call has passed, which waits at its next one from now on."""
        with self._changed:
            if self._held != number:
                self._held, self._last = number, None
            return self._steps if number == self._number else 0

    def decide(self, number: int, last: int) -> None:
        """A call that waits goes on, until ``last`` steps are passed."""
        with self._changed:
            if self._held == number:
                self._last = last
                self._changed.notify_all()

    def passed(self) -> bool:
        """Called at each step; whether to stop after it."""
        with self._changed:
            self._steps += 1
            while self._held == self._number and self._last is None:
                self._changed.wait()
            return self._held == self._number and self._last is not None and self._steps >= self._last
