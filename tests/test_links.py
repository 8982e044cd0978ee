"""Several machines for real: network namespaces joined by links of a chosen speed, under torchrun."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

from shaped_network import Network, Unavailable, bits_per_second  # noqa: E402

TOKENS, TEXT, HIDDEN, BLOCKS, BATCH = 64, 16, 128, 2, 2


@pytest.fixture(scope="module")
def machines() -> int:
    try:
        with Network(2):
            return 2
    except Unavailable as reason:
        pytest.skip(f"no network namespaces can be made here: {reason}")


def test_two_machines_give_the_answer_of_one_device_and_wait_for_their_link(machines: int, tmp_path: Path) -> None:
    """The script itself compares each spec with the plain model on one device, on both machines."""
    rate, taken = "1mbit", tmp_path / "taken.json"
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "links.py"), "--rates", rate, "unlimited", "--rounds", "1", "--steps", "2",
         "--specs", "ulysses=2", "cfg=2", "--tokens", str(TOKENS), "--text", str(TEXT), "--hidden", str(HIDDEN),
         "--double", "1", "--single", "1", "--patience", "300", "--json", str(taken)],
        check=False, capture_output=True, text=True, timeout=400)
    assert not done.returncode, done.stderr
    steps = {(made["rate"], made["spec"]): made["step"] for made in json.loads(taken.read_text())}
    # Half of what each holds of queries, keys, values and results goes to the other: no step can be faster than that.
    sent = BLOCKS * BATCH * (TOKENS + TEXT) / 2 * HIDDEN * 4 / 2 * 4
    assert steps[rate, "ulysses=2"] > 0.7 * sent * 8 / bits_per_second(rate)
    assert steps[rate, "cfg=2"] < steps[rate, "ulysses=2"]


def test_nothing_is_left_of_a_network_that_ended_in_an_error(machines: int) -> None:
    with pytest.raises(RuntimeError, match="inside"), Network(machines) as network:
        raise RuntimeError("inside")
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert network.name not in listed


@pytest.mark.parametrize("rate", ["fast", "10", "10 mbit", "-1mbit"])
def test_a_rate_that_is_none_is_refused(rate: str) -> None:
    with pytest.raises(ValueError, match="a rate is a number and kbit, mbit or gbit"):
        bits_per_second(rate)
