"""What a test model is: a class in a tiny configuration, inputs for it, and parameters drawn anew.

Shared by the modules that list cases. Sizes: ``odd=True`` gives an image grid of 5x7 patches (video: 5 frames of
5x7 = 175 tokens) and 11 text tokens; ``odd=False`` gives 4x6 patches (video: 2 frames of 4x6 = 48 tokens) and 8
text tokens. Exceptions are noted at the inputs: they are sizes which a model's own parameters or code fix.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One model under test and the way to call it."""

    name: str
    build: Callable[[], nn.Module]  # the model as its class initialises it
    inputs: Callable[[int, bool], Inputs]  # (batch, odd) -> keyword arguments of forward
    heads: int  # the smallest head count among the main attentions
    tolerance: float = 1e-5
    """Of the output's scale; more where a model rounds to bfloat16 inside, so that an ulp becomes a rounding."""


# --------------------------------------------------------------------------------------------------
# Parameters


def _spread(module: nn.Module, name: str, parameter: Tensor) -> tuple[float, float]:
    """Mean and standard deviation with which to draw a parameter."""
    if name == "weight" and parameter.ndim == 1:  # a norm's gain
        return 1.0, 0.1
    if isinstance(module, nn.Embedding):
        return 0.0, 1.0
    if name.endswith("weight"):  # linear and convolution: keeps the variance of a unit input
        return 0.0, parameter[0].numel() ** -0.5
    if name.endswith("bias"):
        return 0.0, 0.1
    if name == "pos_frequencies":  # Mochi multiplies these by positions of up to a hundred
        return 0.0, 0.05
    return 0.0, 0.5  # tables, learned positions, padding tokens


@torch.no_grad()
def redraw(model: nn.Module, seed: int = 0) -> None:
    """Draw every parameter anew, in place, each from its own generator seeded by ``seed`` and its name."""
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            mean, std = _spread(module, name, parameter)
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{prefix}.{name}".encode()))
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.copy_(mean + std * noise)


def made(case: Case, seed: int = 0) -> nn.Module:
    """The case's model, float32, in eval mode, with parameters drawn from ``seed``."""
    model = case.build().to(torch.float32).eval().requires_grad_(False)
    redraw(model, seed)
    return model


# --------------------------------------------------------------------------------------------------
# Inputs


def randn(seed: int, *shape: int) -> Tensor:
    """A normal tensor that depends on the seed and the shape only."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def timesteps(batch: int) -> Tensor:
    """Integer timesteps, a different one for each batch element."""
    return 700 - 150 * torch.arange(batch)


def patch_grid(odd: bool) -> tuple[int, int]:
    """Rows and columns of patches."""
    return (5, 7) if odd else (4, 6)


def frame_count(odd: bool) -> int:
    """Latent frames of a video."""
    return 5 if odd else 2


def text_length(odd: bool) -> int:
    """Text tokens."""
    return 11 if odd else 8


def padding_mask(batch: int, length: int, dtype: torch.dtype) -> Tensor:
    """A (batch, length) padding mask, 1 = keep: length - 2 tokens in the first row, 3 fewer in each next."""
    kept = (length - 2 - 3 * torch.arange(batch)).clamp(min=1)
    return (torch.arange(length)[None] < kept[:, None]).to(dtype)


def rotary(tokens: int, dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (tokens, dim), of a rotary embedding that turns neighbouring pairs."""
    rates = 100.0 ** (-torch.arange(0, dim, 2) / dim)
    angles = torch.outer(torch.arange(tokens).float(), rates).repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


def basic(names: Iterable[str]) -> list[str]:
    """Those that are no mode of another: no other name begins them, as ``flux2`` does ``flux2_edit``."""
    names = list(names)
    return [n for n in names if not any(n != other and n.startswith(f"{other}_") for other in names)]
