"""Identical blocks are captured once: repeated modules are stood in for by one opaque operator.

First the model runs on fake tensors, and each distinct (module fingerprint, inputs) pair is recorded with the
shapes it returns. Then, while the model is traced, every call of a recorded kind becomes one
``xdit_compile::block`` node; each kind is traced once, on its own, and put in its place afterwards. A block
that changes its inputs or itself, or takes what is no tensor, constant or container, is left inside the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from xdit_compile.frontend.block_fingerprint import Attribute, fingerprint, meta
from xdit_compile.frontend.caller import Autocast, autocast_now
from xdit_compile.frontend.concrete_values import ConcreteValueMode, Value
from xdit_compile.frontend.tracing import fake_state
from xdit_compile.frontend.watched import telling_apart, watching
from xdit_compile.ir.containers import CONSTANTS
from xdit_compile.ir.pytree import TENSOR, Structure, differ, flatten, sharing

_library = torch.library.Library("xdit_compile", "FRAGMENT")
_library.define("block(str kind, str path, Tensor[] inputs) -> Tensor[]")
BLOCK = torch.ops.xdit_compile.block.default

_results: dict[str, list[tuple[Any, Any, torch.dtype, torch.device]]] = {}
"""What each block kind returns, for the operator's fake kernel while a trace is under way."""


@torch.library.register_fake("xdit_compile::block", lib=_library)
def _block(kind: str, path: str, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.empty_strided(shape, stride, dtype=dtype, device=device)
            for shape, stride, dtype, device in _results[kind]]


@dataclass(frozen=True)
class BlockKind:
    """One kind of repeated block: an example of it, how it is called and what it returns."""

    name: str
    path: str
    module: nn.Module
    inputs: Structure
    examples: tuple[torch.Tensor, ...]
    values: tuple[Value | None, ...]
    """Of each example, what is known of its value."""
    outputs: Structure
    results: tuple[int | torch.Tensor, ...]
    """Per output tensor: the index of the input it simply is, or what it looks like."""
    autocast: Autocast
    """As the model had it on around the block."""

    @property
    def fresh(self) -> list[torch.Tensor]:
        return [r for r in self.results if isinstance(r, torch.Tensor)]


def repeated(model: nn.Module, unread: frozenset[Attribute] = frozenset()) -> dict[str, Hashable]:
    """Path and fingerprint of every block: a module that has an identical sibling in the same container, ``unread``
    attributes aside. Blocks inside of blocks do not count, unless there are as many of them: then the outer ones are
    whole models, side by side."""
    children = {name: child for name, child in model.named_children() if next(child.children(), None)}
    listed = isinstance(model, (nn.ModuleList, nn.ModuleDict, nn.Sequential))
    prints = {name: fingerprint(child, unread) if listed else name for name, child in children.items()}
    counts = Counter(prints.values())
    inside = {prints[name]: repeated(child, unread) for name, child in children.items()}
    found: dict[str, Hashable] = {}
    for name, child in children.items():
        inner, alike = inside[prints[name]], counts[prints[name]]
        stacks = Counter(p for path, p in inner.items() if _levels(child.get_submodule(path)) > 1)
        # A list of lists of layers has no forward of its own.
        called = type(child).forward is not nn.Module.forward
        if called and alike > 1 and max(stacks.values(), default=0) < alike:
            found[name] = prints[name]
        else:
            found |= {f"{name}.{path}": p for path, p in inner.items()}
    return found


def _levels(module: nn.Module) -> int:
    """How deep modules are nested inside."""
    return max((1 + _levels(c) for c in module.children()), default=0)


