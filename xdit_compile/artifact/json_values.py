"""Calls as JSON: signatures, nests of containers, types and sizes. Reading makes no object of a class that a file
names, unless this process knows the class already as one of results."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from xdit_compile.errors import ArtifactError
from xdit_compile.ir.pytree import TENSOR, Structure, flatten

Json = Any
_PLAIN = (bool, int, float, str, type(None))


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


def dtype_of(name: Json) -> torch.dtype:
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype):
        raise ArtifactError(f"{name!r} is no type of tensors")
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


def constant_of(value: Json) -> Any:
    ((kind, held),) = value.items()
    if kind == "value" and isinstance(held, _PLAIN):
        return held
    made: dict[str, Any] = {"float": float, "dtype": dtype_of, "device": torch.device}
    if kind not in made or not isinstance(held, str):
        raise ArtifactError(f"{value!r} is no constant")
    return made[kind](held)


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


def structure_of(tree: Json) -> Structure:
    leaves, spec = pytree.tree_flatten(_template(tree))
    return Structure(spec, tuple(leaves))


def _template(tree: Json) -> Any:
    if tree == "tensor":
        return TENSOR
    if "output" in tree:
        fields = {str(k): _template(v) for k, v in tree["fields"]}
        cls = _known(tree["output"], fields)
        return cls(**fields) if cls else Result(fields)
    if "dict" in tree:
        return {str(k): _template(v) for k, v in tree["dict"]}
    if "tuple" in tree or "list" in tree:
        kind = tuple if "tuple" in tree else list
        return kind(map(_template, tree[kind.__name__]))
    return constant_of(tree)


def _known(name: str, fields: Mapping[str, Any]) -> Any:
    """The class of results of this name, if its module is loaded anyhow. Nothing is imported for it."""
    module, _, path = name.partition(":")
    cls: Any = getattr(sys.modules.get(module), path, None)
    fits = isinstance(cls, type) and issubclass(cls, OrderedDict) and dataclasses.is_dataclass(cls)
    return cls if fits and fields.keys() <= {f.name for f in dataclasses.fields(cls)} else None


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


def signature_of(entries: Json) -> inspect.Signature:
    kinds = {k.name: k for k in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD,
                                 inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.KEYWORD_ONLY,
                                 inspect.Parameter.VAR_KEYWORD)}
    return inspect.Signature([
        inspect.Parameter(e["name"], kinds[e["kind"]], default=_template(e["default"]) if "default" in e
                          else inspect.Parameter.empty) for e in entries])


# Tensors


def look_json(tensor: torch.Tensor) -> Json:
    return {"shape": list(tensor.shape), "dtype": dtype_name(tensor.dtype)}


def look_of(entry: Json) -> tuple[tuple[int, ...], torch.dtype]:
    shape = entry["shape"]
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**48 for n in shape):
        raise ArtifactError(f"{shape!r} is no shape of a tensor")
    return tuple(shape), dtype_of(entry["dtype"])
