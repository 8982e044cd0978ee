"""What Python objects consist of: the one account of where values can hide, for guards and for putting things back."""

from __future__ import annotations

import array
import ctypes
import logging
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from functools import partial, wraps
from pathlib import PurePath
from types import (
    BuiltinFunctionType,
    CodeType,
    GeneratorType,
    GetSetDescriptorType,
    MappingProxyType,
    MemberDescriptorType,
    MethodDescriptorType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch

from xdit_compile.ir.containers import CONSTANTS

T = TypeVar("T")

CAPTURES = "_xdit_compile_captures"
"""The attribute of a model that keeps its programs. It is no state of the model."""

MISSING = type("Missing", (), {"__repr__": lambda self: "nothing"})()
"""Where there is no value."""

LEAVES = (ModuleType, BuiltinFunctionType, GetSetDescriptorType, MemberDescriptorType, MethodDescriptorType,
          WrapperDescriptorType, CodeType, Enum, logging.Logger, logging.Handler, torch.Generator, PurePath,
          torch._ops.OpOverload, torch._ops.OpOverloadPacket)
"""What counts as itself: it holds nothing that a forward computes with, or cannot be changed."""

_Buffer = (bytearray, array.array, ctypes.Array, ctypes.Structure, ctypes.Union, ctypes._SimpleCData)
_SPEAKING = frozenset({"builtins", "itertools", "random", "_random", "numpy", "datetime", "decimal", "fractions",
                       "collections", "uuid", "re", "operator", "statistics"})
"""Modules whose objects written in C say what they hold when they are asked for a copy of themselves."""


def content(value: Any) -> bytes | None:
    """The bytes of what is nothing but memory: an array, a buffer; None for all else."""
    if isinstance(value, (np.ndarray, np.generic)):
        return None if value.dtype.hasobject else value.tobytes()
    return bytes(value) if isinstance(value, _Buffer) else None  # type: ignore[arg-type]


def put_content(value: Any, before: bytes) -> None:
    """Give such memory the bytes that it had."""
    if isinstance(value, np.ndarray):
        np.copyto(value, np.frombuffer(before, value.dtype).reshape(value.shape))
    elif isinstance(value, bytearray):
        value[:] = before
    elif isinstance(value, array.array):
        value[:] = array.array(value.typecode, before)
    elif not isinstance(value, np.generic):
        ctypes.memmove(ctypes.addressof(value), before, len(before))


def attributes(value: Any) -> dict[str, Any] | None:
    """An object's own ``__dict__``, of a ``threading.local`` this thread's; None if it has none."""
    if isinstance(value, type):
        return None
    try:
        found = value.__dict__ if type(value).__module__ == "_thread" else object.__getattribute__(value, "__dict__")
    except Exception:  # objects may answer this as they like
        return None
    return found if isinstance(found, dict) else None


def _of_class(ask: Callable[[Any], T]) -> Callable[[Any], T]:
    """``ask`` once for each class, of which nothing is kept alive: the class of a parallel model leads to the model."""
    known: WeakKeyDictionary[Any, T] = WeakKeyDictionary()

    @wraps(ask)
    def answer(cls: Any) -> T:
        if cls not in known:
            known[cls] = ask(cls)
        return known[cls]

    return answer


def slots(cls: Any) -> list[tuple[str, MemberDescriptorType]]:
    """The slots of a class that is written in Python."""
    return [(name, vars(cls.__mro__[i])[name]) for i, name in _slots(cls)]


@_of_class
def _slots(cls: Any) -> list[tuple[int, str]]:
    """Which of its classes has which; a slot itself leads to its class."""
    return [(i, name) for i, c in enumerate(cls.__mro__) if is_python(c) for name, member in vars(c).items()
            if isinstance(member, MemberDescriptorType)]


def slot(member: MemberDescriptorType, value: Any) -> Any:
    """What a slot holds."""
    try:
        return member.__get__(value)
    except AttributeError:
        return MISSING


@_of_class
def is_python(cls: Any) -> bool:
    """Whether a class was made by a ``class`` statement."""
    return any(isinstance(vars(cls).get(n), (GetSetDescriptorType, tuple, list, str))
               for n in ("__dict__", "__weakref__", "__slots__")) or (
        cls is not object and bool(cls.__flags__ & 1 << 9) and cls.__base__ is not None and is_python(cls.__base__))


@_of_class
def is_plain(cls: Any) -> bool:
    """Whether its instances are their attributes and slots, and no more."""
    return all(c is object or is_python(c) for c in cls.__mro__) and not issubclass(cls, (type, BaseException))


def is_leaf(value: Any) -> bool:
    """Whether nothing is looked for inside of a value: see ``LEAVES``; and what this package made."""
    return value is MISSING or isinstance(value, LEAVES) or is_namespace(value) or (
        package(type(value).__module__) == "xdit_compile")


def is_namespace(value: Any) -> bool:
    """Whether a dictionary is that of a module."""
    return isinstance(value, dict) and "__name__" in value and "__builtins__" in value


def elements(value: Any) -> list[Any] | None:
    """What is in a sequence or a set, in its order."""
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return list(_base(value.__class__).__iter__(value))
    return list(value.flat) if isinstance(value, np.ndarray) and value.dtype.hasobject else None


@_of_class
def _base(cls: Any) -> Any:
    """Which of its classes is the container itself: iteration may have been overridden."""
    return next(c for c in cls.__mro__ if c in (list, tuple, set, frozenset, deque))


def entries(value: Any) -> Mapping[Any, Any] | None:
    """What is in a dictionary."""
    return value if isinstance(value, (dict, MappingProxyType)) else None


def spoken(value: Any) -> Any:
    """What an object written in C says it holds, MISSING if it does not."""
    cls = type(value)
    if cls.__module__.partition(".")[0] not in _SPEAKING and not any(
            c.__module__.partition(".")[0] in _SPEAKING - {"builtins"} for c in cls.__mro__):
        return MISSING
    if isinstance(value, (type, partial)):
        return MISSING
    try:
        return value.__reduce_ex__(2)[1:]
    except Exception:  # many refuse, each in its way
        return MISSING


def is_stream(value: Any) -> bool:
    """Whether reading it changes it, and it does not say where it is: a generator that is under way."""
    return isinstance(value, GeneratorType) or (
        hasattr(type(value), "__next__") and not is_plain(type(value)) and spoken(value) is MISSING)


def package(name: str | None) -> str:
    """The first part of a module's name."""
    return (name or "").partition(".")[0]


STDLIB = frozenset(sys.stdlib_module_names) - {"__main__"}


def is_library(module: str | None) -> bool:
    """Whether code or a class of this module is Python's, PyTorch's or ours: no part of a model."""
    return package(module) in STDLIB or package(module) in ("torch", "numpy", "xdit_compile", "sympy")


def constants(value: Any) -> bool:
    """Whether it is a value that can be compared and never changes."""
    return isinstance(value, CONSTANTS) and type(value) in _EXACT


_EXACT = frozenset(CONSTANTS)


def inside(value: Any) -> Iterator[tuple[str, Any]]:
    """Names and values of attributes and slots."""
    yield from (attributes(value) or {}).items()
    yield from ((name, slot(member, value)) for name, member in slots(type(value)))
