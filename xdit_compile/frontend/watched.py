"""Whether attributes are read: a block that holds its own number, and never looks at it, is like the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from xdit_compile.frontend.block_fingerprint import Attribute, apart, fingerprint

_MISSING = object()


def telling_apart(model: nn.Module) -> frozenset[Attribute]:
    """Attributes that alone keep neighbours in a container of ``model`` from being identical."""
    found: frozenset[Attribute] = frozenset()
    for module in model.modules():
        if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            children = [c for c in module.children() if next(c.children(), None)]
            if len({fingerprint(c) for c in children}) > 1:
                found |= apart(children)
    return found


@contextmanager
def watching(modules: Iterable[nn.Module], attributes: frozenset[Attribute]) -> Iterator[set[Attribute]]:
    """Within, these attributes of ``modules``, and of the objects that they hold, are where only ``getattr`` finds
    them; yields the set of those that were read or written so far."""
    touched: set[Attribute] = set()
    values: dict[Attribute, dict[int, tuple[Any, Any]]] = {a: {} for a in attributes}
    for holder in _holders(modules) if attributes else ():
        for name in [n for n in vars(holder) if (type(holder), n) in attributes]:
            values[type(holder), name][id(holder)] = holder, vars(holder).pop(name)
    before = {(cls, name): vars(cls).get(name, _MISSING) for cls, name in attributes}
    for cls, name in attributes:
        setattr(cls, name, _Watched((cls, name), values[cls, name], touched))
    try:
        yield touched
    finally:
        for (cls, name), own in before.items():
            if own is _MISSING:
                delattr(cls, name)
            else:
                setattr(cls, name, own)
            for holder, value in values[cls, name].values():
                vars(holder)[name] = value


def _holders(modules: Iterable[nn.Module]) -> Iterator[Any]:
    """The modules, what is inside of them, and the plain objects that these hold."""
    seen: dict[int, Any] = {}
    queue: list[Any] = [inner for module in modules for inner in module.modules()]
    while queue:
        holder = queue.pop()
        if id(holder) not in seen:
            seen[id(holder)] = holder
            yield holder
            queue += [v for v in [*vars(holder).values()] if hasattr(v, "__dict__") and not isinstance(v, type)
                      and type(v).__module__ != "builtins" and not isinstance(v, nn.Module)]


class _Watched:
    """Stands on the class in the place of an attribute, before which it comes, and says who asks for it."""

    def __init__(self, attribute: Attribute, values: dict[int, tuple[Any, Any]], touched: set[Attribute]) -> None:
        self._attribute, self._values, self._touched = attribute, values, touched
        self._default = getattr(*attribute, _MISSING)

    def __get__(self, holder: Any, cls: type | None = None) -> Any:
        _, name = self._attribute
        if holder is not None and id(holder) in self._values:
            self._touched.add(self._attribute)
            return self._values[id(holder)][1]
        if holder is not None and name in vars(holder):
            return vars(holder)[name]
        if self._default is _MISSING:
            raise AttributeError(f"{(cls or type(holder)).__name__!r} object has no attribute {name!r}")
        return self._default

    def __set__(self, holder: Any, value: Any) -> None:
        self._touched.add(self._attribute)
        vars(holder)[self._attribute[1]] = value
