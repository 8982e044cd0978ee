"""Tracing leaves no trace: what a forward changes beside its results is found, and put back as it was.

Before code runs, all that can be reached from the model, from the globals that the code names and from the cells of its
functions is noted down, one level at a time: what a dictionary, a list, an object or a cell held. Afterwards what holds
something else was written by forward.
"""

from __future__ import annotations

import random
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import _lru_cache_wrapper, partial
from types import CellType, CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

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
    is_stream,
    package,
    put_content,
    slot,
    slots,
    spoken,
)
from xdit_compile.frontend.reads import Ran, names_of, resolve

_STATIC = frozenset(vars(nn.Module())) - {"training", "_parameters", "_buffers", "_modules"} | {CAPTURES}
"""Attributes that every module has; no forward changes them, and there are many."""
_LARGEST = 1 << 24
"""Bytes of an array up to which it is noted down."""

Key = tuple[int, Any]


@dataclass(frozen=True)
class Change:
    """What was in a place before, and is now; MISSING for nothing. ``path`` and ``name`` tell the place to people."""

    path: str
    name: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return readable(self.path)


def readable(path: str) -> str:
    """As people write it: modules, parameters and buffers are attributes."""
    return re.sub(r"_(?:modules|buffers|parameters)\['([^']*)'\]", r"\1", path)


@dataclass(frozen=True)
class _Note:
    """What a container held: ``read`` gives its parts by name, ``write`` puts all of them back."""

    path: str
    before: dict[Any, Any]
    read: Callable[[], dict[Any, Any]]
    write: Callable[[dict[Any, Any]], None]
    owner: Any
    form: str = "{path}.{name}"

    def changes(self) -> dict[Key, Change]:
        now = self.read()
        if now.keys() == self.before.keys() and all(map(_is, now.values(), self.before.values())) and (
                list(now) == list(self.before)):
            return {}
        names = [k for k in (self.before | now) if not _is(now.get(k, MISSING), self.before.get(k, MISSING))]
        return {(id(self.owner), k): Change(self.form.format(path=self.path, name=k).lstrip("."), str(k),
                                            self.before.get(k, MISSING), now.get(k, MISSING)) for k in names}

    def restore(self) -> None:
        self.write(self.before)


