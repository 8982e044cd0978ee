"""Example inputs of a model, as a user writes them down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from xdit_compile.errors import XditError
from xdit_compile.parallel import bind_call

Inputs = Mapping[str, Any] | Sequence[Any]
"""Keyword arguments by name, or positional arguments in order."""


def call_arguments(model: nn.Module, inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the call that ``inputs`` describe, as the signature orders them and
    a parallel model sees them."""
    if isinstance(inputs, Mapping):
        args, kwargs = (), dict(inputs)
    elif isinstance(inputs, (tuple, list)):
        args, kwargs = tuple(inputs), {}
    else:
        raise XditError(f"inputs must be a dict of keyword arguments or a tuple of positional ones, got a "
                        f"{type(inputs).__name__}")
    try:
        return bind_call(model, args, kwargs)
    except TypeError as error:
        raise XditError(f"the inputs do not fit {type(model).__name__}.forward: {error}") from error
