"""Classes of containers that pytrees do not know: how their objects are taken apart, made again and filled."""

from __future__ import annotations

import logging
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from enum import Enum
from pathlib import PurePath
from types import MemberDescriptorType, SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

CONSTANTS = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.layout,
             torch.memory_format)
"""Leaves that are baked into a program: two calls share one only where these are equal."""

REGISTERED: set[type] = set()
"""Classes that ``register`` was told of."""

_WHOLE = (*CONSTANTS, torch.Tensor, nn.Module, type, Enum, set, frozenset, BaseException, logging.Logger,
          logging.Handler, PurePath)
_BASES: tuple[Any, ...] = (OrderedDict, defaultdict, dict, deque, list, tuple, SimpleNamespace, object)
_DICTS, _LISTS = (OrderedDict, defaultdict, dict), (deque, list, tuple)


def is_container(x: Any) -> bool:
    """A dataclass, or an object that is its attributes, slots and items, and no more: a cache of keys and values."""
    if isinstance(x, _WHOLE) or callable(x):
        return False
    base = _base(type(x))
    return all(c in base.__mro__ or _is_python(c) for c in type(x).__mro__)


def _is_python(cls: Any) -> bool:
    """Whether a ``class`` statement made it."""
    if not cls.__flags__ & 1 << 9:
        return False
    return any(n in vars(cls) for n in ("__dict__", "__weakref__", "__slots__")) or _is_python(cls.__base__)


def _base(cls: Any) -> Any:
    """Which of its classes has the items: methods may have been overridden."""
    return next(c for c in cls.__mro__ if c in _BASES)


def _slots(cls: Any) -> dict[str, MemberDescriptorType]:
    return {n: m for c in reversed(cls.__mro__) if c not in _base(cls).__mro__ for n, m in vars(c).items()
            if isinstance(m, MemberDescriptorType)}


def _attributes(x: Any) -> dict[str, Any]:
    try:
        found = object.__getattribute__(x, "__dict__")
    except AttributeError:
        return {}
    return found if isinstance(found, dict) else {}


def _state(x: Any, slots: dict[str, MemberDescriptorType]) -> dict[str, Any]:
    """Attributes and slots that are set."""
    found = dict(_attributes(x))
    for name, member in slots.items():
        try:
            found[name] = member.__get__(x)
        except AttributeError:
            continue
    return found


def _put(x: Any, name: str, value: Any, slots: dict[str, MemberDescriptorType]) -> None:
    if name in slots:
        slots[name].__set__(x, value)
    else:
        _attributes(x)[name] = value


def register(cls: type) -> None:
    """Tell pytree about a class. Rebuilt without ``__init__``: it may compute or refuse, and ran once already."""
    REGISTERED.add(cls)
    base, slots = _base(cls), _slots(cls)

    def parts(x: Any) -> tuple[list[Any], tuple[Any, ...]]:
        state, keys, items, more = _state(x, slots), (), [], None
        if base in _DICTS:
            keys, items = tuple(base.keys(x)), list(base.values(x))
            more = x.default_factory if base is defaultdict else None
        elif base in _LISTS:
            items, more = list(base.__iter__(x)), x.maxlen if base is deque else None
        return [*state.values(), *items], (tuple(state), keys, more)

    def unflatten(values: Any, context: Any) -> Any:
        names, keys, more = context
        values = list(values)
        items = values[len(names):]
        made = base.__new__(cls, items) if base is tuple else base.__new__(cls)
        if base is deque:
            deque.__init__(made, items, more)
        elif base is list:
            list.extend(made, items)
        elif base in _DICTS:
            if base is defaultdict:
                defaultdict.__init__(made, more)
            for key, value in zip(keys, items, strict=True):
                base.__setitem__(made, key, value)
        for name, value in zip(names, values, strict=False):
            _put(made, name, value, slots)
        return made

    def named(x: Any) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        values, (names, keys, more) = parts(x)
        count = len(values) - len(names)
        paths = [*map(pytree.GetAttrKey, names),
                 *(map(pytree.MappingKey, keys) if keys else map(pytree.SequenceKey, range(count)))]
        return list(zip(paths, values, strict=True)), (names, keys, more)

    pytree.register_pytree_node(cls, parts, unflatten, flatten_with_keys_fn=named)


def fill(old: Any, new: Any, kept: Callable[[Any, Any], Any]) -> None:
    """Give ``old`` the items, attributes and slots of ``new``, which is of its class; ``kept`` says for a part before
    and after which object it is."""
    base = _base(type(old))
    if base in _DICTS:
        held = dict(base.items(old))
        merged = {k: kept(held[k], v) if k in held else v for k, v in base.items(new)}
        base.clear(old)
        for key, value in merged.items():
            base.__setitem__(old, key, value)
    elif base in (list, deque):
        before, after = list(base.__iter__(old)), list(base.__iter__(new))
        made = [kept(a, b) for a, b in zip(before, after, strict=False)] + after[len(before):]
        base.clear(old)
        base.extend(old, made)
    if type(old) in REGISTERED:
        slots = _slots(type(old))
        state, then = _state(old, slots), _state(new, slots)
        for name in state.keys() - then.keys():
            slots[name].__delete__(old) if name in slots else _attributes(old).pop(name)
        for name, value in then.items():
            _put(old, name, kept(state[name], value) if name in state else value, slots)