class Outliner:
    """Stands in for the repeated blocks of a model, first to record them, then to trace around them."""

    def __init__(self, model: nn.Module, known: ConcreteValueMode, mode: FakeTensorMode,
                 read: frozenset[Attribute] = frozenset()) -> None:
        """``read``: attributes that tell blocks apart, and are known to be read."""
        self._known, self._mode = known, mode
        self.unread = telling_apart(model) - read
        self._prints = repeated(model, self.unread)
        self._modules = {path: model.get_submodule(path) for path in self._prints}
        self.kinds: dict[Hashable, BlockKind | None] = {}
        """By (fingerprint, inputs); None for a block that has to stay inside the model."""
        self._reading: set[Hashable] = set()
        """Kinds that read values: for them, inputs of other values are another kind."""
        self.read: frozenset[Attribute] = frozenset()
        """Attributes that tell blocks apart, and turned out to be read while they were recorded."""
        self._inside: set[str] = set()
        """Blocks some call of which has to stay inside the model."""

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(self._prints)

    @property
    def repeats(self) -> tuple[str, ...]:
        """Blocks that have an identical one before them. Of the first, parts may be used outside of it."""
        first = {p: path for path, p in reversed(self._prints.items())}
        return tuple(path for path, p in self._prints.items() if first[p] != path)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within: run the model on fake tensors once, with blocks whose state is as it was: it becomes fake where a
        block really runs, one of each kind."""
        with watching(self._modules.values(), self.unread) as read, self._replaced(self._record):
            yield
            self.read = frozenset(read)

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """Within: trace the model; calls of recorded kinds become block nodes."""
        _results.update({k.name: [meta(t) for t in k.fresh] for k in self.kinds.values() if k})
        examples = {k.path for k in self.kinds.values() if k} | self._inside
        try:
            with self._replaced(self._emit), _without_state(m for p, m in self._modules.items() if p not in examples):
                yield
        finally:
            _results.clear()

    @contextmanager
    def _replaced(self, stand_in: Callable[..., Any]) -> Iterator[None]:
        def bind(path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args, **kwargs: stand_in(path, forward, args, kwargs)

        # An instance attribute hides the class's forward and leaves hooks, which run around it, in place.
        free = [(p, m) for p, m in self._modules.items() if "forward" not in vars(m)]
        for path, module in free:
            vars(module)["forward"] = bind(path, module.forward)
        try:
            yield
        finally:
            for _, module in free:
                del vars(module)["forward"]

    def _key(self, path: str, tensors: list[torch.Tensor], structure: Structure) -> Hashable:
        # Strides are left out: canonical programs reshape, they do not view, so any strides are right.
        looks = tuple((t.shape, t.dtype, t.device) for t in tensors)
        key = self._prints[path], structure.key(), looks, sharing(tensors), autocast_now()
        return (key, self._values(tensors)) if key in self._reading else key

    def _values(self, tensors: list[torch.Tensor]) -> Hashable:
        return tuple(map(self._known.digest, tensors))

    def _record(self, path: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        tensors, structure = flatten((args, kwargs))
        if not _plain(structure):
            self._inside.add(path)
            return self._run(path, forward, args, kwargs)
        key = self._key(path, tensors, structure)
        kind = self.kinds.get(key)
        if key in self.kinds and kind is None:
            self._inside.add(path)
            return self._run(path, forward, args, kwargs)
        if kind:
            results = [tensors[r] if isinstance(r, int) else torch.empty_strided(
                r.shape, r.stride(), dtype=r.dtype, device=r.device) for r in kind.results]
            return kind.outputs.build(results)
        snapshots, values, reads = [*map(self._known.snapshot, tensors)], self._values(tensors), self._known.reads
        versions = [t._version for t in tensors]
        before, held = self._state(path), self._known.state_read()
        out = self._run(path, forward, args, kwargs)
        made, outputs = flatten(out)
        pure = (versions == [t._version for t in tensors] and before == self._state(path) and _plain(outputs)
                and not differ((args, kwargs), tensors, structure))
        # Blocks of one kind may differ in the values of their buffers.
        pure = pure and not any(n.startswith(f"{path}.") for n in self._known.state_read() - held)
        if self._known.reads > reads:
            self._reading.add(key)
            key = key, values
        self.kinds[key] = BlockKind(
            self._name(path), path, self._modules[path], structure, tuple(tensors),
            tuple(snapshots), outputs,
            tuple(next((i for i, t in enumerate(tensors) if t is m), m) for m in made), autocast_now(),
        ) if pure else None
        if not pure:
            self._inside.add(path)
        return out

    def _run(self, path: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        with fake_state(self._modules[path], self._mode):
            self._known.stand(self._modules[path], f"{path}.")
            return forward(*args, **kwargs)

    def _name(self, path: str) -> str:
        """After the container: ``transformer_blocks``, then ``transformer_blocks_1`` for its second kind."""
        base = path.rpartition(".")[0].replace(".", "_")
        taken = sum(k is not None and k.name.startswith(base) for k in self.kinds.values())
        return f"{base}_{taken}" if taken else base

    def _state(self, path: str) -> Hashable:
        """The block's fingerprint without our own stand-in on it."""
        module = self._modules[path]
        forward = vars(module).pop("forward")
        try:
            return fingerprint(module)
        finally:
            vars(module)["forward"] = forward

    def _emit(self, path: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        tensors, structure = flatten((args, kwargs))
        kind = self.kinds.get(self._key(path, tensors, structure)) if _plain(structure) else None
        if kind is None:
            return forward(*args, **kwargs)
        fresh = iter(BLOCK(kind.name, path, tensors) if kind.fresh else [])
        return kind.outputs.build([tensors[r] if isinstance(r, int) else next(fresh) for r in kind.results])


@contextmanager
def _without_state(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within, these modules have no parameters and buffers: tracing takes time for each, also for those of blocks
    that are stood in for. One block of each kind keeps its own, so that a model finds dtypes as it does."""
    hidden = [(m, m._parameters, m._buffers) for module in modules for m in module.modules()]
    for module, _, _ in hidden:
        vars(module).update(_parameters={}, _buffers={})
    try:
        yield
    finally:
        for module, parameters, buffers in hidden:
            vars(module).update(_parameters=parameters, _buffers=buffers)


def _plain(structure: Structure) -> bool:
    return all(c is TENSOR or isinstance(c, CONSTANTS) for c in structure.constants)
