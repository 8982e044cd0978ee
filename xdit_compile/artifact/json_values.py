"""Calls as JSON: signatures, nests of containers, types and sizes. Reading makes no object of a class that a file
names, unless this process knows the class already as one of results."""

from __future__ import annotations

import dataclasses
import inspect
import keyword
import math
import re
import sys
from collections import OrderedDict
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch.utils import _pytree as pytree

from xdit_compile.artifact.entries import LARGEST_NUMBER, Entry
from xdit_compile.errors import ArtifactError
from xdit_compile.ir.pytree import TENSOR, Structure, flatten

Json = Any
Look = tuple[tuple[int, ...], torch.dtype]
"""Shape and type of a tensor."""
DEEPEST = 32
"""Containers inside of containers."""
MOST_DIMENSIONS = 32
_PLAIN = (bool, int, float, str, type(None))
_DEVICE = re.compile(r"(cpu|cuda|meta)(:[0-9]{1,3})?")


class Fields(OrderedDict[str, Any]):
    """Entries by key and as attributes, as a model's configuration has them."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Result(Fields):
    """What a model returned: fields by number too, as outputs of diffusers have them."""

    def __getitem__(self, key: Any) -> Any:
        return tuple(self.values())[key] if isinstance(key, (int, slice)) else super().__getitem__(key)


pytree.register_pytree_node(
    Result, lambda r: (list(r.values()), tuple(r)), lambda values, names: Result(zip(names, values, strict=True)),
    serialized_type_name="xdit_compile.artifact.Result")


# Types and constants


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_of(entry: Entry) -> torch.dtype:
    found = vars(torch).get(entry.text())
    if not isinstance(found, torch.dtype):
        raise entry.wrong("type of tensors")
    return found


def constant_json(value: Any) -> Json:
    """Raises ArtifactError for what is no number, text, type or device."""
    if isinstance(value, _PLAIN):
        return {"value": value} if value == value and value not in (float("inf"), -float("inf")) else {
            "float": repr(value)}
    if isinstance(value, torch.dtype):
        return {"dtype": dtype_name(value)}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    raise ArtifactError(f"a {type(value).__qualname__} cannot be written into an artifact")


def constant_of(entry: Entry) -> Any:
    ((kind, held),) = entry.items() if isinstance(entry.value, dict) and len(entry.value) == 1 else [("", entry)]
    if kind == "value" and isinstance(held.value, _PLAIN) and not (
            isinstance(held.value, float) and not math.isfinite(held.value)):
        return held.text() if isinstance(held.value, str) else held.value
    if kind == "float" and held.text() in ("inf", "-inf", "nan"):
        return float(held.value)
    if kind == "dtype":
        return dtype_of(held)
    if kind == "device" and _DEVICE.fullmatch(held.text()):
        return torch.device(held.value)
    raise entry.wrong("constant")


# Containers


def structure_json(structure: Structure) -> Json:
    """Raises ArtifactError for containers that are neither tuples, lists, dictionaries nor outputs of a model."""
    return _tree(structure.spec, iter(structure.constants))


def _tree(spec: pytree.TreeSpec, leaves: Any) -> Json:
    if spec.is_leaf():
        leaf = next(leaves)
        return "tensor" if leaf is TENSOR else constant_json(leaf)
    parts = [_tree(child, leaves) for child in spec.children()]
    cls: Any = spec.type
    if cls in (tuple, list):
        return {cls.__name__: parts}
    if cls is dict:
        return {"dict": [[k, p] for k, p in zip(_names(spec.context), parts, strict=True)]}
    if issubclass(cls, OrderedDict) and dataclasses.is_dataclass(cls):
        name = f"{cls.__module__}:{spec.type.__qualname__}"
        return {"output": name, "fields": [[k, p] for k, p in zip(_names(spec.context), parts, strict=True)]}
    raise ArtifactError(f"a {cls.__qualname__} cannot be written into an artifact: only tuples, lists, dictionaries "
                    "and outputs of models can")


def _names(context: Any) -> list[str]:
    if not all(isinstance(k, str) for k in context):
        raise ArtifactError("dictionaries whose keys are no texts cannot be written into an artifact")
    return list(context)


def structure_of(entry: Entry) -> Structure:
    leaves, spec = pytree.tree_flatten(_template(entry))
    return Structure(spec, tuple(leaves))


def _template(entry: Entry, depth: int = 0) -> Any:
    if depth > DEEPEST:
        raise ArtifactError(f"{entry.where[:500]} is nested more than {DEEPEST} times")
    if entry.value == "tensor":
        return TENSOR
    if "output" in entry:
        fields = _fields(entry["fields"], depth)
        cls = _known(entry["output"].text(), fields)
        try:
            return cls(**fields) if cls else Result(fields)
        except Exception as error:
            raise ArtifactError(f"{entry.where} cannot be made: {error}") from error
    if "dict" in entry:
        return _fields(entry["dict"], depth)
    for kind in (tuple, list):
        if kind.__name__ in entry:
            return kind(_template(part, depth + 1) for part in entry[kind.__name__].parts())
    return constant_of(entry)


def _fields(entry: Entry, depth: int) -> dict[str, Any]:
    """Entries of a dictionary, in order."""
    pairs = [part.parts(2) for part in entry.parts()]
    made = {name.text(): _template(value, depth + 1) for name, value in pairs}
    if len(made) != len(pairs):
        raise ArtifactError(f"{entry.where} has a key twice")
    return made


def _known(name: str, fields: Mapping[str, Any]) -> Any:
    """The class of results of this name, if its module is loaded anyhow. Nothing is imported for it: modules that load
    what they are asked for are not asked."""
    module, _, path = name.partition(":")
    loaded = sys.modules.get(module)
    cls: Any = vars(loaded).get(path) if isinstance(loaded, ModuleType) else None
    fits = isinstance(cls, type) and issubclass(cls, OrderedDict) and dataclasses.is_dataclass(cls)
    names = {f.name for f in dataclasses.fields(cls)} if fits else set()
    needed = {f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING} if (
        fits) else set()
    return cls if fits and needed <= fields.keys() <= names else None


# Signatures


def signature_json(signature: inspect.Signature) -> Json:
    """That of a forward, without ``self``. Raises ArtifactError for a default that is no constant or nest of them."""
    made = []
    for p in signature.parameters.values():
        entry: dict[str, Any] = {"name": p.name, "kind": p.kind.name}
        if p.default is not p.empty:
            entry["default"] = structure_json(flatten(p.default)[1])
        made.append(entry)
    return made


def signature_of(entry: Entry) -> inspect.Signature:
    kinds = {k.name: k for k in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD,
                                 inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.KEYWORD_ONLY,
                                 inspect.Parameter.VAR_KEYWORD)}
    made = []
    for e in entry.parts():
        if not (name := e["name"].text()).isidentifier() or keyword.iskeyword(name):
            raise e["name"].wrong("name of an argument")
        default = _template(e["default"]) if "default" in e else inspect.Parameter.empty
        made.append((name, kinds[e["kind"].one_of(tuple(kinds))], default))
    try:
        return inspect.Signature([inspect.Parameter(name, kind, default=default) for name, kind, default in made])
    except ValueError as error:
        raise ArtifactError(f"{entry.where} is no signature: {error}") from error


# Tensors


def look_json(tensor: torch.Tensor) -> Json:
    return {"shape": list(tensor.shape), "dtype": dtype_name(tensor.dtype)}


def look_of(entry: Entry) -> Look:
    """Shape and type of a tensor, whose elements can be counted."""
    shape = entry["shape"].wholes()
    if math.prod(shape) > LARGEST_NUMBER or len(shape) > MOST_DIMENSIONS:
        raise entry["shape"].wrong("shape of a tensor")
    return shape, dtype_of(entry["dtype"])


def look_text(look: Look) -> str:
    return f"{dtype_name(look[1])}{list(look[0])}"


def nbytes_of(look: Look) -> int:
    return math.prod(look[0]) * look[1].itemsize
