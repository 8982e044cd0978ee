"""Verification passes an exact model, and names the operator that is wrong in one that is not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests import models
from xdit_compile.errors import XditError
from xdit_compile.kernels import registry
from xdit_compile.layout import Dim, Layout, Segment
from xdit_compile.passes.rules import RULES, Rule, find_rule
from xdit_compile.report.difference import difference, piece_of
from xdit_compile.verify import Verification, verify

aten = torch.ops.aten


def _case(name: str, spec: str, ranks: tuple[int, ...]) -> Verification:
    return verify(models.build(name), spec, models.CASES[name].inputs(1, True), ranks=ranks)


def _broken(op: Any, position: int, *case: Any) -> Verification:
    """A case in which the rank at ``position`` gives 1.01 times the right pieces of what ``op`` returns."""
    right, before = find_rule(op), RULES.get(op)
    assert right is not None

    def wrong(s: Any, *args: Any, **kwargs: Any) -> Any:
        value = right(s, *args, **kwargs)
        factor = 1.01 if s.position["sequence"] == position else 1.0
        return s.emit(value.layout, value, factor, target=aten.mul.Tensor)

    RULES[op] = Rule(wrong, lambda draw: ())
    try:
        return _case(*case)
    finally:
        if before is None:
            del RULES[op]
        else:
            RULES[op] = before


def _broken_kernel(*case: Any) -> Verification:
    """A case in which the attention kernel of rings gives 1.01 times the right result."""
    right = registry.KERNELS["torch"]

    class Wrong:
        def __getattr__(self, name: str) -> Any:
            return getattr(right, name)

        def forward(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
            out, lse = right.forward(*args)
            return out * 1.01, lse

    registry.KERNELS["torch"] = Wrong()  # type: ignore[assignment]
    try:
        return _case(*case)
    finally:
        registry.KERNELS["torch"] = right


@pytest.mark.parametrize(("name", "spec", "ranks"), [("flux", "ulysses=2", (1, 2)), ("fused", "ulysses=2,ring=2", (0, 1, 2, 3))])
def test_an_exact_model_verifies(pool, name, spec, ranks):
    results = pool.run(_case, name, spec, ranks, ranks=ranks)
    assert all(r == results[0] for r in results)
    assert results[0].ok and results[0].cause == "" and not results[0].nodes
    assert 0 < results[0].worst < 1e-5
    assert "equal" in results[0].summary()


@pytest.mark.parametrize(("op", "module"), [
    (aten.gelu.default, "transformer_blocks.0.ff.net.0"),
    (aten.rms_norm.default, "transformer_blocks.0.attn.norm_q"),
])
def test_a_wrong_operator_in_a_block_is_named(pool, op, module):
    found, again = pool.run(_broken, str(op), 1, "flux", "ulysses=2", (0, 1), ranks=(0, 1))
    assert found == again
    assert not found.ok and found.cause == "rewriting"
    first = found.nodes[0]
    assert (first.function, first.operator, first.module) == ("transformer_blocks", str(op), module)
    assert first.ranks == (1,) and "/2" in first.layout
    assert first.relative == pytest.approx(0.01, rel=0.5)
