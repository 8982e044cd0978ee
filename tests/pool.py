"""Persistent gloo ranks for the tests: starting processes costs seconds, a case costs milliseconds."""

from __future__ import annotations

import atexit
import faulthandler
import multiprocessing
import os
import pickle
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, cast

import torch.distributed as dist

from xdit_compile.runtime.control.store import listening_store
from xdit_compile.runtime.launch import Failure, become_rank, failure_of, kill, pack_call, rank_environment

# Seconds that the other ranks of a case get to answer once one of them has failed.
GRACE = 15.0

PRELOADED = ["torch", "torch._dynamo", "torch.export", "xdit_compile",
             "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3"]


class RemoteError(AssertionError):
    """A case failed on a worker; carries its traceback, and the original error as ``__cause__``."""


class Pool:
    """`world` worker processes with an initialised gloo default group and one thread each."""

    def __init__(self, world: int = 4) -> None:
        self.world = world
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._store: dist.TCPStore | None = None
        atexit.register(self.close)

    def run(
        self,
        fn: Callable[..., Any],
        *args: Any,
        ranks: Iterable[int] | None = None,
        timeout: float = 120.0,
        **kwargs: Any,
    ) -> list[Any]:
        """``fn(*args, **kwargs)`` on exactly `ranks` (default: all); their results, in the order of `ranks`.

        `fn` must be importable by the workers. Raises `RemoteError` when a rank raises, dies or has not
        answered after `timeout` seconds; workers that did not come through it well are started anew.
        """
        chosen = list(range(self.world)) if ranks is None else list(ranks)
        call = pack_call(fn, args, kwargs)
        if not self._processes:
            self._start()
        answers = self._exchange(chosen, call, timeout)
        failures = {rank: answer for rank, answer in answers.items() if isinstance(answer, Failure)}
        if failures:
            if set(answers) != set(chosen) or not self._healthy():
                self.close()
            rank, failure = min(failures.items(), key=lambda item: (item[1].consequence, item[1].when))
            raise RemoteError(f"on rank {rank}:\n{failure.text}") from failure.error
        if missing := sorted(set(chosen) - set(answers)):
            self.close()
            raise RemoteError(f"ranks {missing} did not answer within {timeout} s")
        return [answers[rank] for rank in chosen]

    def answers(self, fn: Callable[..., Any], *args: Any, ranks: Iterable[int], without: Iterable[int] = (),
                timeout: float = 120.0) -> dict[int, Any]:
        """What each of `ranks` answered to ``fn(*args)``, or its `Failure`; those `without` are not waited for, as they
        are expected to be lost. Workers that did not come through it well are started anew."""
        if not self._processes:
            self._start()
        answers = self._exchange(list(ranks), pack_call(fn, args, {}), timeout, set(without))
        if without or not self._healthy():
            self.close()
        return answers

    def close(self) -> None:
        """Stop the workers; the next `run` starts new ones."""
        kill(self._processes)
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes, self._store = [], [], None

    def _start(self) -> None:
        self._store = listening_store()
        # Forked from one process that has imported what takes seconds, and done nothing else.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            env = {**os.environ, **rank_environment(rank, self.world, self._store.port)}
            self._processes.append(context.Process(target=_serve, args=(theirs, env), daemon=True))
            self._processes[-1].start()
            theirs.close()
            self._pipes.append(ours)
        # Importing torch may take longer than a case is allowed to.
        for pipe in self._pipes:
            pipe.recv_bytes()

    def _exchange(self, ranks: list[int], call: bytes, timeout: float, lost: Collection[int] = ()) -> dict[int, Any]:
        """Send `call` to `ranks` and collect what they answer in time, but for the `lost`: a result, or a `Failure`."""
        answers: dict[int, Any] = {}
        waiting = {self._pipes[rank]: rank for rank in ranks}
        for pipe in waiting:
            pipe.send_bytes(call)
        waiting = {pipe: rank for pipe, rank in waiting.items() if rank not in lost}
        deadline = time.monotonic() + timeout
        while waiting and (left := deadline - time.monotonic()) > 0:
            for ready in wait(list(waiting), left):
                pipe = cast(Connection, ready)
                rank = waiting.pop(pipe)
                try:
                    answers[rank] = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionResetError):
                    self._processes[rank].join()
                    text = f"the worker died (exit code {self._processes[rank].exitcode})"
                    answers[rank] = Failure(time.time(), False, text)
                if isinstance(answers[rank], Failure):
                    deadline = min(deadline, time.monotonic() + GRACE)
        return answers

    def _healthy(self) -> bool:
        """Whether all workers live and their default group still works after a failed case."""
        if not all(process.is_alive() for process in self._processes):
            return False
        everyone = list(range(self.world))
        answers = self._exchange(everyone, pack_call(_barrier, (), {}), timeout=10)
        return set(answers) == set(everyone) and not any(isinstance(a, Failure) for a in answers.values())


def _barrier() -> None:
    dist.monitored_barrier(timeout=timedelta(seconds=5))


def _serve(pipe: Connection, env: Mapping[str, str]) -> None:
    faulthandler.enable()  # where each thread was, if native code crashes
    become_rank(env, "cpu", threads=1)
    pipe.send_bytes(b"ready")
    while True:
        call = pipe.recv_bytes()
        try:
            fn, args, kwargs = pickle.loads(call)
            answer = pickle.dumps(fn(*args, **kwargs))
        except BaseException as error:
            answer = pickle.dumps(failure_of(error))
        pipe.send_bytes(answer)
