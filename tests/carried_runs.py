"""A block that has other ranks' values of a type of its own, and what workers of the pool run of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from emulation import difference
from torch import nn

import xdit_compile


class Flipped(nn.Module):
    """Attention, and its result from the other end of the sequence as numbers of type ``dtype``."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.inside, self.outside, self.dtype = nn.Linear(16, 16), nn.Linear(16, 16), dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        q = self.inside(x).view(batch, tokens, 4, 4).transpose(1, 2)
        a = F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(batch, tokens, width)
        if self.dtype.is_complex:
            other = torch.view_as_complex(a.double().reshape(batch, tokens, width // 2, 2)).to(self.dtype).flip(1)
            a = torch.view_as_real(other.contiguous()).reshape(batch, tokens, width).to(x.dtype)
        else:
            a = a + (a * 8).to(self.dtype).flip(1).to(a.dtype)
        return x + self.outside(a)


def made(dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Flipped(dtype).eval(), torch.randn(2, 10, 16)


@torch.no_grad()
def differences(dtypes: tuple[torch.dtype, ...], spec: str) -> list[float]:
    found = []
    for dtype in dtypes:
        model, x = made(dtype)
        expected = model(x)
        parallel = xdit_compile.parallelize(model, spec, ranks=range(2), timeout=60)
        found.append(difference(parallel(x) + 0, expected))
    return found
