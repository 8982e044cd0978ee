"""A random Flux of any size: diffusers' FluxTransformer2DModel and the inputs of one forward, in float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

HEAD_DIM = 64
CHANNELS = 64
TEXT_WIDTH = 512
POOLED_WIDTH = 256


@dataclass(frozen=True)
class Size:
    """How large: image and text tokens, width, and the number of double-stream and single-stream blocks."""

    tokens: int
    text: int
    hidden: int
    double: int
    single: int
    head_dim: int = HEAD_DIM

    def __post_init__(self) -> None:
        if self.hidden % self.head_dim or self.head_dim % 8:
            raise ValueError(f"the width must be a multiple of {self.head_dim}, and that of 8, got {self.hidden}")

    @property
    def heads(self) -> int:
        return self.hidden // self.head_dim


def model(size: Size) -> nn.Module:
    """The same random weights in every process."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    side = size.head_dim * 7 // 16 // 2 * 2
    made = FluxTransformer2DModel(
        in_channels=CHANNELS,
        num_layers=size.double,
        num_single_layers=size.single,
        attention_head_dim=size.head_dim,
        num_attention_heads=size.heads,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        axes_dims_rope=(size.head_dim - 2 * side, side, side),
    )
    return made.eval().requires_grad_(False)


def inputs(size: Size) -> dict[str, Any]:
    """Keyword arguments of one forward, equal in every process."""
    made = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made)

    columns = max(1, int(size.tokens**0.5))
    place = torch.arange(size.tokens)
    return {
        "hidden_states": random(1, size.tokens, CHANNELS),
        "encoder_hidden_states": random(1, size.text, TEXT_WIDTH),
        "pooled_projections": random(1, POOLED_WIDTH),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.stack([place * 0, place // columns, place % columns], dim=1).float(),
        "txt_ids": torch.zeros(size.text, 3),
        "return_dict": False,  # diffusers' context parallelism takes no other
    }
