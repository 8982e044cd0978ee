"""Pieces of tensors that come patch by patch, followed through element-wise operators.

What PipeFusion's last stage sends is one patch of a result after the other. Between two calls of the model a pipeline
combines guidance and steps its scheduler, element by element: so patch p of the next sample needs no more than patch p
of the results before, and can enter the first stage while later patches are still on their way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

aten = torch.ops.aten


@dataclass(frozen=True)
class Cut:
    """A dimension, counted from the last (-1), and the borders of its patches."""

    dim: int
    borders: tuple[int, ...]

    @property
    def size(self) -> int:
        return self.borders[-1]

    @property
    def patches(self) -> int:
        return len(self.borders) - 1

    def piece(self, x: torch.Tensor, patch: int) -> torch.Tensor:
        """Patch ``patch`` of ``x``, a view."""
        a, b = self.borders[patch : patch + 2]
        return x.narrow(self.dim, a, b - a)

    def joined(self, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(pieces), self.dim)


@dataclass(frozen=True)
class Followed:
    """How an operator's operands and results are cut, and what its other arguments are for one patch."""

    source: Cut
    cut: Cut
    sized: int | None = None
    """Of a list of sizes, the second argument: which entry is that of the cut dimension."""

    def arguments(self, args: Sequence[Any], patch: int) -> tuple[Any, ...]:
        """``args`` with the size of the piece where they name that of the whole."""
        if self.sized is None:
            return tuple(args)
        a, b = self.source.borders[patch : patch + 2]
        sizes = [b - a if i == self.sized else n for i, n in enumerate(args[1])]
        return (args[0], sizes, *args[2:])


def follow(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any], cuts: Mapping[int, Cut],
           result: torch.Tensor) -> Followed | None:
    """How the results of ``op`` are cut if its tensors ``cuts`` (by ``id``) come in pieces; None if no piece of them
    can be computed from the pieces.

    Args:
        args, kwargs: tensors in them need shapes only.
        result: the first result, of which only the shape counts.
    """
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    found = set(cuts.values())
    if len(found) != 1:
        return None
    (cut,) = found
    if torch.Tag.pointwise in op.tags:
        # Operands that are here must be whole along the dimension, or repeated along it.
        fits = all(t.ndim < -cut.dim or t.shape[cut.dim] in (1, cut.size) for t in tensors)
        whole = all(t.ndim >= -cut.dim and t.shape[cut.dim] == cut.size for t in tensors if id(t) in cuts)
        return Followed(cut, cut) if fits and whole else None
    x = next(t for t in tensors if id(t) in cuts)
    at = x.ndim + cut.dim
    if op in _SAME:
        return Followed(cut, cut)
    if op in _ALONG:
        dim = _dim(op, args, kwargs) % (result.ndim if op is aten.stack.default else x.ndim)
        if any(t.ndim != x.ndim or t.shape[at] != cut.size for t in tensors):
            return None
        if op is aten.stack.default:
            return Followed(cut, replace(cut, dim=cut.dim if dim <= at else cut.dim - 1))
        removed = result.ndim < x.ndim
        return None if dim == at else Followed(cut, replace(cut, dim=cut.dim + (removed and dim > at)))
    if op in _MOVED:
        # Where the dimension went, seen on a tensor of which only that one has this size.
        if op in _SQUEEZING and (len(args) < 2 or at in {d % x.ndim for d in pytree.tree_leaves(args[1])}):
            return None  # a piece of one row would lose the dimension
        probe = torch.empty([2 if i == at else 1 if n == 1 else 3 for i, n in enumerate(x.shape)], device="meta")
        shape = op(probe, *args[1:], **kwargs).shape
        places = [i for i, n in enumerate(shape) if n == 2]
        return Followed(cut, replace(cut, dim=places[0] - len(shape))) if len(places) == 1 else None
    if op in _SIZED:
        after = math.prod(x.shape[at + 1 :])
        for i, n in enumerate(result.shape):
            if n == cut.size and math.prod(result.shape[i + 1 :]) == after and op is not aten.expand.default:
                return Followed(cut, replace(cut, dim=i - result.ndim), i)
        if op is aten.expand.default:
            return Followed(cut, cut, len(args[1]) + cut.dim)
    return None


_SAME = {aten.alias.default, aten.detach.default, aten.clone.default, aten._to_copy.default}
_ALONG = {aten.slice.Tensor, aten.select.int, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int,
          aten.cat.default, aten.stack.default}
_MOVED = {aten.permute.default, aten.transpose.int, aten.t.default, aten.unsqueeze.default, aten.squeeze.default,
          aten.squeeze.dim, aten.squeeze.dims}
_SQUEEZING = {aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims}
_SIZED = {aten.view.default, aten._unsafe_view.default, aten.expand.default}


def _dim(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """The dimension along which the operator works."""
    place = next(i for i, a in enumerate(op._schema.arguments) if a.name == "dim")
    return args[place] if len(args) > place else kwargs.get("dim", 0)

