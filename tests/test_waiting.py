"""A steady step waits for no value of a device and for no other rank."""

from __future__ import annotations

from typing import Any

import pytest
import waiting
from marks import whole
from pool import Pool
from test_habits import act
from test_pipelines import folders  # noqa: F401


@pytest.mark.parametrize(("name", "spec", "batch"), [
    ("pixart_alpha", "ulysses=2", 2), ("pixart_alpha", "ring=2", 2), ("pixart_alpha", "cfg=2", 2),
    ("pixart_alpha", "cfg=2", 1), ("pixart_alpha", "ulysses=2,keep=off", 2), ("flux", "ulysses=2", 1),
    ("pixart_alpha", "pipefusion=2,patches=3", 1), ("flux", "pipefusion=2,patches=2", 1),
])
def test_models(pool: Pool, name: str, spec: str, batch: int) -> None:
    assert pool.run(waiting.of_a_model, name, spec, batch, True, ranks=range(2)) == [{}, {}]


def test_what_it_would_see(pool: Pool) -> None:
    seen: list[dict[str, Any]] = pool.run(waiting.of_a_model, "pixart_alpha", "ulysses=2", 2, True, "always",
                                          ranks=range(2))
    assert all(any("another rank" in what for what in rank) for rank in seen)


@pytest.mark.parametrize("check_inputs", ["behind", "always"])
def test_a_loop_that_looks_like_the_one_before(pool: Pool, check_inputs: str) -> None:
    """Keys and values of another loop are not used in silence."""
    said = pool.run(waiting.begun_unseen, "pixart_alpha", "pipefusion=2,patches=2", check_inputs, ranks=range(2))
    assert said[0] == said[1]
    late = ["began another one" in text for text in said[0]]
    assert late == ([False] * 4 + [True, False, False] if check_inputs == "behind" else [False] * 7), said


@pytest.mark.parametrize("spec", ["ulysses=2", "ring=2", "cfg=2", "pipefusion=2,patches=2"])
def test_pipelines(pool: Pool, folders: str, spec: str) -> None:  # noqa: F811
    assert act(pool, waiting.of_a_pipeline, "sd3", folders, spec, True) == [{}, {}]


@pytest.mark.parametrize(("spec", "batch", "what"), [
    (spec, batch, what) if (spec, what) in [("ulysses=2", "value"), ("ulysses=2", "weight"), ("cfg=2", "shape"),
                           ("pipefusion=2,patches=2", "prompt"), ("pipefusion=2,patches=2", "weight")]
    else whole(spec, batch, what)
    for spec, batch in [("ulysses=2", 2), ("ring=2", 1), ("cfg=2", 2), ("cfg=2", 1), ("pipefusion=2,patches=2", 1)]
    for what in waiting.CHANGES if (spec, what) != ("pipefusion=2,patches=2", "value")])
def test_what_differs_in_a_steady_step_is_named_within_one(pool: Pool, spec: str, batch: int, what: str) -> None:
    _, says = waiting.CHANGES[what]
    for error, text, step in pool.run(waiting.differing, "pixart_alpha", spec, batch, what, ranks=range(2)):
        assert (error, says in text, step in (3, 4)) == ("RankMismatch", True, True), (error, text, step)
