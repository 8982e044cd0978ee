"""Every model on 2, 3 and 4 processes gives the numbers of one, whatever the batch and the token count."""

from __future__ import annotations

import itertools
import re
from typing import Any

import cases
import exactness
import models
import pytest
from marks import whole
from pool import Pool

EXACT = 1e-5  # of the output's scale, in float32

CALLS = [(1, True), (2, False), (2, True)]
"""Batch, and whether token counts are odd."""


def specs_of(case: models.Case, turn: int) -> list[str]:
    """One of three pairs: for 2, 3 or 4 processes."""
    four = ["ulysses=2,ring=2", "ulysses=4" if case.heads >= 4 else "ring=4"]
    return (["ulysses=2", "ring=2"], ["ulysses=3", "ring=3"], four)[turn % 3]


QUICK = cases.basic(models.CASES)

PLAN = [
    pytest.param(name, batch, odd, specs_of(case, i + j), id=f"{name}-{batch}-{'odd' if odd else 'even'}",
                 marks=[] if i % 9 == j and name in QUICK else pytest.mark.whole)
    for i, (name, case) in enumerate(models.CASES.items())
    for j, (batch, odd) in enumerate(CALLS)
]
"""Each case meets all specs, and each spec all calls: which meets which goes around from case to case. A quick run
takes one of the three, for one case of every third model."""


def processes(spec: str) -> int:
    product = 1
    for degree in re.findall(r"\d+", spec):
        product *= int(degree)
    return product


def run(
    pool: Pool, name: str, batch: int, odd: bool, specs: list[str], **kwargs: Any
) -> dict[str, list[Any]]:
    """By spec, what each of its ranks found."""
    seen = pool.run(exactness.relative_errors, name, batch, odd, specs, **kwargs,
                    ranks=range(max(map(processes, specs))), timeout=240)  # fmt: skip
    return {spec: [s[spec] for s in seen[: processes(spec)]] for spec in specs}


def assert_exact(found: dict[str, list[Any]], limit: float = EXACT) -> None:
    for spec, ranks in found.items():
        errors = [rank["error"] for rank in ranks]
        assert all(e <= limit for e in errors), f"{spec}: {errors}"
        # Gathered results would pass too; they are not what was asked for.
        method = "usp" if "," in spec else spec.partition("=")[0]
        for rank in ranks:
            notes = rank["notes"]
            assert any(re.match(rf"attention \S+: {method}: ", n) for n in notes), f"{spec}: {notes}"
            assert [n for n in notes if n.startswith("fallback")] == [], spec
        assert all(rank["notes"] == ranks[0]["notes"] for rank in ranks)


@pytest.mark.parametrize(("name", "batch", "odd", "specs"), PLAN)
def test_parallel_model_gives_the_numbers_of_one_process(
    pool: Pool, name: str, batch: int, odd: bool, specs: list[str]
) -> None:
    assert_exact(run(pool, name, batch, odd, specs))


def test_every_case_meets_every_spec_and_every_call() -> None:
    wanted = {"ulysses=2", "ring=2", "ulysses=3", "ring=3", "ulysses=2,ring=2"}
    for name, case in models.CASES.items():
        mine = [p.values for p in PLAN if p.values[0] == name]
        assert {(batch, odd) for _, batch, odd, _ in mine} == set(CALLS)
        met = {spec for *_, specs in mine for spec in specs}  # type: ignore[union-attr]
        assert wanted <= met and ("ulysses=4" in met) == (case.heads >= 4)


@pytest.mark.parametrize(("name", "spec"), [
    ("dit", "ulysses=2"), *(whole(n, s) for n, s in itertools.product(("dit", "flux", "wan"), ("ulysses=2", "ring=2"))
                            if (n, s) != ("dit", "ulysses=2"))])
def test_compiled_by_inductor(pool: Pool, name: str, spec: str) -> None:
    assert_exact(run(pool, name, 1, True, [spec], backend="inductor"))


@pytest.mark.parametrize("name", ["dit", whole("flux"), whole("wan")])
def test_bfloat16_differs_no_more_than_bfloat16_makes(pool: Pool, name: str) -> None:
    specs = ["ulysses=2", "ring=2"]
    for seen in pool.run(exactness.differences_in_bfloat16, name, specs, ranks=range(2), timeout=240):
        assert seen["rounding"] > 1e-4, "bfloat16 must make a difference, or this says nothing"
        assert all(seen[spec] <= 1.5 * seen["rounding"] for spec in specs), seen


def test_what_a_model_leaves_in_containers_it_is_given(pool: Pool) -> None:
    """They are the caller's own, on every rank."""
    for rank in run(pool, "wan_animate2", 2, True, ["ulysses=2"])["ulysses=2"]:
        assert rank["error"] <= EXACT
