"""Values that tracing may know: what small inputs, buffers and constants hold, and everything computed from them alone.

Some models read tensor values into Python (how many text tokens a mask keeps). Static graphs cannot hold such a
read, but they can be specialised to it: while the model is traced, each tensor of known value has a real **mirror**
on which every operation is repeated, and a read is answered from the mirror. The steps that led to reads are kept
with the program as its guards: where they give other answers, another program is needed.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from xdit_compile.ir.guards import Guards, Slot, Step

LARGEST = 1 << 20
"""Elements up to which a derived value is followed."""

TEXT = {Tensor.__repr__, Tensor.__format__}
"""Functions that write values down. Tracing's own tensors would answer with something else."""

READS = {Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.numpy,
         Tensor.__array__, torch.equal, Tensor.equal, torch.allclose, Tensor.allclose, torch.is_nonzero,
         Tensor.is_nonzero, Tensor.__contains__, *TEXT}
"""Functions that turn values into Python objects."""

SIZED = {torch.nonzero, Tensor.nonzero, torch.argwhere, Tensor.argwhere, torch.unique, Tensor.unique,
         torch.unique_consecutive, Tensor.unique_consecutive, torch.bincount, Tensor.bincount}
"""Functions whose result's shape depends on values."""

_REPEATS = {torch.repeat_interleave, Tensor.repeat_interleave}
_SELECTS = {torch.masked_select, Tensor.masked_select}
_NUMBERS = {torch.arange, torch.linspace, torch.full, torch.zeros, torch.ones, torch.empty, torch.tensor}
"""Functions that take numbers, of which a tensor with one element may stand for one."""
_SHAPED = {Tensor.reshape, torch.reshape, Tensor.view, Tensor.expand, Tensor.repeat, Tensor.unflatten, torch.unflatten,
           Tensor.narrow, torch.narrow, Tensor.split, torch.split, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full,
           torch.nn.functional.pad, torch.nn.functional.interpolate}
"""Functions that take a tensor and numbers."""

_OF_SHAPES = {Tensor.new_zeros: torch.zeros, Tensor.new_ones: torch.ones, torch.zeros_like: torch.zeros,
              torch.ones_like: torch.ones}
"""Functions whose result holds the same values whatever their argument does."""

_UNDEFINED = ("rand", "empty", "new_empty", "normal", "bernoulli", "multinomial", "poisson", "uniform", "exponential",
              "dropout", "feature_dropout", "alpha_dropout", "cauchy", "geometric", "log_normal")
