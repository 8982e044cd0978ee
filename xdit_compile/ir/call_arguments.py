"""The arguments of one call of a model: bound to its signature, named for people, written down by users."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils import _pytree as pytree

from xdit_compile.errors import XditError
from xdit_compile.ir.containers import CONSTANTS

Inputs = Mapping[str, Any] | Sequence[Any]
"""Keyword arguments by name, or positional arguments in order."""


@dataclass(frozen=True)
class Call:
    """A module, and what it is called with."""

    module: nn.Module
    args: Sequence[Any]
    kwargs: Mapping[str, Any]

    def bound(self) -> inspect.BoundArguments:
        """As ``bind_call``."""
        return bind_call(self.module, self.args, self.kwargs)


def bind_call(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
    """The arguments as the signature of forward orders them, without ``self``: the one way programs are kept by.

    Raises:
        TypeError: forward does not take them.
    """
    # Of the forward that a call runs, which may be an attribute of the object.
    return _signature(model.forward).bind(*args, **kwargs)


_SIGNATURES: WeakKeyDictionary[FunctionType, tuple[Sequence[Any], inspect.Signature]] = WeakKeyDictionary()
"""Of methods, and what they were made from, which can be exchanged."""


def _signature(forward: Any) -> inspect.Signature:
    function: Any = getattr(forward, "__func__", None)
    made_from = _made_from(function) if type(forward) is MethodType else None
    if made_from is None:
        return inspect.signature(forward)
    known = _SIGNATURES.get(function)
    if known is None or len(made_from) != len(known[0]) or not all(map(operator.is_, made_from, known[0])):
        known = _SIGNATURES[function] = made_from, inspect.signature(forward)
    return known[1]


def _made_from(function: Any) -> list[Any] | None:
    """What the signature of a function comes from, or of the one that it wraps; None if that is something else."""
    found: list[Any] = []
    while type(function) is FunctionType and "__signature__" not in vars(function) and len(found) < 100:
        found += [function.__code__, function.__defaults__, function.__kwdefaults__]
        function = vars(function).get("__wrapped__")
        if function is None:
            return found
        found.append(function)
    return None


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
