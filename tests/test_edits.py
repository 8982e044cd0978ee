"""Whatever is edited between calls is seen: the quick form of the campaign of edits."""

from __future__ import annotations

import pytest
from campaigns.edits import KINDS, run_case

TOGETHER = [sorted(KINDS)[i::12] for i in range(12)]


@pytest.mark.parametrize("names", TOGETHER, ids=lambda names: names[0])
def test_each_kind_of_state(names: list[str]) -> None:
    assert run_case(1, names) == []


@pytest.mark.parametrize("seed", range(12))
def test_random_models_and_edits(seed: int) -> None:
    assert run_case(seed) == []


@pytest.mark.whole
@pytest.mark.parametrize("name", KINDS)
def test_each_kind_alone(name: str) -> None:
    assert [line for seed in range(4) for line in run_case(seed, [name])] == []
