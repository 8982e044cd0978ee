"""Random models under random specs: a short form of ``campaigns/models.py``, which says more."""

from __future__ import annotations

import pytest
from campaigns.models import attempt

WHOLE = [pytest.param(seed, marks=pytest.mark.whole) for seed in range(14, 150)]


@pytest.mark.parametrize("seed", [*range(14), *WHOLE])
def test_exact_or_refused(seed: int) -> None:
    outcome = attempt(seed)
    assert outcome.what in ("exact", "refused"), outcome
