"""A call to an engine: a future that can be cancelled while it runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, Literal

import torch

OnStep = Callable[[int, int], None]
"""Told how many steps are done, of how many (0 where that is not known)."""

OnPreview = Callable[[int, torch.Tensor], None]
"""Told how many steps are done, and the latents then, on the CPU."""


class Call(Future[Any]):
    """What is asked of the ranks.

    Attributes:
        do: ``call`` what they hold, or ``invoke`` its ``method``.
        seed: of what is drawn without a generator.
        answers: whether the result of a method is sent.
        stopped: it was cancelled while it ran, or before.
        steps: how many were done.
        timing: seconds of the ``call`` on rank 0, of which ``telling`` of its steps took so many; when it is done.
    """

    def __init__(self, do: Literal["call", "invoke"], method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any],
                 on_step: OnStep | None = None, time_limit: float | None = None, answers: bool = True,
                 on_preview: OnPreview | None = None) -> None:
        super().__init__()
        self.do, self.method, self.args, self.kwargs = do, method, args, dict(kwargs)
        self.on_step, self.time_limit, self.answers, self.on_preview = on_step, time_limit, answers, on_preview
        self.seed = int(torch.randint(2**62, ()))
        self.steps = 0
        self.timing: Mapping[str, float] = {}
        self.stopped = threading.Event()
        self.tell_ranks: Callable[[], None] | None = None
        """Set while it runs."""

    def cancel(self) -> bool:
        """Cancel it, while it waits or before its next step; whether it was not done yet."""
        if super().cancel():
            return True
        if self.done():
            return False
        self.stopped.set()
        if (tell := self.tell_ranks) is not None:
            tell()
        return True

    def message(self) -> dict[str, Any]:
        """What ranks are told."""
        return {"do": self.do, "method": self.method, "args": self.args, "kwargs": self.kwargs, "seed": self.seed,
                "answers": self.answers, "previews": self.on_preview is not None}
