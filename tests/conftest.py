"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Four gloo ranks that live as long as the session; they start with the first case that uses them."""
    workers = Pool(world=4)
    yield workers
    workers.close()
