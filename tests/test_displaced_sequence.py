"""Ranks that have of others what these had a step before: the numbers of the method, as the paper has it."""

from __future__ import annotations

import displaced_runs
import pytest
import torch
from marks import whole
from pool import Pool

from xdit_compile.errors import SpecError
from xdit_compile.spec import ShardingSpec

EXACT = 1e-5
SPECS = {"dit": ["cfg=2,ulysses=2"], "pixart_alpha": ["ring=2"], "sd3": ["ulysses=2,keep=off"],
         "flux": ["ulysses=2,ring=2"], "wan": ["ulysses=2"]}
COMPILED = {"dit": ["ulysses=2,backend=inductor"]}


@pytest.mark.parametrize(("name", "specs"), [*SPECS.items(), *(whole(*item) for item in COMPILED.items())])
def test_numbers_of_the_method(pool: Pool, name: str, specs: list[str]) -> None:
    specs = [f"{s},displaced=yes" for s in specs]
    world = max(ShardingSpec.parse(s).world_size for s in specs)
    seen = pool.run(displaced_runs.errors, name, specs, ranks=range(world), timeout=300)
    for spec in specs:
        ranks = [s[spec] for s in seen if spec in s]
        for one in ranks:
            assert max(one["errors"]) <= EXACT, spec
            assert one["exact"][0] <= EXACT and min(one["exact"][1:]) > 1e-4, "after the first step, others are late"
            assert one["counts"] == (displaced_runs.STEPS - 1, displaced_runs.STEPS)
            assert torch.equal(one["actual"], ranks[0]["actual"])
            assert one["unread"][0] > one["unread"][1] == 0, "a loop waits at its end for what nobody will read"


def test_unet(pool: Pool) -> None:
    """Borders of convolutions and moments of group norms are late too."""
    for found in pool.run(displaced_runs.unet_errors, "ulysses=2,displaced=yes", ranks=range(2), timeout=300):
        assert max(found["errors"]) <= EXACT, found
        assert found["exact"][0] <= EXACT and min(found["exact"][1:]) > 1e-4
        assert found["kept"] > 20


@pytest.mark.parametrize(("words", "complaint"), [
    ("displaced=yes", "is for ranks that share tokens"),
    ("displaced=yes,ulysses=2,cache=first_block", "do not go together"),
    ("displaced=yes,pipefusion=2,ulysses=2", "do not go together"),
    ("displaced=yes,ulysses=2,wire=fp8", "do not go together"),
])  # fmt: skip
def test_words_that_do_not_fit(words: str, complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint):
        ShardingSpec.parse(words)
