"""Several machines for real: network namespaces joined by links of a chosen speed, under torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import links  # noqa: E402
import slow_links  # noqa: E402
from shaped_network import Network, Unavailable, bits_per_second  # noqa: E402

PATCH = 2
"""Side of a patch of the model in `benchmarks/links.py`, in latents."""


@pytest.fixture(scope="module")
def machines() -> int:
    try:
        with Network(2):
            return 2
    except Unavailable as reason:
        pytest.skip(f"no network namespaces can be made here: {reason}")


def test_two_machines_give_the_answer_of_one_device_and_wait_for_their_link(machines: int) -> None:
    """The script itself compares each spec with the plain model on one device, on both machines."""
    rate, scale = "5mbit", links.QUICK
    ulysses, cfg = links.run(machines, [rate], ["ulysses=2", "cfg=2"], scale, patience=300)
    # Half of what each holds of queries, keys, values and results goes to the other: no loop can be faster than that.
    calls, tokens = links.CALLS * scale.steps, (scale.side // PATCH) ** 2
    sent = calls * scale.layers * tokens / 2 * scale.width * 4 / 2 * 4
    assert min(ulysses.measured) > 0.7 * sent * 8 / bits_per_second(rate)
    # The fastest loop, because a busy machine stops one for seconds.
    assert min(cfg.measured) < min(ulysses.measured) and cfg.predicted < ulysses.predicted


@pytest.mark.whole
def test_doing_less_is_faster_on_a_slow_link(machines: int) -> None:
    """Fewer bytes take less time where little else does. What travels meanwhile is as much as before; what that gains
    depends on the link (docs/performance.md)."""
    scale = links.Scale(width=768, layers=2, side=32, steps=4, loops=1)
    exact, displaced, wire = slow_links.run(["50mbit"], slow_links.SPECS[:3], scale, patience=300)
    assert displaced.sent == exact.sent
    assert wire.sent < 0.3 * exact.sent and wire.seconds < 0.7 * exact.seconds  # of fp32


def test_nothing_is_left_of_a_network_that_ended_in_an_error(machines: int) -> None:
    with pytest.raises(RuntimeError, match="inside"), Network(machines) as network:
        raise RuntimeError("inside")
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert network.name not in listed


RUN = """
import os, sys, threading, time
from shaped_network import Network
with Network(2) as network:
    def say():
        while not os.path.exists(sys.argv[1]):
            time.sleep(0.1)
        print(network.name, flush=True)
    threading.Thread(target=say, daemon=True).start()
    network.torchrun([sys.executable, sys.argv[2], sys.argv[1]], patience=100)
"""
SLEEP = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(1000)"


def test_nothing_is_left_of_a_network_whose_process_is_told_to_end(machines: int, tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(RUN)
    (tmp_path / "sleep.py").write_text(SLEEP)
    command = [sys.executable, *(str(tmp_path / name) for name in ("run.py", "there", "sleep.py"))]
    around = {**os.environ, "PYTHONPATH": str(BENCHMARKS)}
    with subprocess.Popen(command, env=around, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        name = running.stdout.readline().strip()
        running.terminate()
        assert name.startswith("xdit") and running.wait(30) == 128 + signal.SIGTERM
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert name not in listed
    assert subprocess.run(["pgrep", "-f", str(tmp_path / "sleep.py")], check=False, capture_output=True).returncode == 1


@pytest.mark.parametrize("rate", ["fast", "10", "10 mbit", "-1mbit"])
def test_a_rate_that_is_none_is_refused(rate: str) -> None:
    with pytest.raises(ValueError, match="a rate is a number and kbit, mbit or gbit"):
        bits_per_second(rate)
