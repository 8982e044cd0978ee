"""Weights that code casts or moves for a moment while it runs, as hooks of layerwise casting do around each module.

On one device such a weight is another tensor meanwhile, and afterwards what it was. While a model is traced its
stand-in cannot become another; so one of the other type is put in its place, which the trace makes out of it, and
the stand-in is put back where casting back gives each value that it had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from xdit_compile.ir.packed_tensors import is_packed, parts

_KEPT = "_xdit_compile_kept_as"
"""The attribute under which what was cast for a moment holds the stand-in that it was."""

_CASTS = frozenset({"to", "float", "half", "double", "bfloat16", "cpu", "cuda"})
"""Methods of modules that cast or move all weights."""


@contextmanager
def casts_noted() -> Iterator[None]:
    """Within, ``module.to(...)`` and its like put what they make of stand-ins in their place."""
    apply = nn.Module._apply

    def applied(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if not _is_cast(fn) or not any(map(_is_traced, _held(module, recurse))):
            return apply(module, fn, recurse)
        for inner in module.modules() if recurse else (module,):
            for group in (inner._parameters, inner._buffers):
                for name, tensor in group.items():
                    if tensor is not None:
                        group[name] = _after(tensor, fn(tensor))
        return module

    nn.Module._apply = applied  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module._apply = apply  # type: ignore[method-assign]


def _after(tensor: Tensor, made: Tensor) -> Any:
    """What is in the place of ``tensor`` once it was cast."""
    if made is tensor or (made.dtype, made.device.type) == (tensor.dtype, tensor.device.type):
        return tensor  # moved to where it is, by another spelling of the device, as hooks of offloading do
    kept = vars(tensor).get(_KEPT, tensor)
    if (made.dtype, made.device) == (kept.dtype, kept.device) and holds_all(tensor.dtype, kept.dtype):
        return kept
    if isinstance(tensor, nn.Parameter):
        vars(made)["_is_param"] = True
    vars(made)[_KEPT] = kept
    return made


def holds_all(dtype: torch.dtype, of: torch.dtype) -> bool:
    """Whether each number of the type ``of`` is one of ``dtype``."""
    if dtype == of:
        return True
    if not (dtype.is_floating_point and of.is_floating_point):
        return False
    mine, other = torch.finfo(dtype), torch.finfo(of)
    # The least of all numbers lies below the least that has full precision.
    return mine.eps <= other.eps and mine.max >= other.max and mine.tiny * mine.eps <= other.tiny * other.eps


def _is_cast(fn: Callable[..., Any]) -> bool:
    method = getattr(fn, "__qualname__", "").split(".")
    return getattr(fn, "__module__", "") == nn.Module.__module__ and len(method) > 1 and method[1] in _CASTS


def _held(module: nn.Module, recurse: bool) -> Iterator[Tensor]:
    yield from module.parameters(recurse)
    yield from module.buffers(recurse)


def _is_traced(tensor: Tensor) -> bool:
    inner = next(iter(parts(tensor).values())) if is_packed(tensor) else tensor
    return isinstance(inner, (FakeTensor, FunctionalTensor))
