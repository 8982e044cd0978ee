"""What Python objects consist of: the one account of where values can hide, for guards and for putting things back."""

from __future__ import annotations

import array
import ctypes
import logging
import random
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from functools import _lru_cache_wrapper, cached_property, partial, wraps
from pathlib import PurePath
from queue import SimpleQueue
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FrameType,
    FunctionType,
    GeneratorType,
    GetSetDescriptorType,
    MappingProxyType,
    MemberDescriptorType,
    MethodDescriptorType,
    MethodType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any, TypeVar
from weakref import ReferenceType, WeakKeyDictionary

import numpy as np
import torch

from xdit_compile.frontend.concrete_values import plain
from xdit_compile.ir.containers import CONSTANTS

T = TypeVar("T")

CAPTURES = "_xdit_compile_captures"
"""The attribute of a model that keeps its programs. It is no state of the model."""

MISSING = type("Missing", (), {"__repr__": lambda self: "nothing"})()
"""Where there is no value."""

LEAVES = (BuiltinFunctionType, GetSetDescriptorType, MemberDescriptorType, MethodDescriptorType,
          WrapperDescriptorType, CodeType, logging.Logger, logging.Handler, torch.Generator, PurePath,
          torch._ops.OpOverload, torch._ops.OpOverloadPacket)
"""What counts as itself: it holds nothing that a forward computes with, or cannot be changed."""

LINKS: dict[type, tuple[str, ...]] = {
    FunctionType: ("__defaults__", "__kwdefaults__"), partial: ("func", "args", "keywords"),
    MethodType: ("__func__", "__self__"), property: ("fget",), staticmethod: ("__func__",), classmethod: ("__func__",),
    cached_property: ("func",), _lru_cache_wrapper: ("__wrapped__",), defaultdict: ("default_factory",)}
"""What objects written in C lead to, beside attributes and what they contain."""

_Buffer = (memoryview, bytearray, array.array, ctypes.Array, ctypes.Structure, ctypes.Union, ctypes._SimpleCData)
_SPEAKING = frozenset({"builtins", "itertools", "random", "_random", "numpy", "datetime", "decimal", "fractions",
                       "collections", "uuid", "re", "operator", "statistics"})
"""Modules whose objects written in C say what they hold when they are asked for a copy of themselves."""


def content(value: Any) -> bytes | None:
    """The bytes of what is nothing but memory: an array, a buffer; None for all else."""
    if isinstance(value, (np.ndarray, np.generic)):
        return None if value.dtype.hasobject else value.tobytes()
    return bytes(value) if isinstance(value, _Buffer) else None  # type: ignore[arg-type]


def links(value: Any) -> list[tuple[str, Callable[[], Any]]]:
    """What a value leads to beside its attributes and contents: names, and what gets it now."""
    if isinstance(value, ReferenceType):
        return [("()", value)]
    if isinstance(value, ContextVar):
        return [(".get()", partial(value.get, MISSING))]
    if isinstance(value, CellType):
        return [("", partial(cell_content, value))]
    names = next((names for kind, names in LINKS.items() if isinstance(value, kind)), ())
    return [(f".{n}", partial(getattr, value, n)) for n in names]


def cell_content(cell: CellType) -> Any:
    """What a variable that functions share holds."""
    try:
        return cell.cell_contents
    except ValueError:  # nothing was assigned yet
        return MISSING


def random_state(value: Any) -> tuple[Callable[[], Any], Callable[[Any], None]] | None:
    """What gets, and what sets, the state of a generator of random numbers; None for all else."""
    if isinstance(value, torch.Generator):
        return partial(_seeded, value), partial(_seed, value)
    if isinstance(value, np.random.Generator):
        value = value.bit_generator
    if isinstance(value, np.random.BitGenerator):
        return lambda: value.state, partial(setattr, value, "state")
    if isinstance(value, np.random.RandomState):
        return value.get_state, value.set_state
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return value.getstate, value.setstate
    return None


def _seeded(generator: torch.Generator) -> bytes:
    with plain():
        return generator.get_state().numpy().tobytes()


def _seed(generator: torch.Generator, state: bytes) -> None:
    with plain():
        generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


def put_content(value: Any, before: bytes) -> None:
    """Give such memory the bytes that it had."""
    if isinstance(value, np.ndarray):
        np.copyto(value, np.frombuffer(before, value.dtype).reshape(value.shape))
    elif isinstance(value, bytearray):
        value[:] = before
    elif isinstance(value, memoryview):
        value.cast("B")[:] = before
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
    """Which of its classes has which; a slot itself leads to its class. Where in memory something lies, as classes
    written in C tell, is no slot, and would be another number each time."""
    return [(i, name) for i, c in enumerate(cls.__mro__) if is_python(c) for name, member in vars(c).items()
            if isinstance(member, MemberDescriptorType) and not name.endswith("offset__")]


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
    return value is MISSING or isinstance(value, LEAVES) or package(type(value).__module__) == "xdit_compile"


def namespace(value: Any) -> dict[str, Any] | None:
    """The names of a module of Python, given that or its dictionary; None for all else."""
    if isinstance(value, ModuleType):
        return vars(value)
    return value if is_namespace(value) else None


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
    if (state := random_state(value)) is not None:
        return state[0]()
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
    return isinstance(value, (GeneratorType, SimpleQueue, random.SystemRandom)) or (
        hasattr(type(value), "__next__") and not is_plain(type(value)) and spoken(value) is MISSING)


def package(name: str | None) -> str:
    """The first part of a module's name."""
    return (name or "").partition(".")[0]


def line_of(frame: FrameType | None) -> str:
    """``file.py:123`` of the innermost frame that is not PyTorch's own."""
    while frame is not None and package(frame.f_globals.get("__name__")) in ("torch", "xdit_compile"):
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}" if frame else ""


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
