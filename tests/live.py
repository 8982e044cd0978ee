"""Memory as it is used: the bytes of all tensors that live at once, while anything runs in eager PyTorch."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

c10d = torch.ops._c10d_functional


class Live(TorchDispatchMode):
    """Counts storages that operators make from when they are made to when the last tensor on them is gone.

    Collectives return tensors of the right size with nothing in them, so that one rank can be run by itself.
    """

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._theirs = {t.untyped_storage().data_ptr() for t in given}
        self._tensors: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = (_collective(func, args) if func.namespace == "_c10d_functional" else None)
        made = func(*args, **(kwargs or {})) if made is None else made
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._hold(tensor)
        return made

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        at, size = storage.data_ptr(), storage.nbytes()
        if at in self._theirs or not size:
            return
        if at not in self._tensors:
            self.now += size
            self.peak = max(self.peak, self.now)
        self._tensors[at] = self._tensors.get(at, 0) + 1
        weakref.finalize(tensor, self._let_go, at, size)

    def _let_go(self, at: int, size: int) -> None:
        self._tensors[at] -= 1
        if not self._tensors[at]:
            del self._tensors[at]
            self.now -= size


def _collective(func: Any, args: Any) -> Tensor | None:
    x = args[0]
    if func is c10d.all_gather_into_tensor.default:
        return torch.empty(x.shape[0] * args[1], *x.shape[1:], dtype=x.dtype)
    if func is c10d.all_to_all_single.default:
        return torch.empty(sum(args[1]), *x.shape[1:], dtype=x.dtype)
    return torch.empty_like(x) if func is c10d.all_reduce.default else x


def peak(function: Callable[..., Any], *given: Tensor) -> int:
    """The most bytes that lived at once while ``function()`` ran, without those of ``given``; its result included."""
    with torch.no_grad(), Live(*given) as live:
        function()
    return live.peak
