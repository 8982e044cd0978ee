"""A few of the faults that ``campaigns/faults.py`` injects by the hundred."""

from __future__ import annotations

import re
from collections.abc import Iterator

import failed_groups
import pytest
from campaigns.faults import drawn, happened
from campaigns.faulty import Case
from pool import Pool


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """Workers of its own: what fails here on purpose must not reach other tests."""
    workers = Pool(world=2)
    yield workers
    workers.close()


@pytest.mark.parametrize("case", [
    Case("ulysses=2", "cancelled", "scheduler", (0, 1)),
    Case("pipefusion=2,patches=2", "cancelled", "callback", (0, 1)),
    Case("cfg=2", "memory", "scheduler", (1,)),
    Case("ulysses=2,vae=2", "interrupt", "decode", (0,)),
    Case("ring=2", "memory", "parallelize", (1,)),
    Case("ulysses=2", "mismatch", "weights", (1,)),
    Case("pipefusion=2,patches=2", "mismatch", "buffer", (0,)),
    Case("ring=2", "kill", "steady call", (1,)),
], ids=str)
def test_nobody_hangs_and_the_culprit_is_named(pool: Pool, case: Case) -> None:
    assert happened(pool, case) == []


@pytest.mark.parametrize("way", failed_groups.SPECS)
def test_groups_that_failed_outside_of_a_call_are_not_given_to_the_next_model(pool: Pool, way: str) -> None:
    (told, error), (_, other) = pool.run(failed_groups.failing, way, ranks=range(2), timeout=200)
    assert max(error, other) <= 1e-5
    assert re.match("RankFailure: rank 1 .*(left|closed)|RankMismatch: .*class_labels", told, re.DOTALL), told


@pytest.mark.whole
@pytest.mark.parametrize("case", drawn(30, 7), ids=str)
def test_faults_that_are_drawn(case: Case) -> None:
    workers = Pool(world=3)
    try:
        assert happened(workers, case) == []
    finally:
        workers.close()
