"""Verification passes an exact model, and names the operator that is wrong in one that is not."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests import models
from xdit_compile.diagnostics.difference import Difference, difference, piece_of
from xdit_compile.diagnostics.verification import Verification
from xdit_compile.diagnostics.verify import verify
from xdit_compile.errors import XditError
from xdit_compile.ir.layout import Dim, Layout
from xdit_compile.kernels.probe import QUERIES
from xdit_compile.kernels.registry import KERNELS
from xdit_compile.passes.emitter import Emitter
from xdit_compile.passes.rules import RULES, Rule, find_rule
from xdit_compile.runtime.execution.executor import Executor

aten = torch.ops.aten

PAIR = (1, 2)


class Attention(nn.Module):
    """Self attention over (batch, tokens, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Block(nn.Module):
    """Attention and an MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.attend = nn.LayerNorm(width), Attention(width, heads)
        self.up, self.act, self.down = nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attend(self.norm(x))
        return x + self.down(self.act(self.up(x)))


class Tiny(nn.Module):
    """Three identical blocks between two projections."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(8, width), nn.Linear(width, 8)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return self.leave(x)


def _tiny() -> nn.Module:
    torch.manual_seed(0)
    return Tiny().eval()


def _check(model: nn.Module, spec: str, ranks: tuple[int, ...]) -> Verification:
    torch.manual_seed(1)
    return verify(model, spec, {"x": torch.randn(2, 35, 8)}, ranks=ranks)


def _exact(spec: str, ranks: tuple[int, ...]) -> Verification:
    return _check(_tiny(), spec, ranks)


def _exact_without_blocks(spec: str, ranks: tuple[int, ...]) -> Verification:
    return verify(models.build("fused"), spec, models.CASES["fused"].inputs(1, True), ranks=ranks)


def _with_wrong_operator(op: str, zeroed: bool, ranks: tuple[int, ...]) -> Verification:
    """The second rank gets 1.01 times the right pieces of what ``aten.op`` returns; in the first block that
    makes no difference if its MLP's inner values are ``zeroed``."""
    packet, _, overload = op.partition(".")
    target = getattr(getattr(aten, packet), overload)
    right, before = find_rule(target), RULES.get(target)
    assert right is not None

    def wrong(s: Any, *args: Any, **kwargs: Any) -> Any:
        value = right(s, *args, **kwargs)
        factor = 1.01 if s.position["sequence"] == 1 else 1.0
        return s.emit(value.layout, value, factor, target=aten.mul.Tensor)

    model = _tiny()
    if zeroed:
        nn.init.zeros_(model.blocks[0].up.weight)
        nn.init.zeros_(model.blocks[0].up.bias)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RULES, target, Rule(wrong, before.example if before else lambda draw: ()))
        return _check(model, "ulysses=2", ranks)


def _with_wrong_kernel(ranks: tuple[int, ...]) -> Verification:
    """The kernel of ring attention gives 1.01 times the right result, but for the example that it is tried on."""
    right = KERNELS["torch"]

    def forward(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = right.forward(*args)
        return out if args[0].shape[2] == QUERIES else out * 1.01, lse

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(KERNELS, "torch", replace(right, forward=forward, like=forward))
        return _check(_tiny(), "ring=2", ranks)


def _with_wrong_gather(ranks: tuple[int, ...]) -> Verification:
    """What ranks gather is 1.01 times what they hold."""
    right = Emitter.gather

    def gather(self: Emitter, *args: Any) -> Any:
        return self.call(aten.mul.Tensor, right(self, *args), 1.01)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Emitter, "gather", gather)
        return _check(_tiny(), "ulysses=2", ranks)


@pytest.mark.parametrize(("case", "spec"), [(_exact, "ulysses=2"), (_exact_without_blocks, "ring=2")])
def test_an_exact_model_passes(pool, case, spec):
    result, other = pool.run(case, spec, PAIR, ranks=PAIR)
    assert result == other
    assert result.ok and result.cause == "" and not result.nodes
    assert 0 <= result.worst < 1e-5
    assert "equal to one device's" in result.summary() and "Outputs" in str(result)


