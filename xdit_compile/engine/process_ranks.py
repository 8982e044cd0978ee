"""Ranks as processes of this machine. They import this package alone: nothing of the caller's script is run again."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress

from xdit_compile.engine.channel import DESCRIPTOR, Channel, ChannelClosed, Message
from xdit_compile.engine.ranks import SILENT, Event, Said
from xdit_compile.errors import XditError
from xdit_compile.runtime.control.store import listening_store
from xdit_compile.runtime.launch import rank_environment

# Seconds for the system to end a process whose channel is closed.
_ENDING = 5.0


class ProcessRanks:
    """The processes of one engine; they end with the thread that started them, and with this process."""

    def __init__(self, size: int, device: str, threads: int) -> None:
        self.size = size
        # Hosted here, on whatever port is free: no race for a port, and it outlives every rank.
        self._store = listening_store()
        self._channels: list[Channel] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._selector = selectors.DefaultSelector()
        self._said: deque[Said] = deque()
        try:
            for rank in range(size):
                self._start(rank, rank_environment(rank, size, self._store.port))
            for channel in self._channels:
                channel.send({"device": device, "threads": threads, "number": -1})
        except BaseException:
            self.end(0)
            raise

    def _start(self, rank: int, environment: dict[str, str]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            # What can be imported here can be there.
            path = os.pathsep.join(os.path.abspath(p) for p in sys.path)
            self._processes.append(subprocess.Popen(
                [sys.executable, "-m", "xdit_compile.engine.worker_process"], pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**SILENT, **os.environ, **environment, "PYTHONPATH": path, DESCRIPTOR: str(theirs.fileno())}))
        self._channels.append(Channel(ours))
        self._selector.register(ours, selectors.EVENT_READ, rank)

    def send(self, message: Event) -> None:
        with Message(message) as ready:
            for channel in self._channels:
                with suppress(ChannelClosed):
                    channel.post(ready)

    def next(self, timeout: float) -> Said | None:
        if not self._said:
            for key, _ in self._selector.select(max(timeout, 0)):
                self._said.append(self._heard(key.data))
        return self._said.popleft() if self._said else None

    def _heard(self, rank: int) -> Said:
        try:
            return Said(rank, self._channels[rank].receive())
        except XditError as error:
            self._selector.unregister(self._channels[rank])
            reason = self._how_it_ended(rank) if isinstance(error, ChannelClosed) else str(error)
            return Said(rank, {"event": "gone", "reason": reason})

    def _how_it_ended(self, rank: int) -> str:
        try:
            code = self._processes[rank].wait(_ENDING)
        except subprocess.TimeoutExpired:
            return "closed its channel"
        return f"was killed by signal {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def end(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        if seconds:
            self.send({"do": "end"})
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        for channel in self._channels:
            channel.close()
        self._selector.close()
