"""The table of sharding rules: for each operator, what a rank computes on its pieces.

A rule is a function of the interpreter and the operator's arguments (tensors as ``Value``). It lays its arguments out
(``lay``, ``whole``, ``broadcast``), emits the local operator and states the result's layout, or raises ``NoRule``
with the reason. It is entered with an example of a call for each operator it serves, from which the property test
draws: being in the table is being tested.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class Draw(Protocol):
    """What an example call is drawn with: random tensors, sizes and choices."""

    def tensor(self, *shape: int, dtype: torch.dtype = ...) -> torch.Tensor: ...

    def indices(self, limit: int, *shape: int) -> torch.Tensor: ...

    def size(self, low: int = ..., high: int = ...) -> int: ...

    def pick(self, *choices: Any) -> Any: ...


Example = Callable[[Draw], tuple[Any, ...]]
"""Draws the arguments of a call; a dictionary at the end holds those given by name."""


@dataclass(frozen=True)
class Rule:
    apply: Callable[..., Any]
    example: Example


RULES: dict[Any, Rule] = {}

FAMILIES = ("pointwise", "shape", "contraction", "reduction", "along", "index", "convolution", "resize", "attention")


def rule(examples: Mapping[Any, Example]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a function as the rule of these operators."""

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        for op, example in examples.items():
            assert op not in RULES, f"{op} has two rules"
            RULES[op] = Rule(function, example)
        return function

    return enter


def find_rule(op: Any) -> Callable[..., Any] | None:
    """The rule of ``op``: its own, or the element-wise one if PyTorch tags it so, or None."""
    if op in RULES:
        return RULES[op].apply
    if torch.Tag.pointwise in getattr(op, "tags", ()):
        return RULES[torch.ops.aten.add.Tensor].apply
    return None


for _family in FAMILIES:
    importlib.import_module(f"{__name__}.{_family}")
