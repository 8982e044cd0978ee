"""When are two modules the same code over different weights? When their fingerprints are equal.

A fingerprint holds everything a module's forward can read: types, Python attributes, shapes and dtypes of
parameters and buffers, hooks, children; only the *values* of parameters and buffers are left out. What cannot
be compared by value counts by identity, so that doubt makes modules different, never equal.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch

from xdit_compile.ir.pytree import CONSTANTS
from xdit_compile.ir.released_parameters import device_of


def fingerprint(module: torch.nn.Module) -> Hashable:
    """A hashable value, equal for modules that one captured graph can serve."""
    return _describe(module, {})


def meta(tensor: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device]:
    """What a static graph assumes of a tensor."""
    return tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, device_of(tensor)


def _describe(value: Any, seen: dict[int, tuple[int, Any]]) -> Hashable:
    if isinstance(value, CONSTANTS):
        return type(value), value
    if isinstance(value, (torch.Tensor, type, FunctionType, BuiltinFunctionType)):
        return type(value), id(value)
    if isinstance(value, MethodType):
        return value.__func__, _describe(value.__self__, seen)
    if id(value) in seen:
        return "seen", seen[id(value)][0]
    # The object is kept with its number: once freed, another could have its id.
    seen[id(value)] = len(seen), value
    if isinstance(value, torch.nn.Module):
        state = [(n, meta(t)) for group in (value._parameters, value._buffers) for n, t in group.items()
                 if t is not None]
        rest = {k: v for k, v in vars(value).items() if k not in ("_parameters", "_buffers")}
        return type(value), tuple(state), _describe(rest, seen)
    if isinstance(value, Mapping):
        return type(value), tuple((_describe(k, seen), _describe(v, seen)) for k, v in value.items())
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(_describe(v, seen) for v in value)
    if isinstance(value, Iterable) and hasattr(value, "__len__"):
        return type(value), tuple(_describe(v, seen) for v in value)
    if type(value).__module__ != "builtins" and hasattr(value, "__dict__"):
        return type(value), _describe(vars(value), seen)
    return type(value), id(value)
