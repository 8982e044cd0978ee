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
from contextvars import ContextVar
from dataclasses import dataclass
from functools import _lru_cache_wrapper, partial
from types import CellType, CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from xdit_compile.frontend.objects import (
    CAPTURES,
    MISSING,
    attributes,
    cell_content,
    constants,
    content,
    elements,
    entries,
    is_leaf,
    is_library,
    is_stream,
    links,
    namespace,
    package,
    put_content,
    random_state,
    slot,
    slots,
    spoken,
)
from xdit_compile.frontend.reads import Ran, names_of, namespaces_of, resolve

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
        self._spaces: dict[int, tuple[dict[str, Any], str]] = {}
        """Names of modules of Python that code reaches as values."""
        self._named: set[str] = set()
        """Names of attributes in code that ran."""
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
            space = namespace(space)
            path = f"the global {'.'.join(chain)} of {module}"
            if space is not None and (name in space or name in names.stored or is_library(space.get("__name__"))):
                self._note((id(space), name), _Note(path, {"": space.get(name, MISSING)}, partial(_get, space, name),
                                                    partial(_set, space, name), (id(space), name), "{path}"))
            self.note_all([(value, path)])
        fresh, self._named = names.attributes - self._named, self._named | names.attributes
        self.note_all([(space[n], f"{path}.{n}") for space, path in [*self._spaces.values()]
                       for n in space.keys() & fresh])
        self.note_all([(space, str(space["__name__"])) for space in namespaces_of(ran)])
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
            if constants(value) or id(value) in self._seen:
                continue
            if (state := random_state(value)) is not None:
                self._note(id(value), _random_note(value, path, *state))
            if is_leaf(value):
                continue
            self._seen[id(value)] = value
            queue += self._parts(value, path)

    def _note(self, key: Any, note: _Note) -> None:
        self._notes.setdefault(key, note)

    def _parts(self, value: Any, path: str) -> list[tuple[Any, str]]:
        """Notes down a value, and gives what it leads to."""
        if isinstance(value, type):
            return self._class(value)
        if (space := namespace(value)) is not None:
            return self._space(space)
        if isinstance(value, FunctionType) and is_library(value.__module__):
            return []
        linked = [(get(), f"{path}{name}") for name, get in links(value)]
        if isinstance(value, _lru_cache_wrapper):
            self._caches[id(value)] = value, value.cache_info().misses
        if isinstance(value, FunctionType):
            cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
            over = [(cell, f"{name}, closed over by {value.__qualname__}") for name, cell in cells]
            return [*linked, (vars(value), path), *over]
        if isinstance(value, (CellType, ContextVar)):
            read, write = (partial(_cell, value), partial(_fill, value)) if isinstance(value, CellType) else (
                partial(_context, value), partial(_set_context, value))
            self._note(id(value), _Note(path, read(), read, write, value, "{path}"))
        if linked and not isinstance(value, dict):
            return linked
        found = linked if isinstance(value, torch.Tensor) else [*linked, *self._contents(value, path)]
        attrs = attributes(value)
        if attrs is not None:
            skip = _STATIC if isinstance(value, nn.Module) else frozenset()
            hooks = ("_forward_hooks", "_forward_pre_hooks") if skip else ()
            # While a model is captured, hooks are observed: what stands in for one has it.
            found += [(getattr(hook, "hook", hook), f"a hook of {path}") for h in hooks for hook in attrs[h].values()]
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

    def _space(self, space: dict[str, Any]) -> list[tuple[Any, str]]:
        """A module that code reaches as a value: any of its names may be written, those that code has may be read."""
        name = str(space.get("__name__"))
        if is_library(name) or id(space) in self._spaces:
            return []
        self._spaces[id(space)] = space, name
        read = partial(_of_space, space)
        self._note(id(space), _Note(name, read(), read, partial(_set_space, space), space))
        return [(space[n], f"{name}.{n}") for n in space.keys() & self._named]

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
        return [*found, (type(cls), "")]

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

    def effects(self, values: Mapping[Key, Any]) -> list[Callable[[], None]]:
        """What puts these values into their places, as the forward does that was noted."""
        by_owner: dict[int, dict[Any, Any]] = {}
        for (owner, name), value in values.items():
            by_owner.setdefault(owner, {})[name] = value
        return [partial(_put_into, note, by_owner[id(note.owner)]) for note in self._notes.values()
                if id(note.owner) in by_owner]


def _put_into(note: _Note, made: dict[Any, Any]) -> None:
    now = note.read()
    if not all(_is(now.get(name, MISSING), value) for name, value in made.items()):
        note.write(now | made)


def _random_state() -> tuple[Any, Any]:
    name, keys, *rest = np.random.get_state()
    return random.getstate(), (name, tuple(np.asarray(keys).tolist()), *rest)


def _is(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and constants(a) and bool(a == b))


def _get(space: dict[str, Any], name: str) -> dict[Any, Any]:
    value = space.get(name, MISSING)
    # A module becomes an attribute of another when it is imported.
    return {"": MISSING if isinstance(value, ModuleType) else value}


def _set(space: dict[str, Any], name: str, before: dict[Any, Any]) -> None:
    if before[""] is MISSING:
        space.pop(name, None)
    else:
        space[name] = before[""]


def _cell(cell: CellType) -> dict[Any, Any]:
    held = cell_content(cell)
    return {} if held is MISSING else {"": held}


def _fill(cell: CellType, before: dict[Any, Any]) -> None:
    if before:
        cell.cell_contents = before[""]
    else:
        del cell.cell_contents


def _context(variable: ContextVar[Any]) -> dict[Any, Any]:
    return {"": variable.get(MISSING)}


def _set_context(variable: ContextVar[Any], before: dict[Any, Any]) -> None:
    if before[""] is not MISSING:  # else it is set in this context alone, which captures leave
        variable.set(before[""])


def _of_space(space: dict[str, Any]) -> dict[Any, Any]:
    return {k: v for k, v in space.items() if not isinstance(v, ModuleType) and not k.startswith("__")}


def _set_space(space: dict[str, Any], before: dict[Any, Any]) -> None:
    for name in _of_space(space).keys() - before.keys():
        del space[name]
    space.update(before)


def _random_note(value: Any, path: str, get: Callable[[], Any], put: Callable[[Any], None]) -> _Note:
    states: dict[str, Any] = {}

    def read() -> dict[Any, Any]:
        said = repr(state := get())
        states[said] = state
        return {"": said}

    return _Note(path, read(), read, lambda before: put(states[before[""]]), value, "{path}")


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
