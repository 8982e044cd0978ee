"""Patches of models as values that can be sent to other processes, and back.

A patch is a function or an object that ComfyUI's models call (`transformer_options["patches"]`, ...). An object of a
class that can be imported is its attributes; a function that can be imported is its name. A function made inside of
another one is refused, by its name and place: it can hold anything.

This file is imported in ComfyUI's process and in the ranks, where ``Reader`` is told whose modules may be named.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import importlib
import importlib.util
import os
import sys
import types
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

TAG = "\0xdit"
"""Key of a dictionary that stands for something else than itself."""
_PLAIN = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device, torch.Size)
_HEAP = 1 << 9
"""Flag of classes written in Python."""


class Unsendable(ValueError):
    """Something that cannot be sent to the ranks; says what, where it is, and what to do."""


def packed(value: Any, where: str = "") -> Any:
    """``value`` as tensors, numbers, texts, lists, tuples and dictionaries.

    Raises:
        Unsendable: naming what cannot be, and where it is.
    """
    try:
        return _Packer().of(value, where)
    except RecursionError:
        raise Unsendable(f"{where or 'an argument of the model'} holds a container that holds itself") from None


class _Packer:
    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, Any]] = {}
        self._uuids: dict[uuid.UUID, int] = {}

    def of(self, value: Any, where: str) -> Any:
        kind = type(value)
        if kind in _PLAIN or isinstance(value, (np.ndarray, np.generic)):
            return value
        if isinstance(value, nn.Parameter):
            return self._once(value, lambda: {"parameter": value.detach()})
        if isinstance(value, torch.Tensor):
            return value
        if kind in (list, tuple):
            return kind(self.of(v, f"{where}[{i}]") for i, v in enumerate(value))
        if kind is dict and TAG not in value:
            return {self._key(k, where): self.of(v, f"{where}[{k!r}]" if where else str(k)) for k, v in value.items()}
        if isinstance(value, uuid.UUID):
            # Each prompt makes new ones; which are the same is all that they say.
            return {TAG: "uuid", "number": self._uuids.setdefault(value, len(self._uuids))}
        if kind in (set, frozenset):
            return {TAG: kind.__name__, "items": [self.of(v, where) for v in sorted(value, key=repr)]}
        if isinstance(value, (type, types.FunctionType)):
            return {TAG: "named", **_name(value, value, where)}
        if isinstance(value, enum.Enum):
            return {TAG: "member", **_name(kind, value, where), "member": value.name}
        if isinstance(value, types.MethodType):
            return {TAG: "method", "of": self.of(value.__self__, f"{where}.__self__"), "member": value.__name__}
        if isinstance(value, functools.partial):
            return {TAG: "partial", "parts": self.of((value.func, value.args, dict(value.keywords)), where)}
        return self._object(value, where)

    def _object(self, value: Any, where: str) -> Any:
        """Of its attributes, and of what is in it if it is a dictionary."""
        cls = type(value)
        base = OrderedDict if isinstance(value, OrderedDict) else dict if isinstance(value, dict) else object
        inherited = [c for c in cls.__mro__ if c not in base.__mro__]
        if not hasattr(value, "__dict__") or any(not c.__flags__ & _HEAP or c.__dict__.get("__slots__")
                                                 for c in inherited):
            raise _unsendable(value, where)
        return self._once(value, lambda: {
            **_name(cls, value, where),
            "entries": [[self._key(k, where), self.of(v, f"{where}[{k!r}]")] for k, v in value.items()]
            if base is not object else [],
            "state": {k: self.of(v, f"{where}.{k}") for k, v in vars(value).items()}})

    def _once(self, value: Any, write: Callable[[], dict[str, Any]]) -> Any:
        """The same object twice is one object there too; it may lead to itself."""
        if id(value) in self._seen:
            return {TAG: "again", "number": self._seen[id(value)][0]}
        number = len(self._seen)
        self._seen[id(value)] = number, value
        return {TAG: "object", "number": number, **write()}

    def _key(self, key: Any, where: str) -> Any:
        if isinstance(key, (str, int, tuple, float, bool, type(None))):
            return key
        raise _unsendable(key, f"a key of {where}")


def _name(named: Any, value: Any, where: str) -> dict[str, str]:
    """Module and name by which another process finds a class or a function, and the file of the outermost package.

    Raises:
        Unsendable: it has none.
    """
    module, name = named.__module__, named.__qualname__
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is not named:
        raise _unsendable(value, where)
    # ComfyUI names the modules of custom nodes by their paths, in which there may be dots.
    parts = module.split(".")
    root = next(n for i in range(1, len(parts) + 1) if (n := ".".join(parts[:i])) in sys.modules)
    return {"module": module, "name": name, "root": root, "file": str(getattr(sys.modules[root], "__file__", ""))}


def _unsendable(value: Any, where: str) -> Unsendable:
    code = getattr(value, "__code__", None)
    place = f" ({code.co_filename}:{code.co_firstlineno})" if code is not None else ""
    named = value if hasattr(value, "__qualname__") else type(value)
    what = "a function made inside of another" if code is not None else "which is more than its attributes"
    return Unsendable(f"{where or 'an argument'} of the model is {named.__module__}.{named.__qualname__}{place}, "
                      f"{what}, and cannot go to the processes that run the model. Make it a function or an object "
                      "of a class at the top level of its module, leave the node out that sets it, or use ComfyUI's "
                      "own loader for this model")


class Sent:
    """Which patches the ranks have: those that stay as they are go once."""

    def __init__(self) -> None:
        self._quick: Any = None
        self._values: Any = None
        self._alive: Any = None
        self._number = 0

    def message(self, options: Mapping[str, Any], again: bool = False) -> dict[str, Any]:
        """What to send of ``transformer_options``; ``again``: all of it."""
        sent = packed(dict(options))
        fixed = {k: v for k, v in sent.items() if _holds_objects(v)}
        if fixed and (quick := _look(fixed, False)) != self._quick:
            # ComfyUI copies what is on a model: the same values in other memory are the same patches.
            values = _look(fixed, True)
            if values != self._values:
                self._number, again = self._number + 1, True
            self._quick, self._values, self._alive = quick, values, dict(options)
        return {"step": {k: v for k, v in sent.items() if k not in fixed}, "number": self._number if fixed else 0,
                "fixed": fixed if again and fixed else None}


def _holds_objects(value: Any) -> bool:
    if isinstance(value, dict):
        return value.get(TAG) not in (None, "uuid") or any(map(_holds_objects, value.values()))
    return isinstance(value, (list, tuple)) and any(map(_holds_objects, value))


def _look(value: Any, by_value: bool) -> Any:
    """What tells one state of patches from another; of tensors their memory and versions, or their values."""
    if isinstance(value, torch.Tensor):
        # ComfyUI makes most of its tensors in inference mode, where nobody counts what is written into them.
        where = _digest(value) if by_value or value.is_inference() else (value.data_ptr(), value._version)
        return "tensor", where, tuple(value.shape), value.dtype
    if isinstance(value, dict):
        return "dict", tuple((k, _look(v, by_value)) for k, v in value.items())
    if isinstance(value, np.ndarray):
        return "array", value.tobytes(), value.shape, str(value.dtype)
    return tuple(_look(v, by_value) for v in value) if isinstance(value, (list, tuple)) else value


def _digest(tensor: torch.Tensor) -> bytes:
    return hashlib.sha256(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data).digest()


class Reader:
    """Makes values of what ``packed`` made.

    Args:
        modules: packages whose classes and functions may be named; folders: whose files may be loaded (custom nodes).
    """

    def __init__(self, modules: Sequence[str], folders: Sequence[str]) -> None:
        self._modules, self._folders = tuple(modules), [Path(f).absolute() for f in folders]

    def __call__(self, value: Any, device: torch.device | None = None) -> Any:
        return _Unpacker(self, device).of(value)

    def named(self, module: str, name: str, root: str, file: str) -> Any:
        """A class or a function.

        Raises:
            Unsendable: of a module that may not be named.
        """
        if not any(module == m or module.startswith(f"{m}.") for m in self._modules):
            self._load(root, file)
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        if not isinstance(found, (type, types.FunctionType)):
            raise Unsendable(f"{module}.{name} is no class or function")
        return found

    def _load(self, root: str, file: str) -> None:
        path = Path(os.path.abspath(file))  # not where a link leads: ComfyUI names modules by where the link is
        if not any(folder in path.parents for folder in self._folders):
            raise Unsendable(f"{root} ({file}) is in none of the folders of custom nodes")
        if root not in sys.modules:
            spec = importlib.util.spec_from_file_location(root, path)
            assert spec is not None and spec.loader is not None
            sys.modules[root] = made = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(made)


class _Unpacker:
    def __init__(self, reader: Reader, device: torch.device | None) -> None:
        self._reader, self._device = reader, device
        self._made: dict[int, Any] = {}

    def of(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value if self._device is None else value.to(self._device)
        if isinstance(value, (list, tuple)):
            return type(value)(map(self.of, value))
        if not isinstance(value, dict):
            return value
        if TAG not in value:
            return {k: self.of(v) for k, v in value.items()}
        return getattr(self, f"_{value[TAG]}")(value)

    def _uuid(self, held: dict[str, Any]) -> uuid.UUID:
        return uuid.UUID(int=held["number"])

    def _set(self, held: dict[str, Any]) -> set[Any]:
        return set(map(self.of, held["items"]))

    def _frozenset(self, held: dict[str, Any]) -> frozenset[Any]:
        return frozenset(map(self.of, held["items"]))

    def _named(self, held: dict[str, Any]) -> Any:
        return self._reader.named(held["module"], held["name"], held["root"], held["file"])

    def _member(self, held: dict[str, Any]) -> Any:
        return self._named(held)[held["member"]]

    def _method(self, held: dict[str, Any]) -> Any:
        return getattr(self.of(held["of"]), held["member"])

    def _partial(self, held: dict[str, Any]) -> Any:
        function, args, keywords = self.of(held["parts"])
        return functools.partial(function, *args, **keywords)

    def _again(self, held: dict[str, Any]) -> Any:
        return self._made[held["number"]]

    def _object(self, held: dict[str, Any]) -> Any:
        if "parameter" in held:
            made = self._made[held["number"]] = nn.Parameter(self.of(held["parameter"]), requires_grad=False)
            return made
        cls = self._named(held)
        made = self._made[held["number"]] = cls.__new__(cls)
        for key, value in held["entries"]:
            made[key] = self.of(value)
        # Not by setattr, which modules answer in their own way.
        vars(made).update({k: self.of(v) for k, v in held["state"].items()})
        return made
