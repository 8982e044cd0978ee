"""Every exception this package raises on purpose; all of them are `XditError`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """What to add to an error about an unknown word: ``; did you mean 'ulysses'?``, or nothing if none is like it."""
    found = difflib.get_close_matches(str(word), list(known), 1, 0.6)
    return f"; did you mean {found[0]!r}?" if found else ""


class XditError(RuntimeError):
    """Base class; raised directly only where no narrower class below fits."""


class SpecError(XditError, ValueError):
    """Raised when the requested parallel layout is malformed or does not fit the model or the ranks."""


class ArgumentError(XditError, ValueError):
    """Raised when a pipeline does not take the arguments that its call is given."""


class CaptureError(XditError):
    """Raised when a model cannot be captured as one graph."""


class ArtifactError(XditError):
    """Raised when an artifact cannot be written, is none, or does not fit this machine, these ranks or weights."""


class PlanError(XditError):
    """Raised when the internal verifier finds that a rewritten program is not sound."""


class RankMismatch(XditError):
    """Raised on every rank when ranks of one group hold different inputs, weights, plans or specs.

    `keys` are the names of what differs.
    """

    def __init__(self, text: str, keys: frozenset[str] = frozenset()) -> None:
        super().__init__(text)
        self.keys = keys

    def __reduce__(self) -> tuple[type[RankMismatch], tuple[str, frozenset[str]]]:
        return type(self), (str(self), self.keys)


class RankFailure(XditError):
    """Raised on the surviving ranks when another rank failed, died or stopped responding.

    `rank` is the global rank at fault (-1 when it could not be determined), `reason` what happened to it.
    """

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(f"rank {rank} {reason}" if rank >= 0 else reason)
        self.rank = rank
        self.reason = reason

    @property
    def told(self) -> bool:
        """Whether that rank lives and tells of it itself."""
        return self.reason.startswith("failed")

    def __reduce__(self) -> tuple[type[RankFailure], tuple[int, str]]:
        # RuntimeError would rebuild from the one-part message and lose both attributes across processes.
        return type(self), (self.rank, self.reason)


class LaunchError(XditError):
    """Raised when ranks cannot be started, or when one of the ranks started by `launch` fails."""
