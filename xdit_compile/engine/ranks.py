"""The ranks of an engine, as its handle sees them, whatever runs them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

Event = Mapping[str, Any]
SILENT = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "DIFFUSERS_VERBOSITY": "error",
          "TRANSFORMERS_VERBOSITY": "error"}
"""Environment of ranks, unless it says otherwise: of bars and advice there would be as many as ranks. Set beforehand:
to import these libraries only to silence them would take longer than to load an artifact."""


class Said(NamedTuple):
    """What a rank said. ``gone``, with a ``reason``, is said for a process that ended."""

    rank: int
    event: Event


class Ranks(Protocol):
    """Processes that have started, each with a `Worker`. Used by one thread; ``send`` by any."""

    size: int

    def send(self, message: Event) -> None:
        """To all of them. That one is gone is told by ``next``."""

    def next(self, timeout: float) -> Said | None:
        """What a rank said next; None when none did within ``timeout`` seconds."""

    def end(self, seconds: float) -> None:
        """Let them end by themselves within so many ``seconds``, or end them."""


class Start(Protocol):
    """Starts ranks, which then wait for what they are to make."""

    def __call__(self) -> Ranks: ...