@pytest.mark.parametrize(("op", "module"), [
    ("gelu.default", "blocks.0.act"),
    ("layer_norm.default", "blocks.0.norm"),
])
def test_a_wrong_operator_in_a_block_is_named(pool, op, module):
    result, other = pool.run(_with_wrong_operator, op, False, PAIR, ranks=PAIR)
    assert result == other
    assert not result.ok and result.cause == "rewriting"
    first = result.nodes[0]
    assert (first.function, first.operator, first.module) == ("blocks", f"aten.{op}", module)
    assert first.ranks == (1,) and "35/(18,17)" in first.layout
    assert first.relative == pytest.approx(0.01, rel=0.5)
    assert "DIFFERS" in result.summary() and f"aten.{op}" in result.summary() and module in str(result)
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict()


def test_the_block_that_is_named_is_the_first_that_differs(pool):
    result, _ = pool.run(_with_wrong_operator, "gelu.default", True, PAIR, ranks=PAIR)
    assert (result.nodes[0].operator, result.nodes[0].module) == ("aten.gelu.default", "blocks.1.act")


def test_a_wrong_attention_is_named(pool):
    result, _ = pool.run(_with_wrong_kernel, PAIR, ranks=PAIR)
    first = result.nodes[0]
    assert first.operator == "aten.scaled_dot_product_attention.default"
    assert first.module == "blocks.0.attend" and first.source.startswith("test_verify.py:")
    assert first.ranks == (0, 1)


def test_what_is_wrong_with_the_final_gather_is_the_output(pool):
    result, _ = pool.run(_with_wrong_gather, PAIR, ranks=PAIR)
    assert [n.node for n in result.nodes] == ["output"]


class Timed(nn.Module):
    """Returns something else at every call: what a clock says is no state that could be watched."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * (time.perf_counter_ns() % 2**30)


def test_a_program_that_is_not_the_model_is_told_from_a_wrong_rewrite():
    result = verify(Timed().eval(), "ulysses=1", (torch.ones(2, 4),))
    assert not result.ok and result.cause == "capture"
    assert "captured program already differs" in str(result)


def test_a_wrong_execution_of_right_nodes_is_told_from_a_wrong_rewrite(monkeypatch):
    right = Executor.__call__
    monkeypatch.setattr(Executor, "__call__", lambda self, given: tuple(x + 1 for x in right(self, given)))
    result = verify(nn.Linear(4, 4).eval(), "ulysses=1", {"input": torch.ones(2, 4)})
    assert not result.ok and result.cause == "execution" and not result.nodes


def test_a_model_without_values_is_refused():
    with pytest.raises(XditError, match="meta device"):
        verify(nn.Linear(4, 4, device="meta"), "ulysses=1", (torch.ones(2, 4),))


def test_inputs_are_named_or_positional():
    with pytest.raises(XditError, match="dict of keyword arguments or a tuple"):
        verify(nn.Linear(4, 4), "ulysses=1", torch.ones(2, 4))


def test_infinities_equal_themselves_only():
    inf, nan = math.inf, math.nan
    a = torch.tensor([1.0, inf, -inf, nan])
    assert difference(a, a) == Difference(0.0, 0.0)
    for b in (torch.tensor([nan, inf, -inf, nan]), torch.tensor([1.0, -inf, -inf, nan])):
        assert difference(b, a).exceeds(1e30) and difference(a, b).exceeds(1e30)


def test_a_difference_is_relative_to_the_largest_value():
    a = torch.tensor([1.0, -8.0], dtype=torch.bfloat16)
    assert difference(a, a + torch.tensor([0.5, 0.0])) == Difference(0.5, 0.0625)
    assert difference(torch.tensor([3, 2**60]), torch.tensor([2, 2**60])).absolute == 1.0


def test_a_piece_is_what_its_layout_says():
    layout = Layout((Dim.replicated(2), Dim.even(5, 2)))
    x = torch.arange(10).view(2, 5)
    assert torch.equal(piece_of(x, layout, {"sequence": 1}), x[:, 3:])
