"""Errors of ranks as text and back, and which of them is to blame."""

from __future__ import annotations

import builtins
import traceback
from collections.abc import Mapping
from typing import Any

from xdit_compile import errors
from xdit_compile.errors import RankFailure, RankMismatch, XditError
from xdit_compile.runtime.control.abort import is_peer_loss


class CallCancelled(XditError):
    """Raised between two steps on all ranks alike, when a call was cancelled."""


class RemoteTraceback(Exception):
    """Where in a worker an error was raised: the cause of the error that the handle raises."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"\n{self.text}"


def told(error: BaseException, broken: bool, steps: int) -> dict[str, Any]:
    """An error as an event that can be sent.

    Args:
        broken: whether no later call of these ranks can succeed.
        steps: how many were done before.
    """
    event: dict[str, Any] = {"event": "error", "class": type(error).__name__, "text": str(error), "broken": broken,
                             "steps": steps, "trace": "".join(traceback.format_exception(error)),
                             "consequence": isinstance(error, RankFailure) or is_peer_loss(error)}
    if isinstance(error, RankFailure):
        event |= {"rank": error.rank, "reason": error.reason}
    return event


def untold(event: Mapping[str, Any]) -> Exception:
    """The error that an event tells of: of this package or of Python itself, else an XditError with its name."""
    name, text = str(event["class"]), str(event["text"])
    if "rank" in event:
        made: Exception = RankFailure(event["rank"], event["reason"])
    elif name == CallCancelled.__name__:
        made = CallCancelled(text)
    elif name == RankMismatch.__name__:
        made = RankMismatch(text)
    else:
        cls = getattr(errors, name, None) or getattr(builtins, name, None)
        if not isinstance(cls, type) or not issubclass(cls, (XditError, *_PLAIN)):
            text, cls = f"{name}: {text}", XditError
        made = cls(text)
    made.__cause__ = RemoteTraceback(str(event["trace"]))
    return made


# Those of Python that are made of a text alone.
_PLAIN = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError, RuntimeError, OSError,
          MemoryError, ImportError)


def blamed(ended: Mapping[int, Mapping[str, Any]], during: str) -> Exception:
    """The error to raise, of the events by which ranks ended a call: a process that is gone, else what is no
    consequence of another rank's failure."""
    for rank, event in ended.items():
        if event["event"] == "gone":
            return RankFailure(rank, f"{event['reason']} during {during}; the next call starts the engine anew")
    found = sorted((e for e in ended.values() if e["event"] == "error"), key=lambda e: bool(e["consequence"]))
    return untold(found[0])


def alike(ended: Mapping[int, Mapping[str, Any]]) -> bool:
    """Whether all ranks ended with the same kind of error, after which they can go on."""
    return len({e.get("class") for e in ended.values()}) == 1 and not any(
        e["event"] != "error" or e["broken"] for e in ended.values())
