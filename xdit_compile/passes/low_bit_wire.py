"""Tensors in fewer bits while they travel: eight for each number, and a scale for each row of them.

Rows are of one token and one head. What travels is bytes, so that numbers of several types share one buffer, and no
collective has to know any of them.
"""

from __future__ import annotations

import torch

WHOLE, FP8, INT8 = "whole", "fp8", "int8"
SCALE = torch.bfloat16
LARGEST = {FP8: torch.finfo(torch.float8_e4m3fn).max, INT8: 127.0}


def row_bytes(width: int, form: str, element_size: int) -> int:
    """Bytes of a row of ``width`` numbers, its scale included."""
    return width * element_size if form == WHOLE else width + SCALE.itemsize


def encode(x: torch.Tensor, form: str) -> torch.Tensor:
    """(..., width) of any floating type as bytes, (..., ``row_bytes``)."""
    if form == WHOLE:
        return x.contiguous().view(torch.uint8)
    wide = x.to(torch.float32)
    scale = (wide.abs().amax(-1, keepdim=True).clamp_min(1e-30) / LARGEST[form]).to(SCALE)
    # The scale is rounded as well, so that the largest may be a little beyond.
    scaled = (wide / scale.to(torch.float32)).clamp(-LARGEST[form], LARGEST[form])
    low = scaled.to(torch.float8_e4m3fn) if form == FP8 else scaled.round().to(torch.int8)
    return torch.cat([low.view(torch.uint8), scale.view(torch.uint8)], -1)


def decode(x: torch.Tensor, form: str, dtype: torch.dtype) -> torch.Tensor:
    """What ``encode`` has made of a tensor of ``dtype``, as numbers again."""
    if form == WHOLE:
        return x.contiguous().view(dtype)
    width = x.shape[-1] - SCALE.itemsize
    low = x[..., :width].contiguous().view(torch.float8_e4m3fn if form == FP8 else torch.int8)
    scale = x[..., width:].contiguous().view(SCALE)
    return (low.to(torch.float32) * scale.to(torch.float32)).to(dtype)
