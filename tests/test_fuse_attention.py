"""Attention written by hand is one attention node where it is attention, and otherwise stays what it is."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from xdit_compile.frontend.capture import capture
from xdit_compile.ir.pytree import flatten
from xdit_compile.passes.canonicalize import canonicalize

aten = torch.ops.aten
Step = Callable[[Tensor], Tensor]


def shifted(x: Tensor, dim: int = -1, over: int = -1, keep: Step = lambda x: x, weigh: Step = torch.exp) -> Tensor:
    e = weigh(x - keep(x).amax(dim, keepdim=True))
    return e / e.sum(over, keepdim=True)


SCALES: dict[str, tuple[Step, bool]] = {
    "none": (lambda s: s, True), "times": (lambda s: s * 0.25, True), "divided": (lambda s: s / 3.0, True),
    "twice": (lambda s: s * 0.5 / 2.0, True), "learned": (lambda s: s * torch.linspace(1, 2, 4)[:, None, None], True),
    "rows": (lambda s: s * torch.linspace(1, 2, 5)[:, None], False), "cast": (lambda s: s.double().float(), False)}
MASKS: dict[str, tuple[Step, bool]] = {
    "none": (lambda s: s, True), "bias": (lambda s: s + torch.linspace(-1, 1, 35).view(5, 7), True),
    "heads": (lambda s: s + torch.linspace(-1, 1, 140).view(4, 5, 7), True),
    "hidden": (lambda s: s.masked_fill(torch.ones(5, 7).triu(1).bool(), -torch.inf), True),
    "low": (lambda s: s.masked_fill(torch.ones(5, 7).triu(1).bool(), torch.finfo(s.dtype).min), True),
    "not_low": (lambda s: s.masked_fill(torch.ones(5, 7).triu(1).bool(), -4.0), False),
    "half": (lambda s: s + torch.linspace(-1, 1, 35).view(5, 7).half(), False),
    "whole": (lambda s: s + torch.arange(35).view(5, 7), False),
    "two": (lambda s: (s + torch.linspace(-1, 1, 7)) + torch.linspace(-1, 1, 35).view(5, 7), False)}
SOFTMAXES: dict[str, tuple[Step, bool]] = {
    "softmax": (lambda s: s.softmax(-1), True), "by_place": (lambda s: s.softmax(s.ndim - 1), True),
    "written": (shifted, True), "written_by_place": (lambda s: shifted(s, s.ndim - 1, s.ndim - 1), True),
    "over_queries": (lambda s: s.softmax(-2), False), "summed_otherwise": (lambda s: shifted(s, -1, -2), False),
    "another_maximum": (lambda s: shifted(s, keep=lambda x: 2 * x), False),
    "another_function": (lambda s: shifted(s, weigh=torch.sigmoid), False),
    "largest_of_all_rows": (lambda s: shifted(s, -2), False)}


class Attends(nn.Module):
    """Four heads of width 8, 5 queries and 7 keys."""

    def __init__(self, steps: list[Step], weights: bool = False) -> None:
        super().__init__()
        self.steps, self.weights = steps, weights

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        scores = q @ k.transpose(-1, -2)
        for step in self.steps:
            scores = step(scores)
        out = scores @ v
        return (out, scores) if self.weights else out


def check(model: nn.Module, arguments: tuple[Tensor, ...]) -> bool:
    """That the canonical program gives the same; whether it is one attention."""
    program = canonicalize(capture(model, arguments))
    given = [program.constants[i.name] if i.kind == "constant" else arguments[int(i.name.removeprefix("arg_"))]
             for i in program.inputs]
    for found, wanted in zip(program.main(*given), flatten(model(*arguments))[0], strict=True):
        torch.testing.assert_close(found, wanted, equal_nan=True)
    nodes = [n.target for _, m in program.functions() for n in m.graph.nodes]
    return aten.scaled_dot_product_attention.default in nodes


def operands(*outer: int) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(*outer, n, 8) for n in (5, 7, 7))


@pytest.mark.parametrize("table", [SCALES, MASKS, SOFTMAXES], ids=["scales", "masks", "softmaxes"])
def test_each_spelling(table: dict[str, tuple[Step, bool]]) -> None:
    for name, (step, attention) in table.items():
        steps = [step] if table is SOFTMAXES else [step, lambda s: s.softmax(-1)]
        for outer in ((4,), (2, 4)):
            assert check(Attends(steps), operands(*outer)) is attention, (name, outer)


@pytest.mark.parametrize("seed", range(4))
def test_random_spellings(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(12):
        scale, mask, softmax = (rng.choice(list(t)) for t in (SCALES, MASKS, SOFTMAXES))
        after = rng.random() < 0.3  # the mask comes first, and is scaled with the scores
        steps = [SCALES[scale][0], MASKS[mask][0]][:: -1 if after else 1]
        found = check(Attends([*steps, SOFTMAXES[softmax][0]]), operands(2, 4))
        wanted = SCALES[scale][1] and MASKS[mask][1] and SOFTMAXES[softmax][1]
        if after and "none" not in (scale, mask):
            wanted = False
        assert found is wanted, (scale, mask, softmax, after)


def test_weights_that_are_used_otherwise_stay() -> None:
    assert not check(Attends([lambda s: s.softmax(-1)], weights=True), operands(2, 4))
    assert not check(Attends([lambda s: s.softmax(-1), lambda s: s * 2]), operands(2, 4))
    assert not check(Attends([lambda s: s.softmax(-1), lambda s: s.relu()]), operands(2, 4))


@pytest.mark.parametrize("beta", [None, 0.0, 1.0, 0.5])
@pytest.mark.parametrize("alpha", [None, 1.0, 0.5])
def test_products_that_are_added_to_something(beta: float | None, alpha: float | None) -> None:
    named = {name: value for name, value in (("beta", beta), ("alpha", alpha)) if value is not None}

    class Added(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            bias = torch.linspace(-1, 1, 35).view(5, 7).expand(4, 5, 7)
            return torch.baddbmm(bias, q, k.transpose(1, 2), **named).softmax(-1) @ v

    assert check(Added(), operands(4)) is (beta != 0.5)