class Before:
    """How things were: ``note`` what a forward can reach, run it, then ask for ``changes`` or ``restore`` all."""

    def __init__(self) -> None:
        self._notes: dict[Any, _Note] = {}
        self._caches: dict[int, tuple[Any, int]] = {}
        self._seen: dict[int, Any] = {}
        self.tensors: dict[int, str] = {}
        """Where tensors are, by identity."""
        self._inner: set[int] = set()
        """Code of functions that are made while others run."""
        self._random = _random_state()

    def knows(self, value: Any) -> bool:
        """Whether this object was noted down: no forward made it."""
        return id(value) in self._seen

    def note_model(self, model: nn.Module, *others: Any) -> None:
        """All that the model's modules, their classes and the ``others``, arguments of its call, lead to."""
        modules = [(m, path) for path, m in model.named_modules()]
        self._seen |= {id(m): m for m, _ in modules}
        self.note_all([part for m, path in modules for part in self._parts(m, path)])
        self.note_all([(value, "an argument of the call") for value in others])

    def note_frame(self, frame: FrameType) -> None:
        """What code that is about to run can reach beside its arguments."""
        ran = Ran(frame.f_code, frame.f_globals)
        module = frame.f_globals.get("__name__")
        if ran.is_layer:
            return
        names = names_of(frame.f_code)
        for chain in [*names.chains, *((n,) for n in names.stored)]:
            space, name, value = resolve(ran, chain)
            space = vars(space) if isinstance(space, ModuleType) else space
            path = f"the global {'.'.join(chain)} of {module}"
            if not is_library(space.get("__name__")) and (name in space or name in names.stored):
                self._note((id(space), name), _Note(path, {"": space.get(name, MISSING)}, partial(_get, space, name),
                                                    partial(_set, space, name), (id(space), name), "{path}"))
            self.note_all([(value, path)])
        self._inner |= {id(c) for c in frame.f_code.co_consts if isinstance(c, CodeType)}
        held = [] if id(frame.f_code) in self._inner else [*frame.f_code.co_freevars]
        for name in held:  # what a function made just now closes over is no older
            value = frame.f_locals.get(name, MISSING)
            self.note_all([(value, f"{name}, closed over by {frame.f_code.co_name} of {module}")])
        for first in frame.f_code.co_varnames[: min(frame.f_code.co_argcount, 1)]:
            if isinstance(cls := frame.f_locals.get(first), type):
                self.note_all([(cls, "")])

    def note_all(self, found: Iterable[tuple[Any, str]]) -> None:
        queue = deque(found)  # near ones first, which gives short names
        while queue:
            value, path = queue.popleft()
            if isinstance(value, torch.Tensor):
                self.tensors.setdefault(id(value), path)
            if constants(value) or isinstance(value, torch.Tensor) or id(value) in self._seen or is_leaf(value):
                continue
            self._seen[id(value)] = value
            queue += self._parts(value, path)

    def _note(self, key: Any, note: _Note) -> None:
        self._notes.setdefault(key, note)

    def _parts(self, value: Any, path: str) -> list[tuple[Any, str]]:
        """Notes down a value, and gives what it leads to."""
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, _lru_cache_wrapper):
            self._caches[id(value)] = value, value.cache_info().misses
            return [(value.__wrapped__, path)]
        if isinstance(value, FunctionType):
            cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
            if is_library(value.__module__):
                return []
            over = [(cell, f"{name}, closed over by {value.__qualname__}") for name, cell in cells]
            return [(vars(value), path), *over]
        if isinstance(value, CellType):
            self._note(id(value), _Note(path, _cell(value), partial(_cell, value), partial(_fill, value), value,
                                        "{path}"))
            return [(v, path) for v in _cell(value).values()]
        if isinstance(value, (partial, MethodType, property, staticmethod, classmethod)):
            names = ("func", "args", "keywords", "__func__", "__self__", "fget")
            return [(getattr(value, n, None), path) for n in names]
        found = self._contents(value, path)
        attrs = attributes(value)
        if attrs is not None:
            skip = _STATIC if isinstance(value, nn.Module) else frozenset()
            read = partial(_without, attrs, skip)
            self._note(id(attrs), _Note(path, read(), read, partial(_update, attrs, skip), attrs))
            self._seen[id(attrs)] = attrs
            found += [(v, f"{path}.{k}".lstrip(".")) for k, v in attrs.items() if k not in skip]
        for name, member in slots(type(value)):
            held = slot(member, value)
            self._note((id(value), name), _Note(path, {name: held}, partial(_slot, name, member, value),
                                                partial(_put, member, value, name), (id(value), name)))
            found.append((held, f"{path}.{name}".lstrip(".")))
        if package(type(value).__module__) != "torch":
            found.append((type(value), ""))
        return found

    def _contents(self, value: Any, path: str) -> list[tuple[Any, str]]:
        form = "{path}[{name!r}]"
        if (raw := content(value)) is not None:
            if len(raw) <= _LARGEST:
                self._note(id(value), _Note(path, {"": raw}, lambda: {"": content(value)},
                                            lambda b: put_content(value, b[""]), value, "{path}"))
            return []
        if isinstance(value, dict):
            self._note(id(value), _Note(path, dict(dict.items(value)), lambda: dict(dict.items(value)),
                                        partial(_refill, value), value, form))
        elif isinstance(value, (list, deque, set)):
            self._note(id(value), _Note(path, _numbered(value), partial(_numbered, value), partial(_relist, value),
                                        value, form))
        elif (said := spoken(value)) is not MISSING and entries(value) is None and elements(value) is None:
            self._note(id(value), _Note(path, {"": repr(said)}, lambda: {"": repr(spoken(value))}, lambda b: None,
                                        value, "{path}"))
        elif is_stream(value) and hasattr(value, "gi_frame"):
            read = lambda: {"": None if value.gi_frame is None else value.gi_frame.f_lasti}  # noqa: E731
            self._note(id(value), _Note(path, read(), read, lambda b: None, value, "{path}"))
        if (held := entries(value)) is not None:
            return [(v, f"{path}[{k!r}]"[:120]) for k, v in list(held.items())]
        return [(v, f"{path}[{i}]") for i, v in enumerate(elements(value) or ())]

    def _class(self, cls: type) -> list[tuple[Any, str]]:
        found: list[tuple[Any, str]] = []
        for c in cls.__mro__:
            if (id(c) in self._seen and c is not cls) or is_library(c.__module__):
                continue
            self._seen[id(c)] = c
            path = f"{c.__module__}.{c.__qualname__}"
            read = partial(_of_class, c)
            self._note(id(c), _Note(path, read(), read, partial(_set_class, c), c))
            found += [(v, f"{path}.{k}") for k, v in vars(c).items()]
        return found

    def changes(self) -> dict[Key, Change]:
        """Places that hold something else than they did."""
        found: dict[Key, Change] = {}
        for note in self._notes.values():
            found |= note.changes()
        if _random_state() != self._random:
            found[0, "random"] = Change("the random numbers of Python or numpy", "random", MISSING, MISSING)
        return found

    def restore(self) -> dict[Key, Change]:
        """Put everything back; what had changed. Objects that can only say what they hold stay changed."""
        found = self.changes()
        for note in self._notes.values():
            if note.changes():
                note.restore()
        if (0, "random") in found:
            random.setstate(self._random[0])
            np.random.set_state(self._random[1])
        for cached, misses in self._caches.values():
            # What was remembered meanwhile may be fake.
            if cached.cache_info().misses != misses:
                cached.cache_clear()
                self._caches[id(cached)] = cached, 0
        return found


    def put(self, values: Mapping[Key, Any]) -> None:
        """Fill places that were empty: tables that forward makes once. MISSING leaves one empty."""
        for note in self._notes.values():
            now = note.read()
            made = {name: value for (owner, name), value in values.items()
                    if owner == id(note.owner) and name not in now and value is not MISSING}
            if made:
                note.write(now | made)


