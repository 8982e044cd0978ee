"""The commonest operators, each between two blocks of attention on two ranks, against plain PyTorch."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from operator_runs import calls, measure
from operators import COMPUTED_WHOLE

from xdit_compile.passes.rules import RULES

ALL = [text for texts in calls().values() for text in texts]
EXACT = 1e-5


def check(text: str) -> None:
    found = measure(text)
    assert found.error <= EXACT
    assert bool(found.fallbacks) is (text in COMPUTED_WHOLE), found.fallbacks


@pytest.mark.parametrize("text", ALL[5::16])
def test_a_sample_of_operators(text: str) -> None:
    check(text)


@pytest.mark.whole
@pytest.mark.parametrize("text", ALL)
def test_each_operator(text: str) -> None:
    check(text)


def test_what_is_computed_whole_is_among_the_calls() -> None:
    assert set(ALL) >= COMPUTED_WHOLE and len(ALL) == len(set(ALL))


@pytest.mark.parametrize("op", list(RULES), ids=str)
def test_a_rule_needs_no_more_than_captured_programs_hold(op: Any) -> None:
    """What is a default is left away in a graph."""
    needed = [a for a in op._schema.arguments if not a.has_default_value()]
    signature = inspect.signature(RULES[op].apply)
    signature.bind(None, *(a.name for a in needed if not a.kwarg_only),
                   **{a.name: None for a in needed if a.kwarg_only})
    assert isinstance(op, torch._ops.OpOverload)
