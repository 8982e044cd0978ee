"""One rank of an engine: does what the handle asks for, one thing after the other, and says what came of it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from xdit_compile.engine.failures import CallCancelled, told
from xdit_compile.engine.recipe import Recipe
from xdit_compile.engine.served import Served, made
from xdit_compile.engine.values import generators
from xdit_compile.errors import XditError
from xdit_compile.runtime.control.control_plane import ControlPlane

Message = Mapping[str, Any]


class Worker:
    """What a rank does. Whoever hosts it gives messages to ``take``, from another thread, and runs ``work``.

    Args:
        say: tells the handle of an event.
    """

    def __init__(self, place: torch.device, say: Callable[[Message], None]) -> None:
        self._place, self._say = place, say
        self._rank, self._first = dist.get_rank(), dist.get_rank() == 0
        self._inbox: SimpleQueue[Message | None] = SimpleQueue()
        self._served: Served | None = None
        self._control: ControlPlane | None = None
        self._recipe: Recipe
        self._telling = 0.0
        """Seconds of a call that went into telling of its steps."""
        self._cancelled, self._number, self._steps = -1, -1, 0

    def take(self, message: Message | None) -> None:
        """What the handle sent; None ends the work."""
        if message is not None and message["do"] == "cancel":
            self._cancelled = message["number"]
        else:
            self._inbox.put(message)

    def work(self) -> None:
        """Do what comes until the end."""
        while (message := self._inbox.get()) is not None:
            self._number, self._steps = message["number"], 0
            try:
                event = self._done(message)
            except Exception as error:
                event = told(error, self._broken, self._steps)
            self._tell(event)
            # Nothing of a call is held on to while the next one is waited for.
            del message, event

    def _tell(self, event: Message) -> None:
        try:
            self._say({**event, "number": self._number})
        except XditError as error:  # a result that cannot be sent
            self._say({**told(error, self._broken, self._steps), "number": self._number})

    def _done(self, message: Message) -> Message:
        if message["do"] == "make":
            self._recipe = recipe = Recipe.of_json(message["recipe"])
            self._control = ControlPlane(range(dist.get_world_size()), recipe.timeout)
            self._served = made(recipe, self._place, self._first)
            return {"event": "result", "value": self._served.signature.to_json() | {
                "is_pipeline": self._served.is_pipeline} if self._first else None}
        if self._served is None or self._control is None:
            raise XditError("nothing was made yet")
        if message["do"] == "mend":
            self._control.close()
            self._control = ControlPlane(range(dist.get_world_size()), self._recipe.timeout)
            self._served.mend(self._recipe)
            return {"event": "result", "value": None}
        self._control.settle()
        self._control.begin()
        args, kwargs = _placed(message["args"], self._place), _placed(message["kwargs"], self._place)
        _seed(message["seed"])
        if message["do"] == "invoke":
            result = self._served.invoke(message["method"], args, kwargs)
            return {"event": "result", "value": result if self._first and message["answers"] else None}
        self._telling, started = 0.0, time.perf_counter()
        result = self._served.call(args, kwargs, self._step, self._preview if message["previews"] else None)
        if self._place.type == "cuda":
            torch.cuda.synchronize(self._place)
        seconds = time.perf_counter() - started
        self._control.settle()
        if not self._first:
            return {"event": "result", "value": None}
        drawn = [g.get_state() for g in generators((args, kwargs))]
        return {"event": "result", "value": result, "generators": drawn,
                "timing": {"call": seconds, "telling": self._telling}}

    def _step(self, done: int, total: int) -> None:
        """Between two steps, on all ranks."""
        assert self._control is not None
        self._steps, started = done, time.perf_counter()
        if self._first:
            self._say({"event": "step", "number": self._number, "done": done, "total": total})
        if self._control.to_stop(self._cancelled == self._number):
            raise CallCancelled(f"the call was cancelled after step {done}")
        self._telling += time.perf_counter() - started

    def _preview(self, done: int, latents: torch.Tensor) -> None:
        if self._first:
            self._say({"event": "preview", "number": self._number, "done": done, "latents": latents})

    @property
    def _broken(self) -> bool:
        return (self._served is None or self._served.broken or self._control is None
                or self._control.verdict is not None)


def _placed(value: Any, place: torch.device) -> Any:
    """Tensors on the rank's device; generators draw where they did."""
    if place.type == "cpu":
        return value
    if isinstance(value, torch.Tensor):
        return value.to(place)
    if isinstance(value, dict):
        return {k: _placed(v, place) for k, v in value.items()}
    return type(value)(_placed(v, place) for v in value) if type(value) in (list, tuple) else value


def _seed(seed: int) -> None:
    """What is drawn without a generator is the same on all ranks."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
