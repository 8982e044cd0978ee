"""What a program assumes of the values of its inputs and of the model's buffers: what the model read of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_flatten, tree_map_only


@dataclass(frozen=True)
class Slot:
    """Stands for a tensor: the n-th that is made when the steps are run."""

    index: int


@dataclass(frozen=True)
class Step:
    """One operation on known tensors, ``Slot`` in their places. ``made``: per flat result, its slot if it is a tensor.
    A step without a function takes the argument of the call whose index is its only argument, or what the model has
    under that name."""

    func: Callable[..., Any] | None
    args: Any
    kwargs: Any
    made: tuple[Slot | None, ...]
    answer: tuple[Any, ...] | None = None
    """Of a read: the flat results the program was made for."""

    def __str__(self) -> str:
        return f"{getattr(self.func, '__name__', 'argument')}{self.args}" + (
            f" is {self.answer}" if self.answer is not None else "")


@dataclass(frozen=True)
class Guards:
    """The steps that lead from arguments to the reads, in order."""

    steps: tuple[Step, ...] = ()

    def hold(self, tensors: Sequence[torch.Tensor], model: torch.nn.Module | None = None) -> bool:
        """Whether the reads have the same answers for these arguments, all of the call's in order, and what the model
        holds now."""
        made: dict[Slot, torch.Tensor] = {}
        with torch.no_grad():
            for step in self.steps:
                if step.func is None:
                    # A copy: some step may write into it.
                    (place,) = step.args
                    held = tensors[place] if isinstance(place, int) else attrgetter(place)(model)
                    results: list[Any] = [held.clone()]
                else:
                    args, kwargs = tree_map_only(Slot, made.__getitem__, (step.args, step.kwargs))
                    try:
                        results, _ = tree_flatten(step.func(*args, **kwargs))
                    except Exception:  # other values may not even fit the model's next step
                        return False
                if step.answer is not None and not _same(results, step.answer):
                    return False
                made |= {slot: r for slot, r in zip(step.made, results, strict=False) if slot is not None}
        return True

    def __str__(self) -> str:
        return "; ".join(str(s) for s in self.steps if s.answer is not None)


def _same(found: Sequence[Any], answer: Sequence[Any]) -> bool:
    return len(found) == len(answer) and all(_bits(a) == _bits(b) for a, b in zip(found, answer, strict=True))


def _bits(value: Any) -> Any:
    """Equal for answers that compute alike: NaN is itself, and 0.0 is not -0.0."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).tolist()
    if isinstance(value, (np.ndarray, np.generic)):
        return value.dtype.str, value.shape, value.tobytes()
    return type(value), repr(value) if isinstance(value, (float, complex)) else value
