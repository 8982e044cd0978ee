"""Python containers as flat leaves and back: pytrees, plus dataclasses and plain objects nobody registered."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from xdit_compile.errors import CaptureError
from xdit_compile.ir.containers import CONSTANTS, REGISTERED, fill, is_container, register

DEEPEST = 100
"""Containers inside of containers; beyond, one holds itself."""


@dataclass(frozen=True)
class Structure:
    """The shape of a nest of containers: ``tensor_count`` tensor leaves and the constants between them."""

    spec: pytree.TreeSpec
    constants: tuple[Any, ...]
    """One entry per leaf: the leaf itself, or TENSOR where a tensor goes."""
    shared: tuple[int, ...] = ()
    """For each container, the first that is the same object; nothing where all differ."""
    kept: Mapping[int, Any] = field(default_factory=dict)
    """Containers without tensors that are given as the objects they are, by their place among all containers."""
    copied: frozenset[int] = frozenset()
    """Constants that are copied each time, by their place: the caller may write into them."""

    @property
    def tensor_count(self) -> int:
        return sum(c is TENSOR for c in self.constants)

    def build(self, tensors: Any) -> Any:
        """The containers again, with ``tensors`` in the places of the tensor leaves."""
        queue = iter(tensors)
        leaves = [next(queue) if c is TENSOR else copy.copy(c) if i in self.copied else c
                  for i, c in enumerate(self.constants)]
        return _Building(self, iter(leaves)).build(self.spec)

    def key(self) -> tuple[Hashable, ...]:
        """Equal for two structures exactly when they are the same containers around the same constants. Generators
        count by their device: a program draws no random numbers, so that which one it was given makes no difference."""
        return self._key(id)

    def kind(self) -> tuple[Hashable, ...]:
        """As ``key``, without ``others``, which are compared in another way."""
        return self._key(lambda _: None)

    def others(self) -> tuple[Any, ...]:
        """Leaves that no key can describe, and classes of containers that may compute: objects that are compared by
        what they hold."""
        leaves = [c for c in self.constants if type(c) not in _PLAIN and _mark(c) is None]
        return (*leaves, *dict.fromkeys(_classes(self.spec)))

    def _key(self, other: Callable[[Any], Hashable]) -> tuple[Hashable, ...]:
        marks = [(type(c), c if type(c) in _SIMPLE else other(c) if (mark := _mark(c)) is None else mark)
                 for c in self.constants]
        return _spec_key(self.spec), tuple(marks), self.shared


def _mark(leaf: Any) -> Hashable:
    """Equal for leaves, of one type, that compute alike; None if only the object itself can tell."""
    cls = type(leaf)
    if cls in (float, complex):  # 0.0 and -0.0 are equal and compute otherwise
        return repr(leaf)
    if cls in _PLAIN:
        return (leaf,)
    if isinstance(leaf, torch.Generator):
        return leaf.device
    if cls is torch.Size:
        return tuple(leaf)
    if (isinstance(leaf, np.generic) or cls is np.ndarray) and not leaf.dtype.hasobject:
        return leaf.dtype.str, leaf.shape, leaf.tobytes()
    return None


def _spec_key(spec: pytree.TreeSpec) -> Hashable:
    """Names of classes are not enough: two may have the same."""
    if spec.type is None:
        return None
    return spec.type, _frozen(spec._context), *map(_spec_key, spec._children)


def _frozen(context: Any) -> Hashable:
    if context is None or type(context) is str:
        return context
    if isinstance(context, (list, tuple)):
        return tuple(map(_frozen, context))
    return type(context), repr(context) if isinstance(context, float) or type(context).__hash__ is None else context


def _classes(spec: pytree.TreeSpec) -> list[type]:
    inner = [cls for child in spec._children if child.type is not None for cls in _classes(child)]
    return [spec.type, *inner] if spec.type in REGISTERED else inner


class _Tensor:
    """Marks where a tensor goes."""

    def __repr__(self) -> str:
        return "TENSOR"


TENSOR = _Tensor()
_PLAIN = frozenset({*CONSTANTS, _Tensor})
_SIMPLE = _PLAIN - {float, complex}
"""Types of leaves that compute alike if they are equal."""


class _Building:
    """One making of containers."""

    def __init__(self, structure: Structure, leaves: Iterator[Any]) -> None:
        self._structure, self._leaves = structure, leaves
        self._made: list[Any] = []

    def build(self, spec: pytree.TreeSpec) -> Any:
        if spec.is_leaf():
            return next(self._leaves)
        place = len(self._made)
        self._made.append(None)
        made = self._container(spec, [self.build(child) for child in spec.children()])
        first = self._structure.shared[place] if self._structure.shared else place
        self._made[place] = self._structure.kept.get(place, made) if first == place else self._made[first]
        return self._made[place]

    def _container(self, spec: pytree.TreeSpec, parts: list[Any]) -> Any:
        """As ``tree_unflatten``, which cannot make a dataclass again that is a dictionary of those fields that are not
        None, as diffusers' outputs are."""
        cls = spec.type
        if cls not in REGISTERED and isinstance(cls, type) and issubclass(cls, dict) and dataclasses.is_dataclass(cls):
            given = dict(zip(spec.context, parts, strict=True))
            fields = {f.name: None for f in dataclasses.fields(cls)}
            if given.keys() <= fields.keys():
                return cls(**(fields | given))  # type: ignore[operator]
        return pytree.SUPPORTED_NODES[cls].unflatten_fn(parts, spec.context)


