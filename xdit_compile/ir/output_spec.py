"""What a call gives back: flat results as the object that the model returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from xdit_compile.ir.pytree import Structure, write_back


@dataclass(frozen=True)
class OutputSpec:
    """How the flat results of a program become what its model returns.

    Attributes:
        outputs: makes of the results a pair: the object returned, and the arguments as the model left them if it
            changed what is in them, else None.
        written: which arguments the model writes into; the first results are their new values.
        likes: fake tensors shaped as the results.
    """

    outputs: Structure
    written: tuple[int, ...]
    likes: tuple[torch.Tensor, ...]

    @property
    def changes_arguments(self) -> bool:
        """Whether a call writes into what it is given: a cache of keys and values, say."""
        return bool(self.written) or self.outputs.build(range(self.outputs.tensor_count))[1] is not None

    def finish(self, arguments: Any, tensors: Sequence[torch.Tensor], results: Sequence[torch.Tensor]) -> Any:
        """What the model returns; what it does to its ``arguments`` (``tensors`` when flat) is done to them."""
        for index, value in zip(self.written, results, strict=False):
            tensors[index].copy_(value)
        result, left = self.outputs.build(results[len(self.written):])
        if left is not None:
            write_back(arguments, left)
        return result
