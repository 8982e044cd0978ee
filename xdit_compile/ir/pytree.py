"""Python containers as flat leaves and back: pytrees, plus dataclasses and plain objects nobody registered."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

CONSTANTS = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.layout,
             torch.memory_format)
"""Leaves that are baked into a program: two calls share one only where these are equal."""


@dataclass(frozen=True)
class Structure:
    """The shape of a nest of containers: ``tensor_count`` tensor leaves and the constants between them."""

    spec: pytree.TreeSpec
    constants: tuple[Any, ...]
    """One entry per leaf: the leaf itself, or TENSOR where a tensor goes."""

    @property
    def tensor_count(self) -> int:
        return sum(c is TENSOR for c in self.constants)

    def build(self, tensors: Any) -> Any:
        """The containers again, with ``tensors`` in the places of the tensor leaves."""
        queue = iter(tensors)
        return _rebuilt(self.spec, iter([next(queue) if c is TENSOR else c for c in self.constants]))

    def key(self) -> tuple[Any, ...]:
        """Equal for two structures exactly when they are the same containers around the same constants. Generators
        count by their device: a program draws no random numbers, so that which one it was given makes no difference."""
        return str(self.spec), tuple((type(c), _mark(c)) for c in self.constants)


def _mark(leaf: Any) -> Any:
    if isinstance(leaf, torch.Generator):
        return leaf.device
    return leaf if isinstance(leaf, CONSTANTS) else id(leaf)


class _Tensor:
    """Marks where a tensor goes."""

    def __repr__(self) -> str:
        return "TENSOR"


TENSOR = _Tensor()


def _rebuilt(spec: pytree.TreeSpec, leaves: Iterator[Any]) -> Any:
    """As ``tree_unflatten``, which cannot make a dataclass again that is a dictionary of those fields that are not
    None, as diffusers' outputs are."""
    if spec.is_leaf():
        return next(leaves)
    parts = [_rebuilt(child, leaves) for child in spec.children()]
    if issubclass(cls := spec.type, dict) and dataclasses.is_dataclass(cls):
        given = dict(zip(spec.context, parts, strict=True))
        fields = {f.name: None for f in dataclasses.fields(cls)}
        if given.keys() <= fields.keys():
            return cls(**(fields | given))  # type: ignore[operator]
    return pytree.SUPPORTED_NODES[cls].unflatten_fn(parts, spec.context)


def flatten(value: Any) -> tuple[list[torch.Tensor], Structure]:
    """The tensors in ``value``, in order, and the structure that puts them back."""
    leaves, spec = pytree.tree_flatten(value)
    while unknown := {type(x) for x in leaves if _is_container(x)}:
        for cls in unknown:
            _register(cls)
        leaves, spec = pytree.tree_flatten(value)
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    return tensors, Structure(spec, tuple(TENSOR if isinstance(x, torch.Tensor) else x for x in leaves))


def sharing(tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """For each tensor, the index of the first that is the same object: code may ask whether two are."""
    first: dict[int, int] = {}
    return tuple(first.setdefault(id(t), i) for i, t in enumerate(tensors))


def differ(value: Any, tensors: Sequence[torch.Tensor], structure: Structure) -> bool:
    """Whether ``value`` is no longer what ``structure`` built from ``tensors``: an item was added, or exchanged."""
    now, shape = flatten(value)
    return shape.key() != structure.key() or any(a is not b for a, b in zip(now, tensors, strict=True))


def write_back(old: Any, new: Any) -> None:
    """Make the containers in ``old`` hold what those in ``new`` do: lists, dictionaries and objects in their places
    stay the objects they are."""
    if isinstance(old, tuple) and isinstance(new, tuple):
        for a, b in zip(old, new, strict=False):
            write_back(a, b)
    elif type(old) is not type(new):
        return
    elif isinstance(old, list):
        old[:] = [_kept(a, b) for a, b in zip(old, new, strict=False)] + new[len(old):]
    elif isinstance(old, dict):
        merged = {k: _kept(old[k], v) if k in old else v for k, v in new.items()}
        old.clear()
        old.update(merged)
    elif type(old) in _registered:
        write_back(vars(old), vars(new))


def _kept(old: Any, new: Any) -> Any:
    """``old`` with the contents of ``new`` if it is a container that can have them, else ``new``."""
    if type(old) is type(new) and (isinstance(old, (list, dict)) or type(old) in _registered):
        write_back(old, new)
        return old
    return new


_registered: set[type] = set()


def _is_container(x: Any) -> bool:
    """A dataclass, or an object that is its attributes and no more: a cache of keys and values, say."""
    if isinstance(x, (*CONSTANTS, torch.Tensor, nn.Module, type, Enum, dict, list, tuple, set)) or callable(x):
        return False
    return dataclasses.is_dataclass(x) or (hasattr(x, "__dict__") and not hasattr(type(x), "__slots__"))


def _register(cls: type) -> None:
    """Tell pytree about a class. Rebuilt without ``__init__``: it may compute or refuse, and ran once already."""
    _registered.add(cls)

    def unflatten(values: Any, names: Any) -> Any:
        made: Any = object.__new__(cls)
        for name, value in zip(names, values, strict=True):
            object.__setattr__(made, name, value)
        return made

    def parts(x: Any) -> tuple[list[Any], tuple[str, ...]]:
        names = tuple(f.name for f in dataclasses.fields(cls)) if dataclasses.is_dataclass(cls) else tuple(vars(x))
        return [getattr(x, n) for n in names], names

    def named(x: Any) -> tuple[list[tuple[pytree.KeyEntry, Any]], tuple[str, ...]]:
        values, names = parts(x)
        return [(pytree.GetAttrKey(n), v) for n, v in zip(names, values, strict=True)], names

    pytree.register_pytree_node(cls, parts, unflatten, flatten_with_keys_fn=named,
                                serialized_type_name=f"{cls.__module__}.{cls.__qualname__}")