_WRITES = {"__setitem__", "__set__", *(f"__i{n}__" for n in (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"))}


@dataclass(frozen=True)
class Value:
    """The mirror of a known tensor, and which one it is in the list of steps."""

    tensor: Tensor
    slot: Slot


def of_inputs(tensors: Sequence[Tensor]) -> list[int | None]:
    """Indices of what is worth following: inputs that hold values and are not large."""
    return [i if t.numel() <= LARGEST and not t.is_meta and not isinstance(t, FakeTensor) else None
            for i, t in enumerate(tensors)]


class ConcreteValueMode(TorchFunctionMode):
    """While active, follows known values and answers reads of them. Keeps a list of all it did, from which
    ``guards`` takes what led to the reads."""

    def __init__(self, inputs: Sequence[Tensor], model: nn.Module) -> None:
        """``inputs``: the arguments of the call, as flat tensors; the model's buffers and tensor attributes hold values
        too."""
        super().__init__()
        self._inputs = inputs
        held = dict(_state(model))
        self._held = {name: t for (name, t), i in zip(held.items(), of_inputs([*held.values()]), strict=True)
                      if i is not None}
        self._stands: dict[int, tuple[Tensor, str]] = {}
        """Tensors of the trace that stand for these, by name."""
        # Keeps the tensors too: a traced tensor's Python object may else be dropped and made anew, unknown.
        self._values: dict[int, tuple[Tensor, Value]] = {}
        self._steps: list[tuple[Step, list[Tensor]]] = []
        """With the mirrors that each step touched, kept so that no other gets their storage."""
        self._slots = itertools.count()
        self._digests: dict[int, tuple[Tensor, int, Hashable]] = {}

    @property
    def reads(self) -> int:
        """How many reads there were so far."""
        return sum(step.answer is not None for step, _ in self._steps)

    def forget_reads(self) -> None:
        """For what is traced once more: its reads will be made again."""
        self._steps = [(replace(step, answer=None), mirrors) for step, mirrors in self._steps]

    def guards(self) -> Guards:
        """The reads and what led to them. Storages, not tensors, decide: a step may write into a view."""
        kept: list[Step] = []
        needed: set[int] = set()
        for step, mirrors in reversed(self._steps):
            storages = {_storage(m) for m in mirrors}
            if step.answer is not None or storages & needed:
                kept.append(step)
                needed |= storages
        return Guards(tuple(reversed(kept)))

    def stand(self, module: nn.Module, prefix: str = "") -> None:
        """While ``module`` is traced, what it has for buffers and tensor attributes stands for the model's."""
        for name, tensor in _state(module):
            if prefix + name in self._held:
                self._stands[id(tensor)] = tensor, prefix + name

    def state_read(self) -> set[str]:
        """Names of buffers and tensor attributes on which reads depend."""
        return {step.args[0] for step in self.guards().steps if step.func is None and isinstance(step.args[0], str)}

    def value(self, tensor: Tensor) -> Value | None:
        if id(tensor) in self._stands and id(tensor) not in self._values:
            name = self._stands.pop(id(tensor))[1]
            value = Value(_copy(self._held[name]), self._slot())
            self._steps.append((Step(None, (name,), {}, (value.slot,)), [value.tensor]))
            self._values[id(tensor)] = tensor, value
        return self._values.get(id(tensor), (None, None))[1]

    def snapshot(self, tensor: Tensor) -> Value | None:
        """The value as it is now: what is written into the tensor later does not count."""
        value = self.value(tensor)
        if value is None:
            return None
        made = Value(_copy(value.tensor), self._slot())
        self._steps.append((Step(torch.clone, (value.slot,), {}, (made.slot,)), [value.tensor, made.tensor]))
        return made

    def assign(self, tensor: Tensor, known: Value | int | None) -> None:
        """``tensor`` holds a copy of a snapshot, or of the argument with this index."""
        if isinstance(known, int):
            value = Value(_copy(self._inputs[known]), self._slot())
            self._steps.append((Step(None, (known,), {}, (value.slot,)), [value.tensor]))
            self._values[id(tensor)] = tensor, value
        elif known is not None:
            value = Value(_copy(known.tensor), self._slot())
            self._steps.append((Step(torch.clone, (known.slot,), {}, (value.slot,)), [known.tensor, value.tensor]))
            self._values[id(tensor)] = tensor, value

    def digest(self, tensor: Tensor) -> Hashable:
        """Equal for tensors known to be equal; None if nothing is known."""
        value = self.value(tensor)
        if value is None:
            return None
        mirror, version, found = self._digests.get(id(value.tensor), (None, -1, None))
        if mirror is None or version != value.tensor._version:
            found = digest(value.tensor)
            self._digests[id(value.tensor)] = value.tensor, value.tensor._version, found
        return found

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            args = (args[0], self._readable(args[1], positions=True), *args[2:])
        elif func in _NUMBERS:
            args, kwargs = self._readable(args), {k: self._readable(v) for k, v in kwargs.items()}
        elif func in _SHAPED:
            args = *args[:1], *map(self._readable, args[1:])
            kwargs = {k: self._readable(v) for k, v in kwargs.items()}
        elif func is Tensor.__iter__:
            return iter(self.__torch_function__(torch.unbind, types, args))
        elif func in _SELECTS and self._known(args[1:2]):
            return self.__torch_function__(Tensor.__getitem__, types, args[:2])
        elif func in _REPEATS and len(args) > 1 and isinstance(args[1], Tensor) and self._known(args[1]):
            return self._repeat(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not self._known(tensors):
            if func in TEXT and any(isinstance(t, (FakeTensor, FunctionalTensor)) for t in tensors):
                raise DataDependentOutputException(torch.ops.aten._local_scalar_dense.default)
            result = func(*args, **kwargs)
            if writes(func, kwargs):
                self._forget(tensors)
            elif func in _OF_SHAPES and isinstance(result, Tensor):
                like = {"dtype": result.dtype, "device": result.device}
                self._follow(result, _OF_SHAPES[func], (result.shape,), like)
            return result
        if func in READS or func in SIZED or (func in (torch.where, *_REPEATS) and len(args) + len(kwargs) == 1):
            return self._read(func, args, kwargs, tensors[0])
        result = func(*args, **kwargs)
        self._follow(result, func, args, kwargs)
        return result

    def _known(self, tensors: Any) -> bool:
        return all(self.value(t) for t in tree_leaves(tensors) if isinstance(t, Tensor))

    def _follow(self, result: Any, func: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Repeat on the mirrors what gave ``result``."""
        made, structure = tree_flatten(result)
        written = writes(func, kwargs)
        if not written and not any(isinstance(m, Tensor) for m in made):
            return
        name = getattr(func, "__name__", "")
        if name.startswith(_UNDEFINED) or any(m.numel() > LARGEST for m in made if isinstance(m, Tensor)):
            if written:
                self._forget([x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)][:1])
            return
        try:
            real, same, slots = self._perform(func, args, kwargs)
        except (NotImplementedError, RuntimeError):  # an operator that only tracing knows: a block's stand-in
            return
        if same == structure:
            self._assign_all(made, real, slots)

    def _read(self, func: Callable[..., Any], args: Any, kwargs: Any, like: Tensor) -> Any:
        """The answer to a read: Python objects as they are, tensors as constants of the program."""
        real, structure, slots = self._perform(func, args, kwargs, read=True)
        made = [torch.tensor(r.tolist(), dtype=r.dtype, device=like.device).reshape(r.shape)
                if isinstance(r, Tensor) else copy.copy(r) for r in real]
        self._assign_all(made, real, slots)
        return tree_unflatten(made, structure)

    def _perform(self, func: Callable[..., Any], args: Any, kwargs: Any,
                 read: bool = False) -> tuple[list[Any], Any, tuple[Slot | None, ...]]:
        """Run ``func`` on the mirrors: flat results, their structure and slots."""
        mirrors: list[Tensor] = []

        def mirror(t: Tensor) -> Tensor:
            mirrors.append(self._values[id(t)][1].tensor)
            return mirrors[-1]

        real_args, real_kwargs = tree_map_only(Tensor, mirror, (args, kwargs))
        with plain():
            real, structure = tree_flatten(func(*real_args, **real_kwargs))
        places, named = tree_map_only(Tensor, lambda t: self._values[id(t)][1].slot, (args, kwargs))
        slots = tuple(self._slot() if isinstance(r, Tensor) else None for r in real)
        answer = tuple(_copy(r) if isinstance(r, Tensor) else copy.copy(r) for r in real) if read else None
        mirrors += [r for r in real if isinstance(r, Tensor)]
        self._steps.append((Step(func, places, named, slots, answer), mirrors))
        return real, structure, slots

    def _assign_all(self, made: Sequence[Any], real: Sequence[Any], slots: Sequence[Slot | None]) -> None:
        for tensor, mirror, slot in zip(made, real, slots, strict=True):
            if isinstance(tensor, Tensor) and slot is not None and not isinstance(mirror, FakeTensor):
                self._values[id(tensor)] = tensor, Value(mirror, slot)

    def _slot(self) -> Slot:
        return Slot(next(self._slots))

    def _forget(self, written: Sequence[Tensor]) -> None:
        """Something unknown was written into these: nothing is known of their views either."""
        lost = {_storage(v.tensor) for t in written if (v := self.value(t))}
        for key in [k for k, (_, v) in self._values.items() if _storage(v.tensor) in lost]:
            del self._values[key]

    def _readable(self, index: Any, positions: bool = False) -> Any:
        """An index or a number with known tensors turned into what a static graph can hold: single integers into
        Python's and, in an index, boolean masks into positions."""
        if isinstance(index, slice):
            return slice(*(self._readable(x) for x in (index.start, index.stop, index.step)))
        if type(index) in (tuple, list):
            found: list[Any] = []
            for item in index:
                got = self._readable(item, positions)
                found += got if isinstance(item, Tensor) and isinstance(got, tuple) else [got]
            return type(index)(found)
        if not isinstance(index, Tensor) or not self._known(index):
            return index
        if index.ndim == 0 and index.dtype is not torch.bool:
            return self._read(Tensor.item, (index,), {}, index)
        if positions and index.dtype is torch.bool and index.ndim:
            return self._read(torch.nonzero, (index,), {"as_tuple": True}, index)
        return index

    def _repeat(self, x: Tensor, repeats: Tensor, dim: int | None = None, output_size: int | None = None) -> Tensor:
        """``repeat_interleave`` by known numbers: a selection."""
        x = x.flatten() if dim is None else x
        dim = dim or 0
        with self:  # the mode is off in its own handler
            where = torch.repeat_interleave(repeats.expand(x.shape[dim]))
            return x.index_select(dim, where)


def _state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers and tensor attributes, by their names."""
    for path, inner in module.named_modules(remove_duplicate=False):
        for group in (inner._buffers, vars(inner)):
            for name, tensor in group.items():
                if isinstance(tensor, Tensor):
                    yield f"{path}.{name}".lstrip("."), tensor


def _copy(tensor: Tensor) -> Tensor:
    with plain():
        return tensor.detach().clone()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def writes(func: Callable[..., Any], kwargs: Any) -> bool:
    """Whether a function writes into its first argument, or into the one that is named ``out``, or an operator into any
    of its own."""
    if isinstance(func, torch._ops.OpOverload):
        return bool(func._schema.is_mutable)
    if isinstance(func, torch._ops.OpOverloadPacket):
        return any(getattr(func, name)._schema.is_mutable for name in func.overloads())
    name = getattr(func, "__name__", "")
    return name in _WRITES or "out" in (kwargs or ()) or (name.endswith("_") and not name.endswith("__"))
def digest(tensor: Tensor) -> Hashable:
    """Equal for tensors of equal dtype, shape and bits."""
    with plain():
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return tensor.dtype, tensor.shape, hashlib.sha1(flat.numpy().data, usedforsecurity=False).digest()


@contextmanager
def plain() -> Iterator[None]:
    """Outside of all tracing."""
    with torch._C.DisableTorchFunction(), _disable_current_modes(), torch.no_grad():
        yield
