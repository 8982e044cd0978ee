"""Exchanges over gloo: what arrives, and that both directions are used at once."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import full_duplex_runs
import pytest
from pool import Pool

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from shaped_network import Network, Unavailable, bits_per_second


@pytest.mark.parametrize("seed", range(12))
def test_everybody_gets_what_is_for_him(pool: Pool, seed: int) -> None:
    assert pool.run(full_duplex_runs.exchanged, seed, 4) == [True] * 4


def test_many_collectives_come_to_an_end(pool: Pool) -> None:
    """Threads of gloo let go of tensors, which takes Python's lock, while the next collective starts."""
    assert pool.run(full_duplex_runs.busy, 400, timeout=60) == [True] * 4


@pytest.mark.parametrize("kind", ["all_to_all", "all_gather"])
def test_who_comes_late_does_not_wait_for_one_direction_after_the_other(kind: str, tmp_path: Path) -> None:
    """Which takes twice as long: gloo's own collectives do in about half of all cases."""
    job, nbytes, rate, times = tmp_path / "job.json", 250_000, "20mbit", 6
    job.write_text(json.dumps([kind, nbytes, times]))
    try:
        with Network(2) as network:
            network.shape(rate)
            network.torchrun([sys.executable, full_duplex_runs.__file__, str(job)], patience=120)
    except Unavailable as reason:
        pytest.skip(f"no network namespaces can be made here: {reason}")
    found = sorted(json.loads(job.with_suffix(".found").read_text()))
    once = nbytes * 8 / bits_per_second(rate)
    assert 0.8 * once < found[0] and found[times // 2] < 1.3 * once, found
