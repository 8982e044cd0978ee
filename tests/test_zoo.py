"""Any DiT: every class of diffusers in every mode, and research styles, give the numbers of one device."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import zoo
from emulation import emulate
from test_exactness import QUICK

SPECS = ["ulysses=2", "ring=3", "tensor=2", "tensor=3", "tensor=2,ulysses=2", "tensor=2,ring=2"]


def test_every_class_of_the_library_has_a_case() -> None:
    source = "\n".join(inspect.getsource(module) for module in zoo.MODULES)
    named = set(re.findall(r"\b[A-Z]\w+(?:Model|Transformer|Decoder)\b", source))
    assert sorted(set(zoo.library_classes()) - named) == []


def test_names_are_not_used_twice() -> None:
    assert len(zoo.CASES) == sum(len(module.CASES) for module in zoo.MODULES)


def chosen() -> list[Any]:
    """All pairs, of which a quick run takes one for every seventh class that is not run on real processes anyway."""
    quick = {(n, SPECS[i // 7 % len(SPECS)]) for i, n in enumerate(zoo.BASIC) if n not in QUICK and i % 7 == 0}
    return [pytest.param(n, s, id=f"{n}-{s}", marks=[] if (n, s) in quick else pytest.mark.whole)
            for n in zoo.CASES for s in SPECS]  # fmt: skip


@pytest.mark.parametrize(("name", "spec"), chosen())
def test_ranks_together_give_the_numbers_of_one(name: str, spec: str) -> None:
    case = zoo.CASES[name]
    found = emulate(case, 2, True, spec)
    assert found.error <= case.tolerance
    assert found.methods <= {word.partition("=")[0] for word in spec.split(",")}
