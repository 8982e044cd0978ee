"""How far apart two tensors are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from xdit_compile.ir.layout import Layout, Position

TINY = 1e-30
"""Below this a reference counts as zero, and any difference from it as large."""


@dataclass(frozen=True)
class Difference:
    """``absolute``: the largest difference; ``relative``: the same over the reference's largest value."""

    absolute: float
    relative: float

    def exceeds(self, tolerance: float) -> bool:
        return not self.relative <= tolerance


def difference(actual: torch.Tensor, expected: torch.Tensor, scale: float | None = None) -> Difference:
    """How far ``actual`` is from ``expected``, relative to ``scale`` (its own magnitude by default).
    Infinities and NaN equal themselves and are infinitely far from all else."""
    scale = magnitude(expected) if scale is None else scale
    if not expected.numel():
        return Difference(0.0, 0.0)
    a, b = _wide(actual), _wide(expected)
    same = (a == b) | (a.isnan() & b.isnan())
    absolute = torch.where(same, 0.0, (a - b).abs()).max().item()
    return Difference(math.inf, math.inf) if math.isnan(absolute) else Difference(
        absolute, absolute / max(scale, TINY))


def magnitude(x: torch.Tensor) -> float:
    """The largest finite absolute value."""
    wide = _wide(x).abs()
    return torch.where(wide.isfinite(), wide, 0.0).max().item() if x.numel() else 0.0


def piece_of(x: torch.Tensor, layout: Layout, position: Position) -> torch.Tensor:
    """What the rank at ``position`` holds of the whole tensor ``x``."""
    for i, dim in enumerate(layout.dims):
        if dim.sharded:
            spans = dim.spans(position)
            x = torch.cat([x.narrow(i, a, b - a) for a, b in spans], i) if spans else x.narrow(i, 0, 0)
    return x


def _wide(x: torch.Tensor) -> torch.Tensor:
    """In a type that can tell them apart: halves in single precision, whole numbers in double."""
    if x.is_complex():
        return torch.view_as_real(x.resolve_conj())
    if x.is_floating_point():
        return x.float() if x.dtype.itemsize < 4 else x
    return x.double()
