"""The queue before an engine: bounded, in order, and told of what becomes of each call."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from typing import Any

import torch

from xdit_compile.engine.handle import Engine
from xdit_compile.errors import RankFailure
from xdit_compile.serve.arguments import Checked
from xdit_compile.serve.job import Encode, Job, State, Unit
from xdit_compile.serve.metrics import Metrics
from xdit_compile.serve.refusals import Refusal, refusal_of
from xdit_compile.serve.settings import Settings
from xdit_compile.serve.sharing import Sharing

log = logging.getLogger(__name__)

class Queue:
    """Calls of all jobs, one after the other, or several as one where that changes no answer.

    Attributes:
        draining: no more jobs are taken.
    """

    def __init__(self, engine: Engine, settings: Settings, metrics: Metrics) -> None:
        self._engine, self._settings, self._metrics = engine, settings, metrics
        self._waiting: deque[Unit] = deque()
        self._running: list[Unit] = []
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._sharing = Sharing(engine.signature, settings.batch)
        self._arrived = asyncio.Event()
        self._encoding: asyncio.Task[None] | None = None
        self.draining = False
        self._task = asyncio.create_task(self._run())

    def submit(self, checked: Checked, encode: Encode) -> Job:
        """A job of its own.

        Raises:
            Refusal: there are too many already (429), or the server is about to stop (503).
        """
        if self.draining:
            raise Refusal(503, "the server is about to stop", "stopping")
        if len(self._waiting) + checked.count > self._settings.queue:
            raise Refusal(429, f"{len(self._waiting)} calls are waiting already, and at most {self._settings.queue} "
                               "may; try again later", "queue_full", after=5)
        job = Job(checked, encode, time.monotonic() + self._settings.limits.seconds)
        self._jobs[job.identifier] = job
        self._waiting.extend(Unit(job, checked.seed + i) for i in range(checked.count))
        self._metrics.waiting.set(len(self._waiting))
        self._forget()
        self._arrived.set()
        return job

    def job(self, identifier: str) -> Job:
        """Raises Refusal where there is none of this name (any more)."""
        if (found := self._jobs.get(identifier)) is None:
            raise Refusal(404, f"there is no job {identifier[:40]!r}, or its result was given up already",
                          "no_such_job")
        return found

    def place(self, job: Job) -> int:
        """How many calls of others come before it, what runs included."""
        before = int(any(unit.job is not job for unit in self._running))
        for unit in self._waiting:
            if unit.job is job:
                break
            before += 1
        return before if job.state == "queued" else 0

    async def cancel(self, job: Job, refusal: Refusal | None = None) -> None:
        """End a job before its next step. One that is over stays as it is."""
        if job.over:
            return
        self._end(job, "failed" if refusal else "cancelled", refusal or Refusal(409, "cancelled", "cancelled"))
        for unit in self._running:
            if unit.call is not None and all(other.job.over for other in self._running):
                unit.call.cancel()
        job.tell()

    async def drain(self, seconds: float) -> None:
        """Take no more jobs, and give those that are there so many seconds; then cancel them."""
        self.draining = True
        deadline = time.monotonic() + seconds
        while (self._waiting or self._running) and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        await self._encoded()
        stopping = Refusal(503, "the server was stopped before this was done", "stopping")
        for job in list(self._jobs.values()):
            await self.cancel(job, stopping)
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    def _forget(self) -> None:
        over = [name for name, job in self._jobs.items() if job.over]
        for name in over[: max(0, len(over) - self._settings.limits.kept)]:
            del self._jobs[name]

    def _end(self, job: Job, state: State, refusal: Refusal | None = None) -> None:
        job.state, job.refusal, job.seconds = state, refusal, time.time() - job.created
        if refusal is not None:
            self._waiting = deque(unit for unit in self._waiting if unit.job is not job)
            self._metrics.waiting.set(len(self._waiting))

    async def _run(self) -> None:
        while True:
            if not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
            self._running = self._sharing.next(self._waiting)
            self._metrics.waiting.set(len(self._waiting))
            self._metrics.running.set(len(self._running))
            try:
                await self._made(self._running)
            except Exception:
                log.exception("the queue failed")  # a fault of its own must not end the server
                for unit in self._running:
                    await self.cancel(unit.job, _failed())
            finally:
                self._running = []
                self._metrics.running.set(0)
            self._forget()

    async def _made(self, units: Sequence[Unit]) -> None:
        kind = self._sharing.kind(units)
        if len(units) > 1 and self._sharing.holds(kind):
            merged = await self._called(units, self._sharing.merged(units))
            answers = None if merged is None else self._sharing.parted(merged, len(units))
            if answers is not None:
                self._metrics.shared.inc(len(units))
                for unit, answer in zip(units, answers, strict=True):
                    await self._answered(unit, answer)
                return
            if merged is None:
                return
        for unit in units:
            if not unit.job.over:
                answer = await self._called([unit], dict(unit.job.checked.arguments))
                if answer is not None:
                    await self._answered(unit, answer)
        if self._sharing.open(units):
            await self._try(units, kind)

    async def _try(self, units: Sequence[Unit], kind: Any) -> None:
        """Whether these calls give as one what each gives by itself, in all bits before they become pictures: to know
        for the next ones. Nobody waits for the answers."""
        async def answered(some: Sequence[Unit], arguments: dict[str, Any]) -> Any:
            drawn = self._drawn(some) | self._sharing.exact
            return await asyncio.shield(asyncio.wrap_future(self._engine.submit(**arguments | drawn)))

        try:
            singles = [await answered([unit], dict(unit.job.checked.arguments)) for unit in units]
            merged = await answered(units, self._sharing.merged(units))
        except Exception as error:
            log.info("calls of this kind are not shared: %s", error)
            self._sharing.learn(kind, False)
            return
        self._sharing.learn(kind, self._sharing.same(singles, self._sharing.parted(merged, len(units))))

    async def _called(self, units: Sequence[Unit], arguments: dict[str, Any]) -> Any:
        """The engine's answer to one call for all of ``units``; None where it has ended them otherwise."""
        loop = asyncio.get_running_loop()
        for unit in units:
            self._metrics.wait_seconds.observe(time.monotonic() - unit.arrived)
            unit.job.state, unit.job.step, unit.job.steps = "running", 0, 0
            unit.job.tell()

        def on_step(done: int, total: int) -> None:
            self._metrics.steps.inc()
            for unit in (unit for unit in units if not unit.job.over):
                unit.job.step, unit.job.steps = done, total
                if unit.job.watchers:  # else nobody needs to be woken
                    loop.call_soon_threadsafe(unit.job.tell)

        started, call = time.monotonic(), None
        try:
            left = max(0.001, min(unit.job.deadline for unit in units) - started)
            call = self._engine.submit(**arguments, **self._drawn(units), on_step=on_step, time_limit=left)
            for unit in units:
                unit.call = call
            if all(unit.job.over for unit in units):
                call.cancel()
            answer = await asyncio.shield(asyncio.wrap_future(call))
            for unit in units:
                unit.job.timing = {k: v + unit.job.timing.get(k, 0.0) for k, v in call.timing.items()}
            return answer
        except asyncio.CancelledError:
            if call is None or not call.done():
                raise  # it is this task that ends
            error: Exception = CancelledError()
        except Exception as raised:
            error = raised
        finally:
            self._metrics.call_seconds.observe(time.monotonic() - started)
        refusal = refusal_of(error, call.steps if call is not None else 0)
        if isinstance(error, RankFailure):
            self._metrics.rank_failures.inc()
        if refusal.status >= 500:
            log.warning("a call failed: %s", error)
        for unit in units:
            await self.cancel(unit.job, refusal)
        return None

    def _drawn(self, units: Sequence[Unit]) -> dict[str, Any]:
        """What a call draws noise with, and what it answers with."""
        form = {"output_type": "pil"} if "output_type" in self._engine.signature.kinds else {}
        if len(units) == 1:
            return {"seed": units[0].seed, **form}
        return {"generator": [torch.Generator("cpu").manual_seed(unit.seed) for unit in units], **form}

    async def _answered(self, unit: Unit, answer: Any) -> None:
        """Make files of an answer, while the next call runs; of one answer at a time."""
        job = unit.job
        job.done, job.step = job.done + 1, 0
        await self._encoded()
        if not job.over:
            self._encoding = asyncio.create_task(self._encode(unit, answer))

    async def _encoded(self) -> None:
        if self._encoding is not None:
            await asyncio.wait([self._encoding])

    async def _encode(self, unit: Unit, answer: Any) -> None:
        job = unit.job
        try:
            files = await asyncio.to_thread(job.encode, answer, unit.seed)
        except Exception:
            log.exception("no files can be made of an answer")
            await self.cancel(job, _failed())
        if job.over:
            return
        self._metrics.results.inc(len(files))
        job.files += files
        job.encoded += 1
        if job.encoded == job.checked.count:
            self._end(job, "done")
            self._forget()
        job.tell()


def _failed() -> Refusal:
    return Refusal(500, "the server failed; see its log", "failed")
