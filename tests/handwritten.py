"""Two diffusion transformers in plain PyTorch that do what the library models never do.

``FusedDiT``: one projection for q, k and v, attention spelled out with einsum and softmax, patchify by
reshape, learned positions, and blocks that are attributes of the model rather than members of a list.

``ViewsDiT``: tokens in the second-to-last place of a five-dimensional tensor, attention over that place with
fewer key and value heads than query heads, cross attention to a text, and an output class unknown to pytree.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _embed_step(step: Tensor, width: int) -> Tensor:
    """Cosines and sines of a step in 0..1: (batch,) to (batch, width)."""
    rates = 1000.0 ** torch.linspace(0, 1, width // 2, device=step.device)
    angles = step[:, None].float() * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(step.dtype)


class FusedBlock(nn.Module):
    """Self attention and an MLP, each shifted, scaled and gated by the condition."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width)

    def attend(self, x: Tensor) -> Tensor:
        """Attention over dimension 1, scores and all."""
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, -1).unbind(2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), v)
        return self.out(mixed.reshape(x.shape))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x is (batch, tokens, width), condition (batch, width)."""
        modulation = self.modulation(F.silu(condition))[:, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        x = x + gate1 * self.attend(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class FusedDiT(nn.Module):
    """A class-conditional image DiT: ``forward(image, step, label)`` gives an image of the same shape."""

    def __init__(self, width: int = 48, heads: int = 4, channels: int = 4, patch: int = 2) -> None:
        super().__init__()
        self.patch = patch
        self.position = nn.Parameter(torch.zeros(1, 8, 8, width))  # a grid of at most 8x8 patches
        self.enter = nn.Linear(channels * patch * patch, width)
        self.step = nn.Linear(width, width)
        self.label = nn.Embedding(10, width)
        self.block1 = FusedBlock(width, heads)
        self.block2 = FusedBlock(width, heads)
        self.block3 = FusedBlock(width, heads)
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, channels * patch * patch)

    def forward(self, image: Tensor, step: Tensor, label: Tensor) -> Tensor:
        """image is (batch, channels, height, width), step (batch,) in 0..1, label (batch,)."""
        batch, channels, height, width = image.shape
        rows, columns = height // self.patch, width // self.patch
        x = image.reshape(batch, channels, rows, self.patch, columns, self.patch)
        x = x.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)
        x = self.enter(x) + self.position[:, :rows, :columns].flatten(1, 2)
        condition = self.step(_embed_step(step, x.shape[-1])) + self.label(label)
        for block in (self.block1, self.block2, self.block3):
            x = block(x, condition)
        x = self.leave(self.norm(x)).reshape(batch, rows, columns, self.patch, self.patch, channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(image.shape)


class GroupedAttention(nn.Module):
    """Attention over the second-to-last place with grouped heads, any number of places before it."""

    def __init__(self, width: int, source: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(source, width // heads * kv_heads, bias=False)
        self.v = nn.Linear(source, width // heads * kv_heads, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        """x is (..., tokens, width), source (..., keys, its width), with the same leading places."""
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(-2, -3)
        k = self.k(source).unflatten(-1, (self.kv_heads, -1)).transpose(-2, -3)
        v = self.v(source).unflatten(-1, (self.kv_heads, -1)).transpose(-2, -3)
        mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.out(mixed.transpose(-2, -3).flatten(-2))


class ViewsBlock(nn.Module):
    """Self attention within each frame and view, cross attention to the text, and a gated MLP."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.RMSNorm(width), nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = GroupedAttention(width, width, heads, kv_heads)
        self.cross = GroupedAttention(width, width, heads, kv_heads)
        self.rise, self.gate = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.fall = nn.Linear(2 * width, width)
        self.modulation = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, text: Tensor, condition: Tensor) -> Tensor:
        """x is (batch, frames, views, tokens, width), text (batch, 1, 1, words, width)."""
        scale, gate = self.modulation(F.silu(condition))[:, None, None, None].chunk(2, dim=-1)
        y = self.norm1(x) * (1 + scale)
        x = x + gate * self.attention(y, y)
        x = x + self.cross(self.norm2(x), text.expand(*x.shape[:3], -1, -1))
        y = self.norm3(x)
        return x + self.fall(F.silu(self.gate(y)) * self.rise(y))


@dataclass
class ViewsOutput:
    """The model's output, of a class which pytree does not know."""

    sample: Tensor
    pooled: Tensor


class ViewsDiT(nn.Module):
    """A multi-view video DiT on latent tokens: (batch, frames, views, tokens, channels) in and out."""

    def __init__(self, width: int = 64, heads: int = 4, kv_heads: int = 2) -> None:
        super().__init__()
        self.enter = nn.Linear(8, width)
        self.text = nn.Linear(20, width)
        self.step = nn.Linear(width, width)
        self.blocks = nn.ModuleList([ViewsBlock(width, heads, kv_heads) for _ in range(3)])
        self.norm = nn.RMSNorm(width)
        self.leave = nn.Linear(width, 8)

    def forward(self, latents: Tensor, step: Tensor, text: Tensor) -> ViewsOutput:
        """latents is (batch, frames, views, tokens, 8), step (batch,) in 0..1, text (batch, words, 20)."""
        x = self.enter(latents)
        condition = self.step(_embed_step(step, x.shape[-1]))
        words = self.text(text)[:, None, None]
        for block in self.blocks:
            x = block(x, words, condition)
        x = self.leave(self.norm(x))
        return ViewsOutput(sample=x, pooled=x.mean(dim=-2))


class ViewsTuple(nn.Module):
    """``ViewsDiT`` with a tuple for its output, for tools that need a known output type."""

    def __init__(self, model: ViewsDiT) -> None:
        super().__init__()
        self.model = model

    def forward(self, latents: Tensor, step: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """As the model's, as a tuple."""
        output = self.model(latents, step, text)
        return output.sample, output.pooled
