"""Tracing leaves no trace: what a model keeps outside its parameters is put back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from xdit_compile.ir.pytree import CONSTANTS

_HOOKS = frozenset(vars(nn.Module())) - {"training", "_parameters", "_buffers", "_modules"}
"""Attributes that every module has; no forward changes them, and there are many."""

_OPAQUE = (*CONSTANTS, torch.Tensor, type, FunctionType, BuiltinFunctionType, MethodType, ModuleType)


@contextmanager
def side_effects_undone(model: nn.Module, *others: Any) -> Iterator[None]:
    """Within, ``model`` may be traced; afterwards its attributes, and the contents of plain containers and objects
    in it and in ``others``, are what they were: a lazily made table would hold fake tensors."""
    states = [vars(m) for m in model.modules()]
    held = [(s, dict(s)) for s in states] + _contents(
        [v for s in states for k, v in s.items() if k not in _HOOKS] + list(others))
    try:
        yield
    finally:
        for container, before in held:
            _restore(container, before)
        _empty_caches(model)


def _contents(roots: list[Any]) -> list[tuple[Any, Any]]:
    """Every list, dictionary and set that can be reached, with a copy of what is in it."""
    found: dict[int, tuple[Any, Any]] = {}
    stack = roots
    while stack:
        value = stack.pop()
        if isinstance(value, (*_OPAQUE, nn.Module)) or id(value) in found:
            continue
        if isinstance(value, (list, dict, set)):
            copied = dict(value) if isinstance(value, dict) else list(value)
            found[id(value)] = value, copied
            stack += copied.values() if isinstance(copied, dict) else copied
        elif isinstance(value, tuple):
            stack += value
        elif hasattr(value, "__dict__"):
            stack.append(vars(value))
    return [*found.values()]


def _restore(container: Any, before: Any) -> None:
    now = container.items() if isinstance(container, dict) else container
    then = before.items() if isinstance(before, dict) else before
    if len(now) == len(then) and all(_same(a, b) for a, b in zip(now, then, strict=True)):
        return
    # The base class's own methods: a frozen dictionary refuses its own.
    if isinstance(container, dict):
        dict.clear(container)
        dict.update(container, before)
    elif isinstance(container, list):
        list.__setitem__(container, slice(None), before)
    else:
        set.clear(container)
        set.update(container, before)


def _same(a: Any, b: Any) -> bool:
    return (a[0] is b[0] and a[1] is b[1]) if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == 2 else a is b


def _empty_caches(model: nn.Module) -> None:
    """A function's cache may hold fake tensors too, where no attribute leads to it."""
    for cls in {c for m in model.modules() for c in type(m).__mro__}:
        for member in vars(cls).values():
            # A decorator of the model's library may keep the cache inside a closure.
            inside = [c.cell_contents for c in getattr(member, "__closure__", None) or ()]
            for cached in (member, *inside):
                if hasattr(cached, "cache_clear"):
                    cached.cache_clear()
