"""When are two modules the same code over different weights? When their fingerprints are equal.

A fingerprint holds everything a module's forward can read: types, Python attributes, shapes and dtypes of
parameters and buffers, hooks, children; only the *values* of parameters and buffers are left out, and whether they
require gradients, which the log of what blocks ask tells (``operator_log.py``). What cannot be compared by value counts
by identity, so that doubt makes modules different, never equal. Numbers and names that tell blocks apart, such as a
block's own place, may be left out too: what a block then does tells whether they matter.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch

from xdit_compile.frontend.looks import attributes_of
from xdit_compile.frontend.objects import CAPTURES, cell_content, content, slot, slots
from xdit_compile.ir.containers import CONSTANTS
from xdit_compile.ir.given_up import kind_of
from xdit_compile.ir.packed_tensors import is_packed, metadata, parts
from xdit_compile.ir.released_parameters import device_of

Attribute = tuple[type, str]
"""An attribute of the objects of a class."""


def fingerprint(module: torch.nn.Module, unread: frozenset[Attribute] = frozenset()) -> Hashable:
    """A hashable value, equal for modules that one captured graph can serve, which does not read ``unread``."""
    return _Description(unread).of(module)


def apart(modules: Sequence[torch.nn.Module]) -> frozenset[Attribute]:
    """Attributes that alone tell some of these modules from each other: numbers and names, of theirs and of what is
    in them."""
    groups: dict[Hashable, list[list[tuple[Attribute, Any]]]] = {}
    for module in modules:
        loose = _Description(None)
        groups.setdefault(loose.of(module), []).append(loose.constants)
    return frozenset(mine[0] for first, *others in groups.values() for other in others
                     for mine, theirs in zip(first, other, strict=True) if repr(mine[1]) != repr(theirs[1]))


def telling_apart(model: torch.nn.Module) -> frozenset[Attribute]:
    """Attributes that alone keep neighbours in a container of ``model`` from being identical."""
    found: frozenset[Attribute] = frozenset()
    for module in model.modules():
        if isinstance(module, (torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.Sequential)):
            children = [c for c in module.children() if next(c.children(), None)]
            if len({fingerprint(c) for c in children}) > 1:
                found |= apart(children)
    return found


def meta(tensor: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device]:
    """What a static graph assumes of a tensor."""
    return tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, device_of(tensor)


class _Description:
    """Describes objects, without attributes that are ``unread``; None: without any that hold a constant."""

    def __init__(self, unread: frozenset[Attribute] | None) -> None:
        self._unread = unread
        self._seen: dict[int, tuple[int, Any]] = {}
        self.constants: list[tuple[Attribute, Any]] = []
        """Those that were left out, in order, where all are."""

    def of(self, value: Any) -> Hashable:
        if isinstance(value, CONSTANTS):
            return type(value), value
        if isinstance(value, (torch.Tensor, type, BuiltinFunctionType)) or (
                isinstance(value, FunctionType) and not value.__closure__):
            return type(value), id(value)
        if isinstance(value, MethodType):
            return self.of(value.__func__), self.of(value.__self__)
        if isinstance(value, partial):
            return self.of(value.func), self.of(value.args), self.of(value.keywords), self.of(vars(value))
        if id(value) in self._seen:
            return "seen", self._seen[id(value)][0]
        # The object is kept with its number: once freed, another could have its id.
        self._seen[id(value)] = len(self._seen), value
        if isinstance(value, FunctionType):  # made anew for each module, around what it is made for
            around = tuple(self.of(cell_content(cell)) for cell in value.__closure__ or ())
            return id(value.__code__), id(value.__globals__), around, self.of(
                [value.__defaults__, value.__kwdefaults__, vars(value)])
        if isinstance(value, torch.nn.Module):
            state = [(n, None if t is None else self._tensor(t)) for group in (value._parameters, value._buffers)
                     for n, t in group.items()]
            return type(value), tuple(state), self._attributes(value, ("_parameters", "_buffers", CAPTURES))
        if (raw := content(value)) is not None:
            return type(value), raw, str(getattr(value, "dtype", "")), getattr(value, "shape", ())
        if named := slots(type(value)):
            held = {n: slot(m, value) for n, m in named}
            return type(value), self.of(held), self.of(getattr(value, "__dict__", None))
        if isinstance(value, Mapping):
            return type(value), tuple((self.of(k), self.of(v)) for k, v in value.items())
        if isinstance(value, (set, frozenset)):
            return type(value), frozenset(self.of(v) for v in value)
        if isinstance(value, Iterable) and hasattr(value, "__len__"):
            return type(value), tuple(self.of(v) for v in value)
        if type(value).__module__ != "builtins" and hasattr(value, "__dict__"):
            return type(value), self._attributes(value)
        return type(value), id(value)

    def _tensor(self, tensor: torch.Tensor) -> Hashable:
        """A parameter or a buffer: all but its values, and which others it is."""
        number = self._seen.setdefault(id(tensor), (len(self._seen), tensor))[0]
        own = attributes_of(tensor)
        looks = (meta(tensor), kind_of(tensor), number)
        if is_packed(tensor):
            inner = tuple((name, meta(part)) for name, part in parts(tensor).items())
            return looks, inner, self.of({k: v for k, v in metadata(tensor).items() if not k.startswith("_")})
        return *looks, self.of(own) if own else None

    def _attributes(self, value: Any, without: tuple[str, ...] = ()) -> Hashable:
        found: list[tuple[str, Hashable]] = []
        for name, held in vars(value).items():
            if name in without or (self._unread is not None and (type(value), name) in self._unread):
                continue
            if self._unread is None and isinstance(held, CONSTANTS):
                self.constants.append(((type(value), name), held))
                found.append((name, None))
            else:
                found.append((name, self.of(held)))
        return tuple(found)