def _random_state() -> tuple[Any, Any]:
    name, keys, *rest = np.random.get_state()
    return random.getstate(), (name, tuple(np.asarray(keys).tolist()), *rest)


def _is(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and constants(a) and bool(a == b))


def _get(space: dict[str, Any], name: str) -> dict[Any, Any]:
    return {"": space.get(name, MISSING)}


def _set(space: dict[str, Any], name: str, before: dict[Any, Any]) -> None:
    if before[""] is MISSING:
        space.pop(name, None)
    else:
        space[name] = before[""]


def _cell(cell: CellType) -> dict[Any, Any]:
    try:
        return {"": cell.cell_contents}
    except ValueError:  # nothing was assigned yet
        return {}


def _fill(cell: CellType, before: dict[Any, Any]) -> None:
    if before:
        cell.cell_contents = before[""]
    else:
        del cell.cell_contents


def _slot(name: str, member: Any, value: Any) -> dict[Any, Any]:
    return {name: slot(member, value)}


def _put(member: Any, value: Any, name: str, before: dict[Any, Any]) -> None:
    if before[name] is MISSING:
        member.__delete__(value)
    else:
        member.__set__(value, before[name])


def _without(attrs: dict[str, Any], skip: frozenset[str]) -> dict[Any, Any]:
    return {k: v for k, v in attrs.items() if k not in skip}


def _update(attrs: dict[str, Any], skip: frozenset[str], before: dict[Any, Any]) -> None:
    for name in [k for k in attrs if k not in skip and k not in before]:
        del attrs[name]
    attrs.update(before)


def _refill(value: dict[Any, Any], before: dict[Any, Any]) -> None:
    # The base class's own methods: a frozen dictionary refuses its own.
    dict.clear(value)
    dict.update(value, before)


def _numbered(value: Any) -> dict[Any, Any]:
    return dict(enumerate(elements(value) or ()))


def _relist(value: Any, before: dict[Any, Any]) -> None:
    if isinstance(value, list):
        list.__setitem__(value, slice(None), [*before.values()])
    elif isinstance(value, set):
        set.clear(value)
        set.update(value, before.values())
    else:
        deque.clear(value)
        deque.extend(value, before.values())


def _of_class(cls: type) -> dict[Any, Any]:
    return {k: v for k, v in vars(cls).items() if not k.startswith("__") and k != "_abc_impl"}


def _set_class(cls: type, before: dict[Any, Any]) -> None:
    for name in _of_class(cls).keys() - before.keys():
        delattr(cls, name)
    for name, value in before.items():
        if vars(cls).get(name, MISSING) is not value:
            setattr(cls, name, value)
