"""Values that tracing may know: what small inputs hold, and everything computed from them alone.

Some models read tensor values into Python (how many text tokens a mask keeps). Static graphs cannot hold such a
read, but they can be specialised to it: while the model is traced, values of small inputs are followed beside the
fake tensors, a read is answered from them, and the program remembers which inputs it now depends on, so that
other values get a program of their own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

LARGEST = 1 << 20
"""Elements up to which a derived value is followed."""

READS = {Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__,
         torch.equal, torch.is_nonzero, Tensor.is_nonzero}
"""Functions that turn values into Python objects."""

SIZED = {torch.nonzero, Tensor.nonzero, torch.argwhere, Tensor.argwhere, torch.masked_select, Tensor.masked_select,
         torch.unique, Tensor.unique, torch.repeat_interleave, Tensor.repeat_interleave}
"""Functions whose result's shape depends on values."""


@dataclass(frozen=True)
class Value:
    """A known tensor and the inputs (by index) it was computed from."""

    tensor: Tensor
    sources: frozenset[int]


def of_inputs(tensors: Sequence[Tensor]) -> list[Value | None]:
    """What is worth following: masks, lengths, indices and other small inputs that hold values."""
    def small(t: Tensor) -> bool:
        return t.numel() <= (4096 if t.is_floating_point() else 65536) and not t.is_meta and (
            not isinstance(t, FakeTensor))

    return [Value(t.detach().clone(), frozenset({i})) if small(t) else None for i, t in enumerate(tensors)]


class Known(TorchFunctionMode):
    """While active, answers reads of known values. ``read`` collects the inputs whose values were read."""

    def __init__(self) -> None:
        super().__init__()
        # Keeps the tensors too: a traced tensor's Python object may else be dropped and made anew, unknown.
        self._values: dict[int, tuple[Tensor, Value]] = {}
        self.read: set[int] = set()

    def assign(self, tensor: Tensor, value: Value | None) -> None:
        if value is not None:
            self._values[id(tensor)] = tensor, value

    def value(self, tensor: Tensor) -> Value | None:
        return self._values.get(id(tensor), (None, None))[1]

    def digest(self, tensor: Tensor) -> Hashable:
        """Equal for tensors known to be equal; None if nothing is known."""
        value = self.value(tensor)
        return None if value is None else digest(value.tensor)

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        values = [self.value(t) for t in tensors]
        if func is Tensor.__getitem__ and any(v is not None for v in values[1:]):
            return func(args[0], self._by_position(args[1]))
        if not tensors or any(v is None for v in values):
            if _writes(func) and any(v is not None for v in values):
                # Something unknown was written; views of it may be anywhere.
                self._values.clear()
            return func(*args, **kwargs)
        sources = frozenset().union(*(v.sources for v in values if v))
        if func in READS or (func in SIZED and (func not in _REPEATS or len(tensors) > 1 or not values)):
            self.read |= sources
            return self._fresh(self._compute(func, args, kwargs), tensors[0], sources)
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.numel() <= LARGEST:
            real = self._compute(func, args, kwargs)
            if isinstance(real, Tensor):
                self.assign(result, Value(real, sources))
        return result

    def _compute(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        real_args, real_kwargs = tree_map_only(Tensor, lambda t: self._values[id(t)][1].tensor, (args, kwargs))
        with _plain():
            return func(*real_args, **real_kwargs)

    def _fresh(self, answer: Any, like: Tensor, sources: frozenset[int]) -> Any:
        """The answer to a read: Python objects as they are, tensors as constants of the program."""
        def constant(t: Tensor) -> Tensor:
            made = torch.tensor(t.tolist(), dtype=t.dtype, device=like.device).reshape(t.shape)
            self.assign(made, Value(t, sources))
            return made

        return tree_map_only(Tensor, constant, answer)

    def _by_position(self, index: Any) -> Any:
        """An index with known boolean masks turned into positions."""
        def positions(t: Any) -> Sequence[Any]:
            value = self.value(t) if isinstance(t, Tensor) and t.dtype is torch.bool and t.ndim else None
            if value is None:
                return (t,)
            self.read |= value.sources
            with _plain():
                found = value.tensor.nonzero(as_tuple=True)
            return [self._fresh(f, t, value.sources) for f in found]

        items = index if isinstance(index, tuple) else (index,)
        changed = tuple(p for item in items for p in positions(item))
        return changed if isinstance(index, tuple) or len(changed) > 1 else changed[0]


_REPEATS = {torch.repeat_interleave, Tensor.repeat_interleave}


def _writes(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


def digest(tensor: Tensor) -> Hashable:
    """Equal for tensors of equal dtype, shape and bits."""
    with _plain():
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return tensor.dtype, tensor.shape, hashlib.sha1(flat.numpy().data, usedforsecurity=False).digest()


@contextmanager
def _plain() -> Iterator[None]:
    """Outside of all tracing."""
    with torch._C.DisableTorchFunction(), _disable_current_modes(), torch.no_grad():
        yield
