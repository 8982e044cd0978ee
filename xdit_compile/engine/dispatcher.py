"""The thread of an engine: starts its ranks, gives them one call after the other, and judges how each ended."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future
from typing import Any

from xdit_compile.engine.call import Call
from xdit_compile.engine.failures import CallCancelled, alike, blamed
from xdit_compile.engine.ranks import Ranks, Start
from xdit_compile.engine.recipe import Recipe
from xdit_compile.engine.values import generators
from xdit_compile.errors import RankFailure, XditError
from xdit_compile.progress import progress
from xdit_compile.runtime.launch import GRACE

log = logging.getLogger(__name__)

LOAD, CHOOSE, UNLOAD = ADAPTERS = ("load_lora_weights", "set_adapters", "unload_lora_weights")
"""Methods of diffusers' pipelines."""
# Seconds between two looks at limits while nothing is said.
_LOOK = 1.0


class Dispatcher:
    """Ranks live as long as its thread: the system ends them with it.

    Attributes:
        started: what the ranks told of what they made, or why they could not.
    """

    def __init__(self, recipe: Recipe, starter: Start) -> None:
        self.started: Future[Mapping[str, Any]] = Future()
        self._recipe, self._starter = recipe, starter
        self._ranks: Ranks | None = None
        self._torn = False
        """Whether ranks live, but cannot go on together as they are."""
        self._number = 0
        self._waiting: deque[Call] = deque()
        self._running: Call | None = None
        self._repeated: list[Call] = []
        """Methods to call again when ranks start anew."""
        self._changed = threading.Condition()
        self._closing: float | None = None
        self._thread = threading.Thread(target=self._run, name="xdit-engine", daemon=True)
        self._thread.start()

    def submit(self, call: Call) -> Call:
        """Have a call made after those that wait.

        Raises:
            XditError: the engine is closed.
        """
        with self._changed:
            if self._closing is not None:
                raise XditError("this engine is closed; start another one")
            self._waiting.append(call)
            self._changed.notify()
        return call

    def cancel_all(self) -> None:
        with self._changed:
            waiting, running = [*self._waiting], self._running
        for call in (*waiting, *([running] if running is not None else [])):
            call.cancel()

    def close(self, seconds: float) -> None:
        """End the ranks and the thread. Closing twice does nothing."""
        with self._changed:
            if self._closing is None:
                self._closing = time.monotonic() + seconds
            self._changed.notify()
        self.cancel_all()
        if self._thread is not threading.current_thread():
            self._thread.join(seconds + 4 * GRACE)

    def _run(self) -> None:
        try:
            self._start()
        except BaseException as error:
            self.started.set_exception(error)
        while (call := self._next()) is not None:
            try:
                result = self._made(call)
            except CancelledError:
                call.set_exception(CancelledError())
            except BaseException as error:
                call.set_exception(error)
            else:
                call.set_result(result)
            finally:
                self._running = call.tell_ranks = None
            del call
        self._end(max(0.0, (self._closing or 0.0) - time.monotonic()))

    def _next(self) -> Call | None:
        with self._changed:
            while True:
                while not self._waiting and self._closing is None:
                    self._changed.wait()
                if self._closing is not None:
                    for call in self._waiting:
                        call.cancel()
                    return None
                call = self._waiting.popleft()
                if call.set_running_or_notify_cancel():
                    self._running = call
                    return call

    def _made(self, call: Call) -> Any:
        if self._torn:
            self._mend()
        if self._ranks is None or not self._all_there(self._ranks):
            self._end(0)
            self._start()
        if call.stopped.is_set():
            raise CancelledError
        event = self._together(call.message(), f"a call of {self._recipe.source}", call)
        call.timing = event.get("timing", {})
        if call.do == "invoke" and not call.answers:
            self._remember(call)
        for ours, state in zip(generators((call.args, call.kwargs)), event.get("generators", ()), strict=False):
            ours.set_state(state)
        return event["value"]

    def _remember(self, call: Call) -> None:
        """Call a method again when ranks start anew, and none before whose effect it undoes."""
        undone = {UNLOAD: ADAPTERS, CHOOSE: (CHOOSE,)}.get(call.method, ())
        while self._repeated and self._repeated[-1].method in undone:
            self._repeated.pop()
        self._repeated.append(call)

    @staticmethod
    def _all_there(ranks: Ranks) -> bool:
        """Whether no rank has ended while nothing was asked of it."""
        while (said := ranks.next(0)) is not None:
            if said.event["event"] == "gone":
                log.warning("rank %d %s between two calls; the engine starts anew", said.rank, said.event["reason"])
                return False
        return True

    def _start(self) -> None:
        """Start the ranks and have them make what they are to serve, in the state that it was in."""
        started = time.monotonic()
        try:
            with progress(f"starting the ranks of {self._recipe.source}"):
                self._ranks = self._starter()
                made = self._together({"do": "make", "recipe": self._recipe.to_json()}, "the start", None)
            for call in self._repeated:
                self._together(call.message(), f"{call.method} after the engine was started anew", None)
        except BaseException:
            self._end(0)
            raise
        log.info("engine of %s ready on %d ranks in %.1f s", self._recipe, self._ranks.size, time.monotonic() - started)
        if not self.started.done():
            self.started.set_result(made["value"])

    def _mend(self) -> None:
        """Have ranks that live begin anew together with what they have loaded; where they cannot, end them."""
        self._torn = False
        try:
            self._together({"do": "mend"}, "mending", None)
        except Exception as error:
            log.info("ranks are started anew: %s", error)
            self._end(0)

    def _together(self, message: dict[str, Any], during: str, call: Call | None) -> Mapping[str, Any]:
        """Have all ranks do something; the event of rank 0. Where they cannot go on afterwards, they are ended. What
        cannot be sent is an error before any rank has begun."""
        ranks = self._ranks
        assert ranks is not None
        self._number = number = self._number + 1
        ranks.send({**message, "number": number})
        if call is not None:
            call.tell_ranks = lambda: ranks.send({"do": "cancel", "number": number})
            if call.stopped.is_set():
                call.tell_ranks()
        ended, error = self._collected(ranks, number, during, call)
        if all(e["event"] == "result" for e in ended.values()) and len(ended) == ranks.size:
            if error is not None:
                raise error
            return ended[0]
        fine = len(ended) == ranks.size and alike(ended)
        if not fine and len(ended) == ranks.size and not any(e["event"] == "gone" for e in ended.values()):
            self._torn = True
        elif not fine:
            self._end(0)
        if error is None:
            error = blamed(ended, during)
        if isinstance(error, CallCancelled):
            raise CancelledError from error
        raise error

    def _collected(self, ranks: Ranks, number: int, during: str, call: Call | None,
                   ) -> tuple[dict[int, Mapping[str, Any]], Exception | None]:
        """How each rank ended, as far as they did in time; and why they were told to stop, if they were."""
        ended: dict[int, Mapping[str, Any]] = {}
        stopped: Exception | None = None
        started = heard = time.monotonic()
        last = float("inf")
        while len(ended) < ranks.size:
            if self._closing is not None:
                last, stopped = min(last, self._closing), stopped or CancelledError()
            said = ranks.next(min(_LOOK, max(0.0, last - time.monotonic())))
            now = time.monotonic()
            if said is None:
                missing = sorted(set(range(ranks.size)) - ended.keys())
                if now >= last:
                    return ended, stopped
                if now - heard > self._recipe.timeout:
                    self._end(0)
                    reason = f"gave no news for {self._recipe.timeout:g} s during {during}"
                    return ended, RankFailure(missing[0], reason)
            elif said.event["event"] == "gone":
                ended[said.rank] = said.event
                last = min(last, now + GRACE)
            elif said.event["number"] not in (number, -1):
                continue  # of a call that was given up
            elif said.event["event"] == "step":
                heard = now
                stopped = stopped or self._told(call, said.event["done"], said.event["total"])
            elif said.event["event"] == "preview":
                heard = now
                stopped = stopped or self._shown(call, said.event["done"], said.event["latents"])
            else:
                heard, ended[said.rank] = now, said.event
                if said.event["event"] == "error":
                    last = min(last, now + GRACE)
            if call is not None and stopped is None and call.time_limit is not None and now - started > call.time_limit:
                stopped = TimeoutError(f"{during} took longer than {call.time_limit:g} s; it was cancelled after "
                                       f"{call.steps} steps")
                call.cancel()
                last = min(last, now + self._patience(call, now - started))
        return ended, stopped

    @staticmethod
    def _patience(call: Call, seconds: float) -> float:
        """How long a call that is cancelled may take to its next step: three of those that it has made."""
        return GRACE + 3 * seconds / max(1, call.steps)

    @staticmethod
    def _told(call: Call | None, done: int, total: int) -> Exception | None:
        """Tell the caller of a step. If that raises, the call is cancelled and ends with it."""
        if call is None:
            return None
        call.steps = done
        return _caught(call, call.on_step, done, total)

    @staticmethod
    def _shown(call: Call | None, done: int, latents: Any) -> Exception | None:
        """The same of a preview."""
        return None if call is None else _caught(call, call.on_preview, done, latents)

    def _end(self, seconds: float) -> None:
        if self._ranks is not None:
            self._ranks.end(seconds)
            self._ranks = None
        self._torn = False


def _caught(call: Call, told: Callable[[Any, Any], None] | None, *what: Any) -> Exception | None:
    """Call a function of the user's, unless the call is cancelled; what it raises cancels the call."""
    if told is None or call.stopped.is_set():
        return None
    try:
        told(*what)
    except Exception as error:
        call.cancel()
        return error
    return None
