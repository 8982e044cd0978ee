"""A few of the faults that ``campaigns/faults.py`` injects by the hundred."""

from __future__ import annotations

from collections.abc import Iterator

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


@pytest.mark.whole
@pytest.mark.parametrize("case", drawn(30, 7), ids=str)
def test_faults_that_are_drawn(case: Case) -> None:
    workers = Pool(world=3)
    try:
        assert happened(workers, case) == []
    finally:
        workers.close()
