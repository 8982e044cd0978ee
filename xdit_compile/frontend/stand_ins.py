"""What stands in for a tensor of the model's while its forward is traced: one like it, of traced parts.

A packed tensor is put together again around what its parts are in the trace, so that its own operators run and leave
plain ones in the graph. Where it has memory of its own, what stands in is of a class derived from its class, so that
this class's functions are called as ever, and unwrapped where they call PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils._pytree import tree_map_only

from xdit_compile.ir.packed_tensors import INSIDE, Make, with_parts

_TRACED = (FakeTensor, FunctionalTensor)


def stand_in(tensor: Tensor, make: Make) -> Tensor:
    """One for ``tensor``, of what ``make`` makes of its parts."""
    return with_parts(tensor, make, _around)


def is_stand_in(tensor: Tensor) -> bool:
    """Whether it is one with memory of its own."""
    return isinstance(tensor, (_Held, _HeldParameter))


def inside(tensor: Tensor) -> Tensor:
    """What such a stand-in is made of; all others as they are."""
    return vars(tensor)[INSIDE] if is_stand_in(tensor) else tensor


class _Unwrapping:
    """Functions and operators of PyTorch are called on what is inside."""

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Tensor, inside, (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Tensor, inside, (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)


class _Held(_Unwrapping, Tensor):  # type: ignore[misc]
    pass


class _HeldParameter(_Unwrapping, nn.Parameter):  # type: ignore[misc]
    pass


@cache
def _class(cls: Any) -> Any:
    """Between a class of tensors and PyTorch's own: its functions call those of ``_Unwrapping`` as their parent's."""
    base = _HeldParameter if issubclass(cls, nn.Parameter) else _Held
    made = type(cls)(cls.__name__, (cls, base), {
        "__module__": cls.__module__, "__qualname__": cls.__qualname__,
        "__torch_dispatch__": vars(_Unwrapping)["__torch_dispatch__"]})
    return made


def _around(original: Tensor, memory: Tensor) -> Tensor:
    made = _wrapped(type(original), memory)
    vars(made).update({k: v for k, v in vars(original).items() if k != INSIDE})
    return made


def _wrapped(cls: Any, memory: Tensor) -> Tensor:
    cls = cls if issubclass(cls, (_Held, _HeldParameter)) else _class(cls)
    made = Tensor._make_wrapper_subclass(
        cls, memory.shape, memory.stride(), memory.storage_offset(), dtype=memory.dtype, device=memory.device)
    vars(made)[INSIDE] = memory
    return made


@contextmanager
def subclasses_made() -> Iterator[None]:
    """Within, classes of tensors make their own of tensors of a trace."""
    make = Tensor._make_subclass

    def made(cls: Any, data: Tensor, require_grad: bool = False, *others: Any, **named: Any) -> Tensor:
        memory = inside(data)
        if not isinstance(memory, _TRACED):
            return make(cls, data, require_grad, *others, **named)
        return memory if cls in (Tensor, nn.Parameter) else _wrapped(cls, memory)

    Tensor._make_subclass = staticmethod(made)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        del Tensor._make_subclass
