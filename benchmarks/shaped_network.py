"""Several machines on this one: network namespaces that are joined by links of a chosen speed. Linux, as root.

    with Network(machines=2) as network:
        network.shape("100mbit")
        network.torchrun([sys.executable, "script.py"], patience=300)

Each machine is a namespace with a loopback and one link to a switch, a bridge in a namespace of its own; nothing of
the host's own network is touched. A link lets through so much in each direction (`tc ... tbf`, at both of its ends).
What was made is removed when the block ends, with all that still runs there; so it is when the process is told to end.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from tempfile import TemporaryFile
from typing import NoReturn

UNLIMITED = "unlimited"
PORT = 29500
_BURST = 0.001
"""Seconds' worth of bytes that a link may send at once, after it was idle; with less it does not reach its rate."""

_QUEUED = 0.2, 4 << 20
"""Seconds' worth of bytes that wait for a link, and how many at least: so many that none are dropped, which would make
TCP slower than the link, and not always equally."""

_numbers = itertools.count()


class Unavailable(Exception):
    """This machine lets nobody make networks here; says what stands in the way."""


class Failed(Exception):
    """A machine's process ended with an error; carries what it printed."""


class Network:
    """``machines`` namespaces with addresses 10.77.0.1, 10.77.0.2, ... behind one switch.

    Raises ``Unavailable`` where it cannot be made.
    """

    def __init__(self, machines: int) -> None:
        number = next(_numbers)
        self.name = f"xdit{os.getpid() % 100_000}n{number}"
        self.machines = [f"{self.name}m{i}" for i in range(machines)]
        self._undo = ExitStack()

    def __enter__(self) -> Network:
        for tool in ("ip", "tc"):
            if shutil.which(tool) is None:
                raise Unavailable(f"there is no `{tool}` here (Debian's package iproute2)")
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _end)
            self._undo.callback(signal.signal, signal.SIGTERM, signal.SIG_DFL)
        try:
            self._make()
        except BaseException:
            self._undo.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _make(self) -> None:
        switch = self.name
        for namespace in (switch, *self.machines):
            _call("ip", "netns", "add", namespace)
            self._undo.callback(_remove, namespace)
        _call("ip", "-n", switch, "link", "add", "switch", "type", "bridge")
        _call("ip", "-n", switch, "link", "set", "switch", "up")
        for number, machine in enumerate(self.machines):
            _call("ip", "-n", switch, "link", "add", f"port{number}", "type", "veth", "peer", "name", "uplink",
                  "netns", machine)
            _call("ip", "-n", switch, "link", "set", f"port{number}", "master", "switch", "up")
            _call("ip", "-n", machine, "addr", "add", f"{self.address(number)}/24", "dev", "uplink")
            _call("ip", "-n", machine, "link", "set", "lo", "up")
            _call("ip", "-n", machine, "link", "set", "dev", "uplink", "up")

    @staticmethod
    def address(number: int) -> str:
        return f"10.77.0.{number + 1}"

    def shape(self, rate: str) -> None:
        """Every link lets through ``rate`` in each direction, in tc's words ("20mbit"), or ``UNLIMITED``."""
        ends = [(self.name, f"port{i}") for i in range(len(self.machines))] + [(m, "uplink") for m in self.machines]
        for namespace, device in ends:
            with suppress(Unavailable):
                _call("tc", "-n", namespace, "qdisc", "del", "dev", device, "root")
            if rate != UNLIMITED:
                each = bits_per_second(rate) / 8
                burst, queue = max(int(each * _BURST), 16_384), max(int(each * _QUEUED[0]), _QUEUED[1])
                _call("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf", "rate", rate,
                      "burst", f"{burst}b", "limit", f"{queue}b")

    def torchrun(self, command: Sequence[str], patience: float) -> None:
        """One process of ``command`` on each machine, started by torchrun. Raises ``Failed`` with what they said."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "uplink"}
        with ExitStack() as stack:
            said = [stack.enter_context(TemporaryFile()) for _ in self.machines]
            processes = [stack.enter_context(subprocess.Popen(
                ["ip", "netns", "exec", machine, command[0], "-m", "torch.distributed.run",
                 f"--nnodes={len(self.machines)}", "--nproc-per-node=1", f"--node-rank={number}",
                 f"--master-addr={self.address(0)}", f"--master-port={PORT}", *command[1:]],
                stdout=said[number], stderr=subprocess.STDOUT, env=environment))
                for number, machine in enumerate(self.machines)]
            try:
                for process in processes:
                    process.wait(patience)
            finally:
                for process in processes:
                    process.kill()
            for number, process in enumerate(processes):
                if process.returncode:
                    said[number].seek(0)
                    raise Failed(f"machine {number} of {len(processes)}: {said[number].read().decode()[-4000:]}")


def _end(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)


def _remove(namespace: str) -> None:
    inside = subprocess.run(["ip", "netns", "pids", namespace], check=False, capture_output=True, text=True).stdout
    for process in inside.split():
        with suppress(ProcessLookupError):
            os.kill(int(process), signal.SIGKILL)
    subprocess.run(["ip", "netns", "del", namespace], check=False)


def bits_per_second(rate: str) -> float:
    """A rate in tc's words: a number and kbit, mbit or gbit; infinite for ``UNLIMITED``."""
    if rate == UNLIMITED:
        return float("inf")
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(k|m|g)bit", rate)
    if found is None:
        raise ValueError(f"a rate is a number and kbit, mbit or gbit, or {UNLIMITED!r}; got {rate!r}")
    return float(found[1]) * {"k": 1e3, "m": 1e6, "g": 1e9}[found[2]]


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"`{' '.join(command)}`: {done.stderr.strip()}")
