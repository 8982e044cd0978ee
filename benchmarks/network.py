"""Machines made of network namespaces, joined by a switch over links of a chosen rate. Needs root, ip and tc."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

PORT = 29531


class NotAllowed(Exception):
    """Raised where namespaces cannot be made; says why."""


@dataclass(frozen=True)
class Network:
    """Namespaces by name, one for each machine, and the one that the switch is in."""

    machines: tuple[str, ...]
    switch: str

    def limit(self, megabits: float | None) -> None:
        """From now on each machine sends and receives at most so many 10^6 bits a second; None for no limit."""
        for i, machine in enumerate(self.machines):
            for space, device in ((machine, "eth0"), (self.switch, f"port{i}")):
                _run("ip", "netns", "exec", space, "tc", "qdisc", "del", "dev", device, "root", check=False)
                if megabits is not None:
                    burst = max(int(megabits * 1e6 / 8 / 250), 16_000)
                    _run("ip", "netns", "exec", space, "tc", "qdisc", "add", "dev", device, "root", "tbf", "rate",
                         f"{int(megabits * 1e6)}bit", "burst", str(burst), "latency", "400ms")

    def torchrun(self, script: Sequence[str], env: Mapping[str, str], timeout: float) -> str:
        """Run a script under torchrun, one process on each machine; what the first wrote to its output.

        Raises:
            RuntimeError: one of them failed; with the end of what it said.
        """
        nodes = len(self.machines)
        started = []
        for i, space in enumerate(self.machines):
            command = ["ip", "netns", "exec", space, sys.executable, "-m", "torch.distributed.run", "--nnodes",
                       str(nodes), "--node-rank", str(i), "--nproc-per-node", "1", "--master-addr", "10.213.0.1",
                       "--master-port", str(PORT), *script]
            started.append(subprocess.Popen(command, env={**os.environ, **env, "GLOO_SOCKET_IFNAME": "eth0"},
                                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        said = []
        try:
            for process in started:
                said.append(process.communicate(timeout=timeout)[0])
        finally:
            for process in started:
                process.kill()
                process.wait()
        for process, text in zip(started, said, strict=True):
            if process.returncode:
                raise RuntimeError(text[-4000:])
        return said[0]


@contextmanager
def network(machines: int) -> Iterator[Network]:
    """So many machines, 10.213.0.1 and on, which are there until the end, whatever happens.

    Raises:
        NotAllowed: this process may not make them, or ip or tc is not there.
    """
    if missing := [c for c in ("ip", "tc") if shutil.which(c) is None]:
        raise NotAllowed(f"there is no {missing[0]}")
    mark = f"xc{secrets.token_hex(3)}"
    made = Network(tuple(f"{mark}-{i}" for i in range(machines)), f"{mark}-switch")
    try:
        try:
            for space in (*made.machines, made.switch):
                _run("ip", "netns", "add", space)
            _run("ip", "-n", made.switch, "link", "add", "switch", "type", "bridge")
            _run("ip", "-n", made.switch, "link", "set", "switch", "up")
            for i, space in enumerate(made.machines):
                _run("ip", "-n", space, "link", "add", "eth0", "type", "veth", "peer", "name", f"port{i}", "netns",
                     made.switch)
                _run("ip", "-n", space, "addr", "add", f"10.213.0.{i + 1}/24", "dev", "eth0")
                for device in ("lo", "eth0"):
                    _run("ip", "-n", space, "link", "set", device, "up")
                _run("ip", "-n", made.switch, "link", "set", f"port{i}", "master", "switch", "up")
            made.limit(1000.0)
            made.limit(None)
        except subprocess.CalledProcessError as error:
            raise NotAllowed(f"{' '.join(error.cmd)}: {error.stderr.strip()}") from error
        yield made
    finally:
        for space in (*made.machines, made.switch):
            _run("ip", "netns", "del", space, check=False)


def _run(*command: str, check: bool = True) -> None:
    subprocess.run(command, check=check, capture_output=True, text=True)
