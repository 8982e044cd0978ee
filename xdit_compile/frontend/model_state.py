"""What of a model, and of all else that its forward read, a captured program depends on.

A program is made for a *description*: attributes of the model and of what these lead to, the code of its classes, the
globals that the code which ran names, and what all of these hold, by value. Computing it at each call would be slow.
With it comes a *watch*: the dictionaries, lists, cells and tensors that were looked into, and the identities of what
was in them. As long as these are the same, so is the description.
"""

from __future__ import annotations

import hashlib
import logging
import operator
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import _lru_cache_wrapper, partial
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from xdit_compile.errors import CaptureError
from xdit_compile.frontend.concrete_values import plain
from xdit_compile.frontend.looks import attributes_of
from xdit_compile.frontend.objects import (
    CAPTURES,
    MISSING,
    attributes,
    constants,
    content,
    elements,
    entries,
    is_leaf,
    is_library,
    is_plain,
    is_stream,
    links,
    namespace,
    package,
    slot,
    slots,
    spoken,
)
from xdit_compile.frontend.reads import Ran, Reads, resolve
from xdit_compile.frontend.state_watch import LookedInto, Watch, layout, values
from xdit_compile.ir.containers import CONSTANTS
from xdit_compile.ir.given_up import kind_of
from xdit_compile.ir.packed_tensors import is_packed, is_wrapper, metadata, parts
from xdit_compile.ir.released_parameters import device_of

_INTERNAL = frozenset(vars(nn.Module())) - {"training"} | {CAPTURES}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_UNREAD = _INTERNAL - {"_parameters", "_buffers", "_modules", *_HOOKS}
"""Attributes of modules in which nothing is looked for."""
_SWITCHES = frozenset({"_hf_peft_config_loaded"})
"""Attributes that are only asked whether they are true: unloading adapters leaves None where there was nothing."""
_LAYER = frozenset({"forward", "__call__", "_call_impl", "_wrapped_call_impl", "__getattr__"})
"""Functions of PyTorch's own classes that decide what a call computes."""
_FLAG = re.compile(r"(is|get|are)_\w+|\w+_enabled|initial_seed")
_NO_FLAG = re.compile(r"\w*(rng|grad|compiling|exporting|available)\w*")
"""Functions of PyTorch that tell how it is set, and those of this name that do not, or that captures decide."""
_LEVEL = frozenset({"isEnabledFor", "getEffectiveLevel", "level"})
"""Names by which code reads how much a logger tells."""
DEPTH = 100
ARGUMENT = "an argument of the call"


@dataclass(frozen=True)
class Description:
    """A value that is equal for equal states, and what tells cheaply that it would still be the same.

    Attributes:
        held: objects that count by identity; as long as they live no other object has it.
        streams: where values are that nobody can look at without changing them.
    """

    value: Hashable
    watch: Watch
    held: Mapping[int, Any]
    streams: Sequence[str]
    own: Mapping[int, int]
    """The model's tensors, by identity."""


