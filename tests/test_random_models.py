"""Random models under random specs: a short form of ``campaigns/models.py``, which says more."""

from __future__ import annotations

import pytest
from campaigns.models import attempt
from marks import whole

WHOLE = [whole(seed) for seed in range(8, 150)]


@pytest.mark.parametrize("seed", [*range(8), *WHOLE])
def test_exact_or_refused(seed: int) -> None:
    outcome = attempt(seed)
    assert outcome.what in ("exact", "refused"), outcome
