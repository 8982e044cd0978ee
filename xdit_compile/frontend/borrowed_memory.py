"""Memory that PyTorch shares with numpy: a graph has one value for each constant, read when it is called.

``torch.from_numpy`` and its like make tensors of memory that forward may write into behind PyTorch's back, and while a
trace is under way even ``torch.tensor`` copies nothing before the graph runs. So arrays that are to be copied are
copied at once; all others have to hold what they held when they became tensors, for as long as the forward runs.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from xdit_compile.errors import CaptureError
from xdit_compile.frontend.concrete_values import plain
from xdit_compile.frontend.objects import line_of

_COPYING = frozenset({torch.tensor, Tensor.new_tensor})
"""Makers of tensors of which arrays are no part later."""
_SHARING = frozenset({torch.as_tensor, torch.asarray})
"""Makers of tensors that share memory with what they are made of; of others nobody is told before their tensors are
used."""
_SMALL = 1 << 16
"""Bytes up to which memory is looked at with each operator, not only when all have run."""


@dataclass(frozen=True)
class _Borrowed:
    memory: Tensor | np.ndarray
    before: bytes
    line: str

    def changed(self) -> bool:
        return _content(self.memory) != self.before


def borrowed_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Those of a model's buffers whose memory belongs to something else, an array or a file."""
    return {name: b for name, b in model.named_buffers() if _borrowed(b) is not None}


class BorrowedMemory:
    """What is borrowed during one trace."""

    def __init__(self) -> None:
        self._known: dict[int, Any] = {}
        self._small: list[_Borrowed] = []
        self._large: list[_Borrowed] = []
        self._changed: set[str] = set()

    def seen(self, func: Any, args: tuple[Any, ...],
             kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """The arguments of a call that is about to be made; arrays among them that it is to copy are copies."""
        if getattr(func, "__name__", "") == "__get__":  # an attribute
            return args, kwargs
        self._changed.update(b.line for b in self._small if b.changed())
        if func in _COPYING:
            return tuple(map(_copied, args)), {k: _copied(v) for k, v in kwargs.items()}
        for value in (*args, *kwargs.values()):
            for part in value if type(value) in (list, tuple) else (value,):
                if (type(part) is Tensor or func in _SHARING) and id(part) not in self._known:
                    self._known[id(part)] = part
                    self._note(part)
        return args, kwargs

    def hold(self, buffers: Mapping[str, Tensor]) -> None:
        """These are borrowed from the beginning."""
        for name, buffer in buffers.items():
            self._note(buffer, f"as the buffer {name}")

    def _note(self, value: Any, where: str = "") -> None:
        if (memory := _borrowed(value)) is not None:
            found = _Borrowed(memory, _content(memory), where or line_of(sys._getframe()))
            (self._small if memory.nbytes <= _SMALL else self._large).append(found)

    def check(self) -> None:
        """At the end of the trace.

        Raises:
            CaptureError: naming the lines that made tensors of what has no one value.
        """
        self._changed.update(b.line for b in (*self._small, *self._large) if b.changed())
        if self._changed:
            raise CaptureError("the forward writes into memory, as that of a numpy array, that it has made tensors of "
                               f"before ({', '.join(sorted(self._changed))}); a program has one value of it for a "
                               "whole call. Make copies, torch.tensor(array), or have an array for each value")


def _copied(value: Any) -> Any:
    if type(value) is np.ndarray:
        return value.copy()
    return type(value)(map(_copied, value)) if type(value) in (list, tuple) else value


def _borrowed(value: Any) -> Tensor | np.ndarray | None:
    """The memory of ``value`` that it has in common with others."""
    if isinstance(value, np.ndarray):
        return None if value.dtype.hasobject else value
    if type(value) in (Tensor, nn.Buffer):
        with plain(), suppress(NotImplementedError):  # those of vmap have no memory
            outside = value.device.type == "cpu" and not torch._is_functional_tensor(value)
            return value if outside and not value.untyped_storage().resizable() else None
        return None
    try:
        return np.frombuffer(value, np.uint8)
    except (TypeError, ValueError, BufferError):  # no buffer
        return None


def _content(memory: Tensor | np.ndarray) -> bytes:
    if isinstance(memory, Tensor):
        with plain():
            memory = memory.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memory.tobytes() if memory.nbytes <= _SMALL else hashlib.sha1(
        np.ascontiguousarray(memory).data, usedforsecurity=False).digest()
