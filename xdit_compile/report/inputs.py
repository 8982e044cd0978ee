"""Example inputs of a model, as a user writes them down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xdit_compile.errors import XditError

Inputs = Mapping[str, Any] | Sequence[Any]
"""Keyword arguments by name, or positional arguments in order."""


def call_arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the call that ``inputs`` describe."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    raise XditError(f"inputs must be a dict of keyword arguments or a tuple of positional ones, got a "
                    f"{type(inputs).__name__}")
