"""Identical blocks are captured once: repeated modules are stood in for by one opaque operator.

First the model runs on fake tensors, and each distinct (module fingerprint, inputs) pair is recorded with the
shapes it returns. Every later block that looks like it runs too, but computes nothing: it has to ask PyTorch for the
same (``operator_log.py``), or is of another kind. Then, while the model is traced, every call of a recorded kind
becomes one ``xdit_compile::block`` node; each kind is traced once, on its own, and put in its place afterwards. A block
that changes its inputs or itself, or takes what is no tensor, constant or container, is left inside the model.

Where a block by itself asks for something else than it did inside the model (its parent, or another block, had set
something), or the model around the blocks does when they are only stood in for, nothing is outlined.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import _get_current_function_mode_stack

from xdit_compile.frontend.block_fingerprint import Attribute, fingerprint, meta, telling_apart
from xdit_compile.frontend.caller import Autocast, autocast_as, autocast_now
from xdit_compile.frontend.concrete_values import ConcreteValueMode, Value, plain
from xdit_compile.frontend.looks import marked
from xdit_compile.frontend.operator_log import AroundLog, OperatorLog, Replay, Unlike, memory, state_origins, untold
from xdit_compile.frontend.side_effects import Change
from xdit_compile.frontend.stand_ins import stand_in
from xdit_compile.frontend.tracing import fake_state
from xdit_compile.ir.containers import CONSTANTS
from xdit_compile.ir.packed_tensors import is_packed
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


_State = tuple[dict[str, Any], dict[str, Any]]
"""Fake parameters and buffers of a module."""


@dataclass(frozen=True, eq=False)
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
    log: OperatorLog
    """What it asks of PyTorch."""
    returned: tuple[Hashable, ...]
    """Where its output tensors come from."""
    state: Sequence[_State]
    gradients: tuple[bool, ...]
    """Which of its parameters require gradients."""
    sharing: Sequence[int]
    """Which of its inputs are one."""
    shared: tuple[int, ...]
    """Which of its outputs lie in memory that they share with others, or with inputs or state."""

    @property
    def strides(self) -> list[tuple[int, ...]]:
        return [t.stride() for t in self.examples]

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
                 changes: Callable[[], Mapping[Hashable, Change]]) -> None:
        """``changes``: what is now otherwise than before the model ran, of all that it can reach."""
        self._model, self._known, self._mode, self._changes = model, known, mode, changes
        # Numbers and names of blocks are no part of their fingerprints: their logs tell whether they matter.
        self._prints = repeated(model, telling_apart(model))
        self._modules = {path: model.get_submodule(path) for path in self._prints}
        self.kinds: dict[str, BlockKind] = {}
        self._runs: dict[Hashable, list[BlockKind]] = {}
        """Blocks that were run, by (fingerprint, inputs): several where they ask for different things, which are then
        of several kinds, or where inputs have other strides."""
        self._impure: set[Hashable] = set()
        """Fingerprints and inputs of blocks that have to stay inside the model."""
        self._reading: set[Hashable] = set()
        """Those that read values: for them, inputs of other values are others."""
        self._calls: list[tuple[str, BlockKind | None]] = []
        """Each call of a block, in order."""
        self._coming: Iterator[tuple[str, BlockKind | None]] = iter(())
        self._inside: set[str] = set()
        """Blocks some call of which has to stay inside the model."""
        self.around = self._log = AroundLog(model)
        """What the model asks outside of blocks, while they are recorded, and now."""
        self._memory: dict[Hashable, torch.Tensor] = {}
        self.recorded, self.failed = False, False
        """Whether the model ran to its end, and whether a block was tried that is like no other."""

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(self._prints)

    @property
    def repeats(self) -> tuple[str, ...]:
        """Blocks that have an identical one before them. Of the first, parts may be used outside of it."""
        first = {p: path for path, p in reversed(self._prints.items())}
        return tuple(path for path, p in self._prints.items() if first[p] != path)

    @contextmanager
    def recording(self) -> Iterator[AroundLog]:
        """Within: run the model on fake tensors once, inside the log that it yields, with blocks whose state is as it
        was: it becomes fake where a block is run for the first time, one of each kind.

        Raises:
            Unlike: at the end, where the model writes into memory that results of a block share.
        """
        with self._replaced(self._record):
            yield self.around
        self.recorded = True
        if self.around.split:
            raise Unlike

    def holds(self, kind: BlockKind) -> bool:
        """Whether blocks of this kind ask for the same where one is run by itself, as it will be traced."""
        made = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in kind.examples]
        made = [made[i] for i in sharing(kind.examples)]
        for tensor, value in zip(made, kind.values, strict=True):
            self._known.assign(tensor, value)
        with autocast_as(kind.autocast):
            return self._asks(kind, kind.module, kind.module.forward, made, kind.inputs)

    @contextmanager
    def standing_in(self) -> Iterator[AroundLog]:
        """Within: trace the model, inside the log that it yields; calls of recorded kinds become block nodes.

        Raises:
            Unlike: at the end, where the model asked for something else than while it was recorded.
        """
        _results.update({name: [meta(t) for t in k.fresh] for name, k in self.kinds.items()})
        examples = {k.path for k in self.kinds.values()} | self._inside
        self._coming, self._log = iter(self._calls), AroundLog(self._model, self.around)
        try:
            with self._replaced(self._emit), _without_state(m for p, m in self._modules.items() if p not in examples):
                yield self._log
        finally:
            _results.clear()
        if self._log.entries != self.around.entries or next(self._coming, None):
            raise Unlike

    @contextmanager
    def _replaced(self, stand_in: Callable[..., Any]) -> Iterator[None]:
        def bind(path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
            return wraps(forward)(lambda *args, **kwargs: stand_in(path, forward, args, kwargs))

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

    def _is_called_as(self, kind: BlockKind, tensors: list[torch.Tensor], structure: Structure) -> bool:
        looks = [(t.shape, t.dtype, t.device) for t in tensors]
        return (_plain(structure) and structure.key() == kind.inputs.key() and sharing(tensors) == kind.sharing
                and looks == [(t.shape, t.dtype, t.device) for t in kind.examples] and autocast_now() == kind.autocast)

    def _values(self, tensors: list[torch.Tensor]) -> Hashable:
        return tuple(map(self._known.digest, tensors))

    def _record(self, path: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        tensors, structure = flatten((args, kwargs))
        key = self._key(path, tensors, structure) if _plain(structure) else None
        # A mode that the model has put around the block is not there where the block is traced.
        if key is None or key in self._impure or len(_get_current_function_mode_stack()) != self.around.depth:
            self._calls.append((path, None))
            self._inside.add(path)
            with fake_state(self._modules[path], self._mode):
                self._known.stand(self._modules[path], f"{path}.")
                return forward(*args, **kwargs)
        entered = len(self.around.entries)
        strides = [t.stride() for t in tensors]
        run = next((k for k in self._runs.get(key, [])[-_MOST:] if k.strides == strides
                    and self._asks(k, self._modules[path], forward, tensors, structure)), None)
        if run:
            kind = self.kinds[run.name]
            self._calls.append((path, kind))
        else:
            tried = bool(self._runs.get(key))
            self.failed |= tried
            before = self._moved() if tried else {}
            found, out = self._run(key, path, forward, tensors, structure)
            if tried and self._moved() != before:  # what it changes, it has changed twice
                raise Unlike
            if found is None:
                return out
            kind = found
        results = [tensors[r] if isinstance(r, int) else self._fresh(r) for r in kind.results]
        if kind.shared:
            self.around.shared |= {memory(t) for t in (*tensors, *(results[i] for i in kind.shared))}
        self.around.block(path, entered, results)
        return kind.outputs.build(results)

    def _moved(self) -> dict[Hashable, int]:
        return {key: id(change.after) for key, change in self._changes().items()}

    def _fresh(self, tensor: torch.Tensor) -> torch.Tensor:
        """One that looks like it, and has its value if that is known."""
        if is_packed(tensor):
            return stand_in(tensor, self._fresh)
        return self._valued(tensor, torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype,
                                                        device=tensor.device))

    def _shown(self, tensor: torch.Tensor) -> torch.Tensor:
        """As ``_fresh``, but for no more than to be looked at: many lie in the same memory, which is made sooner."""
        if is_packed(tensor):
            return stand_in(tensor, self._shown)
        key = meta(tensor)
        if key not in self._memory:
            with plain():
                self._memory[key] = torch.empty_strided(*key[:2], dtype=tensor.dtype, device="meta")
        return self._valued(tensor, FakeTensor(self._mode, self._memory[key], tensor.device))

    def _valued(self, tensor: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
        if self._known.value(tensor) is not None:
            self._known.assign(made, self._known.snapshot(tensor))
        return made

    def _asks(self, kind: BlockKind, module: nn.Module, forward: Callable[..., Any], tensors: list[torch.Tensor],
              structure: Structure) -> bool:
        """Whether a block asks for what the first of a kind did."""
        args, kwargs = structure.build(tensors)
        reads = self._known.reads
        with _state_as(module, kind.state):
            held = _attributes(module)
            replay = Replay(kind.log, state_origins(module, tensors), self._shown)
            try:
                with replay:
                    out = forward(*args, **kwargs)
            except (Unlike, Exception):  # what the block itself raises, it will raise again
                return False
            finally:
                self.around.inside(replay.made)
            if any(a is not b for a, b in itertools.zip_longest(held, _attributes(module))):
                return False
        # What values are read is noted where a block is run for the first time alone.
        if reads != self._known.reads and module is not kind.module:
            return False
        if (kind.log.asks_gradients or replay.asks_gradients) and kind.gradients != _gradients(module):
            return False
        made, outputs = flatten(out)
        return (replay.ended and outputs.key() == kind.outputs.key() and not differ((args, kwargs), tensors, structure)
                and tuple(map(replay.origin, made)) == kind.returned)

    def _run(self, key: Hashable, path: str, forward: Callable[..., Any], tensors: list[torch.Tensor],
             structure: Structure) -> tuple[BlockKind | None, Any]:
        """Run a block on fake tensors. Its kind, None if it has to stay inside the model, and what it returns."""
        module = self._modules[path]
        snapshots, values, reads = [*map(self._known.snapshot, tensors)], self._values(tensors), self._known.reads
        with untold():
            versions = [t._version for t in tensors]
        before, held = self._state(path), self._known.state_read()
        args, kwargs = structure.build(tensors)
        with fake_state(module, self._mode):
            self._known.stand(module, f"{path}.")
            state = [(dict(m._parameters), dict(m._buffers)) for m in module.modules()]
            log = OperatorLog(state_origins(module, tensors))
            with log:
                out = forward(*args, **kwargs)
        made, outputs = flatten(out)
        returned = tuple(map(log.origin, made))
        fresh = [t for t in made if not any(t is given for given in tensors)]
        with untold():
            written = versions != [t._version for t in tensors] or any(isinstance(w, (int, str)) for w in log.written)
            # Outside of the block each result is a new tensor, without what else the block has put on it.
            own = len({id(t) for t in fresh}) == len(fresh) and not any(isinstance(r, str) for r in returned) and (
                not any(t.requires_grad or marked(t) for t in fresh))
        pure = (not written and own and before == self._state(path) and _plain(outputs)
                and not differ((args, kwargs), tensors, structure))
        # Blocks of one kind may differ in the values of their buffers.
        pure = pure and not any(n.startswith(f"{path}.") for n in self._known.state_read() - held)
        if self._known.reads > reads:
            self._reading.add(key)
            key = key, values
        if not pure:
            self._impure.add(key)
            self._inside.add(path)
            self._calls.append((path, None))
            return None, out
        # Inputs of other strides need not make it another kind.
        name = next((k.name for k in self._runs.get(key, ()) if k.log.entries == log.entries and k.returned == returned
                     and k.outputs.key() == outputs.key() and list(map(meta, k.fresh)) == list(map(meta, fresh))),
                    None) or self._name(path)
        places = Counter(map(memory, fresh))
        others = {memory(t) for t in (*tensors, *(t for group in state for held in group for t in held.values()
                                                 if t is not None))}
        shared = tuple(i for i, t in enumerate(made) if places[memory(t)] > 1 or (
            memory(t) in others and places[memory(t)]))
        run = BlockKind(
            name, path, module, structure, tuple(tensors), tuple(snapshots), outputs,
            tuple(next((i for i, t in enumerate(tensors) if t is m), m) for m in made), autocast_now(), log, returned,
            state, _gradients(module), sharing(tensors), shared)
        self._runs.setdefault(key, []).append(run)
        kind = self.kinds.setdefault(name, run)
        self._calls.append((path, kind))
        return kind, out

    def _name(self, path: str) -> str:
        """After the container: ``transformer_blocks``, then ``transformer_blocks_1`` for its second kind."""
        base = path.rpartition(".")[0].replace(".", "_")
        taken = sum(name.startswith(base) for name in self.kinds)
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
        called, kind = next(self._coming, ("", None))
        if called != path or (kind and not self._is_called_as(kind, tensors, structure)):
            raise Unlike
        if kind is None:
            return forward(*args, **kwargs)
        entered = len(self._log.entries)
        fresh = iter(BLOCK(kind.name, path, tensors) if kind.fresh else [])
        results = [tensors[r] if isinstance(r, int) else next(fresh) for r in kind.results]
        self._log.block(path, entered, results)
        return kind.outputs.build(results)


_MOST = 8
"""Kinds that a block is compared with, of those that look like it: where all differ, there is no end to it."""


def _attributes(module: nn.Module) -> list[Any]:
    """What the attributes of a block, and of what is in it, are."""
    found: list[Any] = []
    for m in module.modules():
        state = vars(m)
        for group in (state, m._parameters, m._buffers, m._modules):
            found += [*group, *group.values()]
    return found


@contextmanager
def _state_as(module: nn.Module, state: Sequence[_State]) -> Iterator[None]:
    """Within, parameters and buffers are those of another block."""
    held = [(m, m._parameters, m._buffers) for m in module.modules()]
    for (m, _, _), (parameters, buffers) in zip(held, state, strict=True):
        vars(m).update(_parameters=dict(parameters), _buffers=dict(buffers))
    try:
        yield
    finally:
        for m, own, others in held:
            vars(m).update(_parameters=own, _buffers=others)


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


def _gradients(module: nn.Module) -> tuple[bool, ...]:
    return tuple(p.requires_grad for p in module.parameters())


def _plain(structure: Structure) -> bool:
    return all(c is TENSOR or isinstance(c, CONSTANTS) for c in structure.constants)
