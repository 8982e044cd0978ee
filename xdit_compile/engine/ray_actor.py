"""One rank in an actor of Ray."""

from __future__ import annotations

import os
import queue
import socket
import threading
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch

from xdit_compile.engine.failures import told
from xdit_compile.engine.values import Packed, packed, unpacked
from xdit_compile.engine.worker import Worker
from xdit_compile.runtime.launch import init_from_env

_ray: Any = import_module("ray")
# Seconds after which an actor that has nothing to say answers nonetheless, so that its driver need not wait for it.
_SILENCE = 5.0


class RankActor:
    """Hosts a `Worker` in a thread; messages come and events go by methods of two concurrency groups."""

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[Packed] = queue.SimpleQueue()
        self._joined = threading.Event()
        self._worker: Worker | None = None

    def place(self) -> tuple[str, str, int]:
        """Its node, that node's address, and a port that is free there."""
        with socket.create_server(("", 0)) as found:
            port = found.getsockname()[1]
        return _ray.get_runtime_context().get_node_id(), _ray.util.get_node_ip_address(), port

    def join(self, environment: Mapping[str, str], device: str, threads: int) -> None:
        """Become a rank and begin to work."""
        os.environ.update(environment)
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
        if device == "cpu":
            torch.set_num_threads(threads)
        threading.Thread(target=self._work, args=(device,), daemon=True, name="xdit-rank").start()

    def _work(self, device: str) -> None:
        try:
            self._worker = Worker(init_from_env(device), self._say)
        except Exception as error:
            self._say({**told(error, True, 0), "number": -1})
            return
        finally:
            self._joined.set()
        self._worker.work()

    def _say(self, event: Mapping[str, Any]) -> None:
        self._events.put(packed(event))

    @_ray.method(concurrency_group="take")
    def take(self, message: Packed) -> None:
        """A message of the handle."""
        self._joined.wait()
        if self._worker is not None:
            self._worker.take(unpacked(message))

    @_ray.method(concurrency_group="next")
    def next(self) -> list[Packed]:
        """What was said since it was asked the last time, waited for for some seconds."""
        try:
            found = [self._events.get(timeout=_SILENCE)]
        except queue.Empty:
            return []
        while not self._events.empty():
            found.append(self._events.get())
        return found
