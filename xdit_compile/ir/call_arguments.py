"""The arguments of one call of a model: bound to its signature, named for people, written down by users."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from xdit_compile.errors import XditError
from xdit_compile.ir.containers import CONSTANTS

Inputs = Mapping[str, Any] | Sequence[Any]
"""Keyword arguments by name, or positional arguments in order."""


def bind_call(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
    """The arguments as the signature of forward orders them, without ``self``: the one way programs are kept by.

    Raises:
        TypeError: forward does not take them.
    """
    # Of the forward that a call runs, which may be an attribute of the object.
    return inspect.signature(model.forward).bind(*args, **kwargs)


def call_arguments(model: nn.Module, inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the call that ``inputs`` describe, as a parallel model sees them."""
    if isinstance(inputs, Mapping):
        args, kwargs = (), dict(inputs)
    elif isinstance(inputs, (tuple, list)):
        args, kwargs = tuple(inputs), {}
    else:
        raise XditError(f"inputs must be a dict of keyword arguments or a tuple of positional ones, got a "
                        f"{type(inputs).__name__}")
    try:
        bound = bind_call(model, args, kwargs)
    except TypeError as error:
        raise XditError(f"the inputs do not fit {type(model).__name__}.forward: {error}") from error
    return bound.args, bound.kwargs


def named_leaves(bound: inspect.BoundArguments) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors, and all else as text, by where they are in the call: ``hidden_states``, ``rotary[0]``."""
    tensors, others = {}, {}
    for path, leaf in pytree.tree_flatten_with_path(dict(bound.arguments))[0]:
        name = pytree.keystr(path[:1]).strip("[]'") + pytree.keystr(path[1:])
        if isinstance(leaf, torch.Tensor):
            tensors[name] = leaf
        else:
            others[name] = repr(leaf) if isinstance(leaf, CONSTANTS) else type(leaf).__qualname__
    return tensors, others
