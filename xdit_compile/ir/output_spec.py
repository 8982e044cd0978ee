"""What a call gives back: flat results as the object that the model returns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from xdit_compile.errors import XditError
from xdit_compile.ir.pytree import Structure, write_back


@dataclass(frozen=True)
class OutputSpec:
    """How the flat results of a program become what its model returns.

    Attributes:
        outputs: makes of the results a pair: the object returned, and the arguments as the model left them if it
            changed what is in them, else None.
        written: which arguments the model writes into; the first results are their new values.
        likes: fake tensors shaped as the results.
        apart: which results are copied, by their place: the caller may write into them.
    """

    outputs: Structure
    written: tuple[int, ...]
    likes: tuple[torch.Tensor, ...]
    apart: tuple[int, ...] = ()

    @property
    def changes_arguments(self) -> bool:
        """Whether a call writes into what it is given: a cache of keys and values, say."""
        return bool(self.written) or self.outputs.build(range(self.outputs.tensor_count))[1] is not None

    def check(self, tensors: Sequence[torch.Tensor], state: Iterable[torch.Tensor]) -> None:
        """Refuse a call that writes into memory which something else that the program reads lies in: ``tensors`` are
        its arguments, ``state`` all other.

        Raises:
            XditError: naming the argument.
        """
        held = [*state] if self.written else []
        for index in self.written:
            own = tensors[index]
            # Of arguments that are one object, the program knows.
            if any(_overlap(own, t) for t in (*(t for t in tensors if t is not own), *held)):
                raise XditError(f"the model writes into tensor {index} of its arguments, {list(own.shape)}, whose "
                                "memory another argument, a parameter, a buffer or a tensor of the model shares; a "
                                "program would not see the change there. Pass a copy (.clone()) of one of them")

    def finish(self, arguments: Any, tensors: Sequence[torch.Tensor], results: Sequence[torch.Tensor]) -> Any:
        """What the model returns; what it does to its ``arguments`` (``tensors`` when flat) is done to them."""
        if self.apart:
            results = [r.clone() if i in self.apart and type(r) is torch.Tensor else r for i, r in enumerate(results)]
        for index, value in zip(self.written, results, strict=False):
            tensors[index].copy_(value)
        result, left = self.outputs.build(results[len(self.written):])
        if left is not None:
            write_back(arguments, left)
        return result


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.is_meta or b.is_meta or a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    (first, end), (other, last) = _bytes(a), _bytes(b)
    return first < last and other < end


def _bytes(tensor: torch.Tensor) -> tuple[int, int]:
    """From where to where in its storage a tensor lies."""
    start = int(tensor.storage_offset())
    span = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1 if tensor.numel() else 0
    return start * tensor.itemsize, int(start + span) * tensor.itemsize