class _Flattening:
    """One taking apart of containers."""

    def __init__(self) -> None:
        self.leaves: list[Any] = []
        self.containers: list[Any] = []
        self.tensors: list[int] = []
        """How many tensors each container has inside."""
        self._count = 0

    def spec(self, value: Any, depth: int = 0) -> pytree.TreeSpec:
        cls = node = type(value)
        if node not in (nodes := pytree.SUPPORTED_NODES):
            is_tensor = isinstance(value, torch.Tensor)
            if not is_tensor and cls not in _PLAIN:
                node = pytree._get_node_type(value)
                if node not in nodes and is_container(value):
                    register(cls)
            if node not in nodes:
                self.leaves.append(value)
                self._count += is_tensor
                return _LEAF
        if depth > DEEPEST:
            raise CaptureError(f"a {cls.__module__}.{cls.__qualname__} among the arguments or results holds itself, or "
                               f"lies more than {DEEPEST} objects deep; pass what the model needs of it by itself")
        place, before = len(self.containers), self._count
        self.containers.append(value)
        self.tensors.append(0)
        parts, context = pytree.SUPPORTED_NODES[node].flatten_fn(value)
        children = [self.spec(part, depth + 1) for part in parts]
        self.tensors[place] = self._count - before
        return pytree.TreeSpec(node, context, children)


_LEAF = pytree.tree_flatten(None)[1]


def flatten(value: Any, kept: Callable[[Any], bool] | None = None) -> tuple[list[torch.Tensor], Structure]:
    """The tensors in ``value``, in order, and the structure that puts them back.

    Args:
        kept: which containers, if there is no tensor inside, the structure gives as the objects they are; other
            constants that can be written into are then copied. Without it, it makes all containers anew.
    """
    tensors, structure, _ = taken_apart(value, kept)
    return tensors, structure


def taken_apart(value: Any, kept: Callable[[Any], bool] | None = None
                ) -> tuple[list[torch.Tensor], Structure, list[Any]]:
    """As ``flatten``, with the containers."""
    found = _Flattening()
    spec = found.spec(value)
    leaves = found.leaves
    ids = [id(c) for c in found.containers if type(c) is not tuple]
    # Equal tuples may be one object or two.
    shared = () if len(set(ids)) == len(ids) else sharing(
        [object() if type(c) is tuple else c for c in found.containers])
    same = {} if kept is None else {i: c for i, (c, n) in enumerate(zip(found.containers, found.tensors, strict=True))
                                    if not n and type(c) is not tuple and kept(c)}
    copied = frozenset[int]() if kept is None else frozenset(
        i for i, c in enumerate(leaves) if isinstance(c, (np.ndarray, set, bytearray)) and not kept(c))
    structure = Structure(spec, tuple(TENSOR if isinstance(x, torch.Tensor) else x for x in leaves),
                          shared, same, copied)
    return [x for x in leaves if isinstance(x, torch.Tensor)], structure, found.containers


def sharing(tensors: Sequence[Any]) -> tuple[int, ...]:
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
    if type(old) is tuple and type(new) is tuple:
        for a, b in zip(old, new, strict=False):
            write_back(a, b)
    elif type(old) is type(new) and old is not new:
        fill(old, new, _kept)


def _kept(old: Any, new: Any) -> Any:
    """``old`` with the contents of ``new`` if it is a container that can have them, else ``new``."""
    if type(old) is type(new) and (isinstance(old, (list, dict)) or type(old) in REGISTERED):
        write_back(old, new)
        return old
    return new