def ambient() -> Hashable:
    """What of PyTorch's settings any forward depends on."""
    autocast = tuple((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda"))
    return autocast


def describe(model: nn.Module, reads: Reads | None = None, extra: Mapping[str, torch.Tensor] | None = None,
             others: Sequence[Any] = ()) -> Description:
    """The state of ``model``: changes when modules are added, removed or exchanged for others, when a parameter
    changes shape, dtype or device, and when a hook, a Python attribute or anything else changes that the code which
    ``reads`` recorded may read. Values of parameters and buffers of the model do not count: programs read them at each
    call, and so they do what is in ``extra``. Values of all other tensors do.

    Modules, objects and functions count by what they hold, so that a hook that is taken off and put on again, or an
    adapter that is loaded where one like it was, changes nothing.

    Args:
        extra: other tensors that a program reads at each call, by name.
        others: objects among the arguments of the call, which count as if they were attributes.
    """
    with plain():
        return _Walk(model, reads or Reads()).description(extra or {}, others)


def _look(tensor: torch.Tensor) -> tuple[Hashable, ...]:
    return kind_of(tensor), tensor.shape, tensor.dtype, device_of(tensor), layout(tensor)


class _Walk:
    """One look at everything."""

    def __init__(self, model: nn.Module, reads: Reads) -> None:
        self.reads = reads
        self.modules = list(model.modules())
        # Modules of the model go by their place in it, which children and references name.
        self.seen = {id(m): i for i, m in enumerate(self.modules)}
        self.held: dict[int, Any] = {}
        self.streams: list[str] = []
        self.into = LookedInto(self.modules)
        self.foreign_numbers: dict[int, int] = {}
        self.classes: dict[type, None] = {}
        self.spaces: dict[int, dict[str, Any]] = {}
        """Modules of Python that are reached as values, by their names."""
        self.named = reads.names()
        self.own: dict[int, int] = {}
        self.live: set[int] = set()

    def description(self, extra: Mapping[str, torch.Tensor], others: Sequence[Any]) -> Description:
        # What a program reads at each call may have any values, unless forward read them into Python.
        self.live = {id(t) for t in extra.values()} - {id(ref()) for ref in self.reads.valued}
        for m in self.modules:
            for group in (m._parameters, m._buffers):
                for t in group.values():
                    if t is not None:
                        self.own.setdefault(id(t), len(self.own))
                        self.into.tensors += [t] if not is_wrapper(t) else parts(t).values()
        found: list[Hashable] = [self._module(m, f"attribute {p}.") for p, m in zip(
            _paths(self.modules), self.modules, strict=True)]
        found += [(name, self.of(t, name)) for name, t in extra.items()]
        found += [self._globals(), tuple(map(self._other, others)), self._classes()]
        return Description(tuple(found), Watch(self.into), self.held, self.streams, self.own)

    def _other(self, value: Any) -> Hashable:
        held = self.of(value._value_, ARGUMENT) if isinstance(value, Enum) else None
        return self.of(value, ARGUMENT), held

    def _module(self, module: nn.Module, path: str) -> Hashable:
        state, groups = vars(module), (module._parameters, module._buffers, module._modules)
        self.classes[type(module)] = None
        self.into.states.append((operator.itemgetter(*(k for k in state if k not in _UNREAD)), state))
        for mapping in (*groups, *(state[h] for h in _HOOKS)):
            self.into.mappings[id(mapping)] = mapping
        # Two that are one tensor have one number.
        tensors = [(name, self.own[id(t)], *_look(t), self._named(t, f"{path}{name}")) for group in groups[:2]
                   for name, t in group.items() if t is not None]
        children = [(name, self.seen[id(m)]) for name, m in module._modules.items() if m is not None]
        # None reads the same wherever it is kept, and what is set anew comes last: order means nothing.
        rest = {k: None for group in groups if group for k, v in group.items() if v is None}
        rest |= {k: state[k] for k in state.keys() - _INTERNAL if k not in _SWITCHES or state[k]}
        described = [(k, self.of(rest[k], f"{path}{k}")) for k in sorted(rest)]
        inside = [(n, self.of(slot(m, module), f"{path}{n}")) for n, m in self._slots(module)]
        hooks = [self.of(h, f"a hook of {path}") for g in _HOOKS if state[g] for h in state[g].values()]
        return type(module), tuple(tensors), tuple(children), tuple(described), tuple(inside), tuple(hooks)

    def _named(self, tensor: torch.Tensor, path: str) -> Hashable:
        """Attributes of a tensor that code names; of a packed one all that it holds, and what its parts look like."""
        if not (state := vars(tensor)):
            return ()
        self.into.mappings[id(state)] = state
        if is_packed(tensor):
            held = {k: v for k, v in metadata(tensor).items() if not k.startswith("_")}
            return tuple((n, _look(p)) for n, p in parts(tensor).items()), tuple(
                (k, self.of(v, f"{path}.{k}")) for k, v in sorted(held.items()))
        return tuple((k, self.of(v, f"{path}.{k}")) for k, v in sorted(attributes_of(tensor, self.named).items()))

    def identity(self, value: Any) -> int:
        self.held[id(value)] = value
        return id(value)

    def of(self, value: Any, path: str, depth: int = 0) -> Hashable:
        """``path`` names the place of the value for people."""
        if constants(value):
            if type(value) is int and value in self.own and self.reads.asks_id():
                raise CaptureError(f"{path} holds the id() of a tensor of the model's, and the forward may ask for it; "
                                   "while the model is captured others stand in for its tensors. Use names instead")
            # 1, 1.0 and True are equal, but do not compute alike; nor do 0.0 and -0.0.
            return type(value), repr(value) if isinstance(value, (float, complex)) else value
        if is_leaf(value):
            return self.identity(value), self._told(value)
        if (space := namespace(value)) is not None:
            if not is_library(space.get("__name__")):
                self.spaces[id(space)] = space
            return self.identity(value)
        if isinstance(value, type):
            self.classes[value] = None
            return self.identity(value)
        if id(value) in self.seen:
            return "seen", self.seen[id(value)]
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if depth > DEPTH:
            self.streams.append(f"{path}, which lies more than {DEPTH} objects deep")
            return self.identity(value)
        if not isinstance(value, tuple):  # equal tuples may be one object or two
            self.seen[id(value)] = len(self.seen)
            self.held[id(value)] = value
        return self._parts(value, path, depth + 1)

    def _tensor(self, value: torch.Tensor) -> Hashable:
        if id(value) in self.own:
            return "parameter", self.own[id(value)]
        self.into.foreign[id(value)] = value
        if id(value) in self.live:
            return "constant", self.identity(value), value.dtype, value.shape, device_of(value), self._named(value, "")
        return "tensor", self.foreign_numbers.setdefault(id(value), len(self.foreign_numbers)), values(
            value), self._named(value, "")

    def _told(self, value: Any) -> Hashable:
        """What of a leaf can be read."""
        if isinstance(value, torch.Generator):
            ask: Callable[[], Any] = value.initial_seed
        elif isinstance(value, logging.Logger) and _LEVEL & self.named:
            ask = value.getEffectiveLevel
        else:
            return None
        self.into.getters.append(_Answer(ask))
        return ask()

    def _parts(self, value: Any, path: str, depth: int) -> Hashable:
        cls = type(value)
        self.classes[cls] = None

        def of(part: Any, name: str = "") -> Hashable:
            return self.of(part, f"{path}{name}", depth)

        if isinstance(value, FunctionType):
            return self._function(value, path, depth)
        if isinstance(value, _lru_cache_wrapper):
            self._include(value)
        linked = links(value)
        self.into.getters.extend(get for _, get in linked)
        held = tuple(of(get()) for _, get in linked)
        if linked and not isinstance(value, dict):
            return cls, held, self._attributes(value, of)
        if is_stream(value):
            self.streams.append(path)
            return self.identity(value)
        return cls, held, self._inside(value, of), self._attributes(value, of)

    def _inside(self, value: Any, of: Callable[..., Hashable]) -> Hashable:
        if isinstance(value, CONSTANTS):  # of a class of its own
            return repr(value)
        if (raw := content(value)) is not None:
            self.into.memory.append(value)
            looks = (value.dtype.str, value.shape) if isinstance(value, (np.ndarray, np.generic)) else ()
            return looks, hashlib.sha1(raw, usedforsecurity=False).digest() if len(raw) > 64 else raw
        if (held := entries(value)) is not None:
            self.into.mappings[id(value)] = held
            return tuple((of(k, "'s keys"), of(v, f"[{k!r}]"[:60])) for k, v in list(held.items()))
        if (listed := elements(value)) is not None:
            if not isinstance(value, (tuple, frozenset)):
                self.into.sequences[id(value)] = value
            parts = [of(v, f"[{i}]") for i, v in enumerate(listed)]
            # The order of a set is another on each rank, and may be another for the same elements.
            return frozenset(parts) if isinstance(value, (set, frozenset)) else tuple(parts)
        if is_plain(type(value)) or isinstance(value, nn.Module):
            return ()
        said = spoken(value)
        if said is MISSING:
            # More than its attributes, and nobody knows what.
            return self.identity(value)
        self.into.getters.append(_Answer(partial(_said, value)))
        return repr(said)

    def _attributes(self, value: Any, of: Callable[..., Hashable]) -> Hashable:
        found = attributes(value)
        if found is not None:
            self._mapping(value, found)
        skip = _INTERNAL if isinstance(value, nn.Module) else frozenset()
        named = [(k, of(v, f".{k}")) for k, v in list((found or {}).items()) if k not in skip]
        if isinstance(value, nn.Module):
            for group in (value._parameters, value._buffers, value._modules, *(vars(value)[h] for h in _HOOKS)):
                self.into.mappings[id(group)] = group
                named += [(k, of(v, f".{k}")) for k, v in group.items()]
            named.sort(key=lambda item: str(item[0]))
        return tuple(named), tuple((n, of(slot(m, value), f".{n}")) for n, m in self._slots(value))

    def _mapping(self, value: Any, found: dict[str, Any]) -> None:
        if type(value).__module__ == "_thread":  # another one in each thread
            self.into.getters.extend(partial(getattr, value, name, MISSING) for name in found)
        self.into.mappings[id(found)] = found

    def _slots(self, value: Any) -> Sequence[tuple[str, Any]]:
        found = slots(type(value))
        self.into.getters.extend(partial(slot, member, value) for _, member in found)
        return found

    def _function(self, value: FunctionType, path: str, depth: int) -> Hashable:
        # A hook that is taken off and put on again is another function of the same code around the same things.
        self.into.getters.append(partial(getattr, value, "__code__"))
        ran = id(value.__code__) in self.reads.codes
        parts = [self.of(get(), f"{path}'s defaults", depth) for _, get in links(value)]
        self.into.getters.extend(get for _, get in links(value))
        if ran or not is_library(value.__module__):
            parts += [self.of(cell, f"{path}'s {name}", depth) for cell, name in zip(
                value.__closure__ or (), value.__code__.co_freevars, strict=True)]
            self.into.mappings[id(vars(value))] = vars(value)
            parts += [(k, self.of(v, f"{path}.{k}", depth)) for k, v in vars(value).items()]
        return self.identity(value.__code__), id(value.__globals__), tuple(parts)

    def _include(self, value: Any) -> None:
        """What a remembered function would read counts, also when it was not run because its result was there."""
        function = value.__wrapped__
        if isinstance(function, FunctionType):
            self.reads.include(function)

    def _globals(self) -> Hashable:
        found: list[Hashable] = []
        done: set[tuple[int, tuple[str, ...]]] = set()
        for space in self.reads.namespaces():
            found.append(self.of(space, str(space["__name__"])))
        while True:  # functions that are remembered add to what there is to read
            fresh = [(ran, c) for ran, c in self.reads.chains() if (id(ran.globals), c) not in done]
            if not fresh:
                return tuple(found)
            for ran, chain in fresh:
                done.add((id(ran.globals), chain))
                found.append(self._chain(ran, chain))

    def _chain(self, ran: Ran, chain: tuple[str, ...]) -> Hashable:
        _, name, value = resolve(ran, chain)
        if ran.is_layer and not isinstance(value, (FunctionType, BuiltinFunctionType)):
            return chain
        self._watch_names(ran, chain)
        where = f"{'.'.join(chain)} in {ran.globals.get('__name__')}"
        functions = (FunctionType, BuiltinFunctionType)
        if ran.is_layer or (
                isinstance(value, functions) and is_library(getattr(value, "__module__", None))):
            return chain, self.identity(value), self._flag(name, value)
        return chain, self.of(value, where)

    def _watch_names(self, ran: Ran, chain: tuple[str, ...]) -> None:
        """Whether the chain of names leads to the same value, and through the same modules."""
        space = ran.globals
        for i, name in enumerate(chain):
            if name not in space:  # of Python itself
                break
            self.into.names.setdefault(id(space), (space, {}))[1][name] = None
            if i + 1 == len(chain):
                return
            if type(space[name]) is not ModuleType:  # perhaps one that makes its attributes
                break
            space = vars(space[name])
        self.into.getters.append(_Global(ran, chain))

    def _flag(self, name: str, value: Any) -> Hashable:
        """What a function of PyTorch answers that tells how it is set."""
        if not callable(value) or not _FLAG.fullmatch(name) or _NO_FLAG.fullmatch(name) or package(
                getattr(value, "__module__", None) or "torch") != "torch":
            return None
        try:
            answer = value()
        except Exception:  # it takes arguments, or asks for what is not there
            return None
        if not constants(answer):
            return None
        self.into.getters.append(_Answer(value))
        return type(answer), answer

    def _modules(self, done: set[Any]) -> Hashable:
        """Of each module that was reached as a value, what has a name that code has."""
        fresh = [space for key, space in self.spaces.items() if key not in done]
        done |= {id(space) for space in fresh}
        found: list[Hashable] = []
        for space in fresh:
            chosen = sorted(space.keys() & self.named)
            self.into.getters.extend(partial(space.get, n, MISSING) for n in chosen)
            found.append((id(space), *((n, self.of(space[n], f"{space.get('__name__')}.{n}")) for n in chosen)))
        return tuple(found)

    def _classes(self) -> Hashable:
        """Classes, and modules, are described last, when all that is looked into is known; they may lead to others."""
        found: list[Hashable] = []
        done: set[Any] = set()
        self.named = self.reads.names()
        while [s for s in self.spaces if s not in done] or [c for c in self._all_classes() if c not in done]:
            found.append(self._modules(done))
            fresh = [c for c in self._all_classes() if c not in done]
            for cls in dict.fromkeys(fresh):
                done.add(cls)
                if cls.__module__.startswith("torch.nn."):
                    chosen = {n: v for n, v in vars(cls).items() if n in _LAYER}
                elif is_library(cls.__module__):
                    continue
                else:
                    chosen = {n: v for n, v in vars(cls).items() if self._is_read(n, v, self.named)}
                self.into.getters.extend(partial(vars(cls).get, n) for n in chosen)
                where = f"{cls.__module__}.{cls.__qualname__}"
                found.append((self.identity(cls), *((n, self.of(v, f"{where}.{n}")) for n, v in chosen.items())))
        return tuple(found)

    def _all_classes(self) -> list[Any]:
        kinds = [kind for cls in self.classes for kind in (cls, type(cls))]
        return [c for kind in kinds for c in type.mro(kind)]

    def _is_read(self, name: str, value: Any, named: set[str]) -> bool:
        if name in ("__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "_abc_impl", "__slots__",
                    "__class__", "__qualname__", "__static_attributes__", "__firstlineno__"):
            return False
        if isinstance(value, FunctionType):
            return name in named or name == "forward" or id(value.__code__) in self.reads.codes or (
                name.startswith("__") and name.endswith("__") and name != "__init__")
        return not name.startswith("__")


@dataclass(frozen=True)
class _Answer:
    """What a function answers. Equal answers are one object."""

    function: Callable[[], Any]
    _known: dict[Hashable, Any] = field(default_factory=dict)

    def __call__(self) -> Any:
        answer = self.function()
        return self._known.setdefault((type(answer), answer), answer)


@dataclass(frozen=True)
class _Global:
    """A global by the chain of names that code reads it by."""

    ran: Ran
    chain: tuple[str, ...]

    def __call__(self) -> Any:
        return resolve(self.ran, self.chain)[2]


def _said(value: Any) -> str:
    return repr(spoken(value))


def _paths(modules: Sequence[nn.Module]) -> list[str]:
    """The path of each of a model's modules; the first is the model."""
    paths = {id(m): p for p, m in modules[0].named_modules()}
    return [paths[id(m)] for m in modules]
