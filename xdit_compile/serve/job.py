"""What a request asked for, and what has become of it."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from xdit_compile.engine.call import Call
from xdit_compile.serve.arguments import Checked
from xdit_compile.serve.refusals import Refusal
from xdit_compile.serve.results import File

State = Literal["queued", "running", "done", "failed", "cancelled"]
Encode = Callable[[Any, int], list[File]]
"""Makes files of an answer and the seed it was made with."""


@dataclass(eq=False)
class Job:
    """What one request asked for: a call for each seed.

    Attributes:
        done: calls that have ended; ``step`` of ``steps`` that of the one under way.
        encoded: calls whose answers have become files.
        refusal: what went wrong.
        timing: seconds of its calls on rank 0, as those of a `Call`.
        watchers: set at each change.
        ended: set when it is over.
    """

    checked: Checked
    encode: Encode
    deadline: float
    identifier: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    created: float = field(default_factory=time.time)
    state: State = "queued"
    done: int = 0
    encoded: int = 0
    step: int = 0
    steps: int = 0
    files: list[File] = field(default_factory=list)
    refusal: Refusal | None = None
    seconds: float = 0.0
    timing: dict[str, float] = field(default_factory=dict)
    watchers: set[asyncio.Event] = field(default_factory=set)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def over(self) -> bool:
        return self.state in ("done", "failed", "cancelled")

    @property
    def progress(self) -> float:
        """How much of it is done, from 0 to 1."""
        part = self.step / self.steps if self.steps else 0.0
        return 1.0 if self.state == "done" else min(1.0, (self.done + part) / self.checked.count)

    async def watched(self) -> AsyncIterator[Job]:
        """Itself, now and after each change, until it is over."""
        seen: Any = None
        changed = asyncio.Event()
        self.watchers.add(changed)
        try:
            while True:
                changed.clear()
                now = (self.state, self.done, self.step)
                if now != seen:
                    seen = now
                    yield self
                if self.over:
                    return
                await changed.wait()
        finally:
            self.watchers.discard(changed)

    def tell(self) -> None:
        """In the server's thread: something has changed."""
        for changed in self.watchers:
            changed.set()
        if self.over:
            self.ended.set()


@dataclass(eq=False)
class Unit:
    """One call of a job."""

    job: Job
    seed: int
    arrived: float = field(default_factory=time.monotonic)
    call: Call | None = None
