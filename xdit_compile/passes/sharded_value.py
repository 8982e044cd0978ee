"""A tensor of the global program, as one rank holds it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

from xdit_compile.ir.layout import Dim, Layout, Position


@dataclass(frozen=True, eq=False)
class Value:
    """``node`` makes this rank's piece (None while only costs are counted); ``layout`` says which piece it is."""

    node: fx.Node | None
    layout: Layout
    dtype: torch.dtype

    @property
    def dims(self) -> tuple[Dim, ...]:
        return self.layout.dims

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.shape

    @property
    def ndim(self) -> int:
        return len(self.layout.dims)

    @property
    def sharded(self) -> bool:
        return self.layout.sharded

    def local_shape(self, position: Position) -> tuple[int, ...]:
        return self.layout.local_shape(position)

    def local_bytes(self, position: Position) -> int:
        return math.prod(self.local_shape(position)) * self.dtype.itemsize


class NoRule(Exception):
    """A rule's word that it cannot follow these layouts; the driver gathers and computes whole."""
