"""Python containers as flat leaves and back: pytrees, plus dataclasses nobody registered."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
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
        return pytree.tree_unflatten([next(queue) if c is TENSOR else c for c in self.constants], self.spec)

    def key(self) -> tuple[Any, ...]:
        """Equal for two structures exactly when they are the same containers around the same constants."""
        return str(self.spec), tuple((type(c), c if isinstance(c, CONSTANTS) else id(c)) for c in self.constants)


class _Tensor:
    """Marks where a tensor goes."""

    def __repr__(self) -> str:
        return "TENSOR"


TENSOR = _Tensor()


def flatten(value: Any) -> tuple[list[torch.Tensor], Structure]:
    """The tensors in ``value``, in order, and the structure that puts them back."""
    leaves, spec = pytree.tree_flatten(value)
    while unknown := {type(x) for x in leaves if dataclasses.is_dataclass(x) and not isinstance(x, type)}:
        for cls in unknown:
            _register(cls)
        leaves, spec = pytree.tree_flatten(value)
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    return tensors, Structure(spec, tuple(TENSOR if isinstance(x, torch.Tensor) else x for x in leaves))


def _register(cls: type) -> None:
    """Tell pytree about a dataclass. Rebuilt without ``__init__``: it may compute or refuse, and ran once already."""
    names = [f.name for f in dataclasses.fields(cls)]

    def unflatten(values: Any, _: Any) -> Any:
        made: Any = object.__new__(cls)
        for name, value in zip(names, values, strict=True):
            object.__setattr__(made, name, value)
        return made

    pytree.register_pytree_node(cls, lambda x: ([getattr(x, n) for n in names], None), unflatten,
                                serialized_type_name=f"{cls.__module__}.{cls.__qualname__}")
