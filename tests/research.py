"""Diffusion transformers in plain PyTorch, in the many manners of research code.

Each does something that the library's models do not: its docstring says what. The manners are those of papers and
their repositories; the text is our own. Sizes are those of ``cases`` except where a docstring gives a reason.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if __package__:
    from .cases import Case, Inputs, frame_count, padding_mask, patch_grid, randn, text_length, timesteps
else:
    from cases import Case, Inputs, frame_count, padding_mask, patch_grid, randn, text_length, timesteps


# --------------------------------------------------------------------------------------------------
# Shared parts


def embed_step(step: Tensor, width: int) -> Tensor:
    """Cosines and sines of steps in 0..1: (...) to (..., width), in their dtype."""
    rates = torch.exp(torch.arange(width // 2, device=step.device) * (-4.0 / (width // 2)))
    angles = 100 * step[..., None].float() * rates
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1).to(step.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x is (batch, tokens, width), shift and scale (batch, width)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def turn_halves(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary positions: one half of the channels turns against the other. angles is (tokens, channels / 2)."""
    cos, sin = angles.cos(), angles.sin()
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).type_as(x)


def turn_pairs(x: Tensor, turns: Tensor) -> Tensor:
    """Rotary positions: neighbouring channels are a complex number. turns is complex, (tokens, channels / 2)."""
    numbers = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(numbers * turns).flatten(-2).type_as(x)


def line_angles(length: int, count: int, device: torch.device) -> Tensor:
    """Angles of places on a line, (length, count)."""
    rates = 100.0 ** (-torch.arange(count, device=device) / count)
    return torch.outer(torch.arange(length, device=device).float(), rates)


def grid_angles(rows: int, columns: int, count: int, device: torch.device) -> Tensor:
    """Angles of places on a grid, (rows * columns, count): half of them for the row, half for the column."""
    row = line_angles(rows, count // 2, device)[:, None].expand(-1, columns, -1)
    column = line_angles(columns, count // 2, device)[None].expand(rows, -1, -1)
    return torch.cat([row, column], dim=-1).reshape(rows * columns, count)


class Patches(nn.Module):
    """An image to tokens, (batch, rows * columns, width), by convolution, and back by a linear layer and einsum."""

    def __init__(self, width: int, channels: int = 4, patch: int = 2) -> None:
        super().__init__()
        self.patch = patch
        self.enter = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)
        self.leave = nn.Linear(width, patch * patch * channels)

    def forward(self, image: Tensor) -> Tensor:
        """image is (batch, channels, height, width)."""
        return self.enter(image).flatten(2).transpose(1, 2)

    def back(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """x is (batch, rows * columns, width)."""
        x = self.leave(x).reshape(x.shape[0], rows, columns, self.patch, self.patch, -1)
        x = torch.einsum("nhwpqc->nchpwq", x)
        return x.reshape(x.shape[0], -1, rows * self.patch, columns * self.patch)


class Mlp(nn.Module):
    """Two linear layers."""

    def __init__(self, width: int, ratio: int = 2) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, ratio * width)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x is (..., width)."""
        return self.fc2(self.act(self.fc1(x)))


class Attention(nn.Module):
    """One projection for q, k and v, cut with reshape and permute; softmax of explicit scores."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.num_heads = heads
        self.scale = (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, angles: Tensor | None = None) -> Tensor:
        """x is (batch, tokens, width)."""
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        if angles is not None:
            q, k = turn_halves(q, angles), turn_halves(k, angles)
        attn = (q @ k.transpose(-2, -1)) * self.scale
        attn = attn.softmax(dim=-1)
        x = (attn @ v).transpose(1, 2).reshape(B, N, C)
        return self.proj(x)


class CrossAttention(nn.Module):
    """Attention of x to a text, with a mask of its padding."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.num_heads = heads
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        """x is (batch, tokens, width), text (batch, words, width), mask (batch, words), true where there is a word."""
        B, N, C = x.shape
        q = self.q_linear(x).view(B, N, self.num_heads, -1).transpose(1, 2)
        k, v = self.kv_linear(text).view(B, -1, 2, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        if mask is not None:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf"))[:, None, None, :]
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(x.transpose(1, 2).contiguous().view(B, N, C))


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor, angles: Tensor | None = None) -> Tensor:
        """x is (batch, tokens, width), c (batch, width)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1), angles)
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


# --------------------------------------------------------------------------------------------------
# Models of images


class PlainDiT(nn.Module):
    """The first DiT: learned positions, class labels, a modulated last layer, noise and variance as channels."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.x_embedder = Patches(width)
        self.pos_embed = nn.Parameter(torch.zeros(1, 64, width))
        self.y_embedder = nn.Embedding(11, width)
        self.t_embedder = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList([Block(width) for _ in range(3)])
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.variance = nn.Linear(width, 16)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x is (batch, 4, height, width), t and y (batch,)."""
        rows, columns = x.shape[2] // 2, x.shape[3] // 2
        x = self.x_embedder(x) + self.pos_embed[:, : rows * columns]
        c = self.t_embedder(embed_step(t, 32)) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        x = modulate(self.norm_final(x), shift, scale)
        noise = self.x_embedder.back(x, rows, columns)
        variance = F.pixel_shuffle(self.variance(x).transpose(1, 2).unflatten(2, (rows, columns)), 2)
        return torch.cat([noise, variance], dim=1)


class UViTBlock(nn.Module):
    """A block of a vision transformer; one in the second half first merges the skip."""

    def __init__(self, width: int, skip: bool = False) -> None:
        super().__init__()
        self.skip_linear = nn.Linear(2 * width, width) if skip else None
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = Attention(width), Mlp(width)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """x and skip are (batch, tokens, width)."""
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViT(nn.Module):
    """Everything is a token: the step, the text and the patches. Long skips, and a convolution at the end."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.patches = Patches(width)
        self.time_embed = nn.Linear(width, width)
        self.context_embed = nn.Linear(20, width)
        self.extra_position = nn.Parameter(torch.zeros(1, 16, width))
        self.position = nn.Parameter(torch.zeros(1, 8, 8, width))
        self.in_blocks = nn.ModuleList([UViTBlock(width) for _ in range(2)])
        self.mid_block = UViTBlock(width)
        self.out_blocks = nn.ModuleList([UViTBlock(width, skip=True) for _ in range(2)])
        self.norm = nn.LayerNorm(width)
        self.final_layer = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, image: Tensor, step: Tensor, text: Tensor) -> Tensor:
        """image is (batch, 4, height, width), step (batch,), text (batch, words, 20)."""
        rows, columns = image.shape[2] // 2, image.shape[3] // 2
        x = self.patches(image) + self.position[:, :rows, :columns].flatten(1, 2)
        extras = torch.cat([self.time_embed(embed_step(step, x.shape[-1]))[:, None], self.context_embed(text)], dim=1)
        extras = extras + self.extra_position[:, : extras.shape[1]]
        x = torch.cat([extras, x], dim=1)
        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        x = self.norm(x)[:, extras.shape[1] :]
        return self.final_layer(self.patches.back(x, rows, columns))


class TableBlock(nn.Module):
    """Its modulation is a learned table plus one vector, shared by all blocks, of the step."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn, self.cross_attn, self.mlp = Attention(width), CrossAttention(width), Mlp(width)
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(self, x: Tensor, y: Tensor, t0: Tensor, mask: Tensor | None, angles: Tensor | None = None) -> Tensor:
        """x is (batch, tokens, width), y the text, t0 (batch, 6 * width)."""
        table = self.scale_shift_table[None] + t0.reshape(x.shape[0], 6, -1)
        shift1, scale1, gate1, shift2, scale2, gate2 = table.chunk(6, dim=1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, angles)
        x = x + self.cross_attn(x, y, mask)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class SharedTableDiT(nn.Module):
    """One modulation for all blocks, cross attention to a text with padding, fixed sine positions of any size."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.patches = Patches(width)
        self.t_embedder = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = Mlp(20, 3)
        self.y_proj = nn.Linear(20, width)
        self.blocks = nn.ModuleList([TableBlock(width) for _ in range(3)])
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)

    def forward(self, image: Tensor, step: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """text is (batch, words, 20), mask (batch, words) bool."""
        rows, columns = image.shape[2] // 2, image.shape[3] // 2
        x = self.patches(image)
        angles = grid_angles(rows, columns, x.shape[-1] // 2, x.device)
        x = x + torch.cat([angles.sin(), angles.cos()], dim=-1).type_as(x)
        t = self.t_embedder(embed_step(step, 32))
        t0, y = self.t_block(t), self.y_proj(self.y_embedder(text))
        for block in self.blocks:
            x = block(x, y, t0, mask)
        shift, scale = (self.scale_shift_table[None] + t[:, None]).chunk(2, dim=1)
        return self.patches.back(self.norm(x) * (1 + scale) + shift, rows, columns)


class WindowAttention(nn.Module):
    """Attention within windows with a learned bias for each relative place."""

    def __init__(self, width: int, window: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.relative_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        place = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        apart = (place[:, :, None] - place[:, None, :]) + window - 1
        self.register_buffer("relative_index", apart[0] * (2 * window - 1) + apart[1], persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x is (batch * windows, places, width), mask (windows, places, places) or None."""
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        attn = q * (C // self.heads) ** -0.5 @ k.transpose(-2, -1)
        bias = self.relative_table[self.relative_index.view(-1)].view(N, N, -1).permute(2, 0, 1).contiguous()
        attn = attn + bias.unsqueeze(0)
        if mask is not None:
            attn = attn.view(B // mask.shape[0], mask.shape[0], self.heads, N, N) + mask.unsqueeze(1).unsqueeze(0)
            attn = attn.view(-1, self.heads, N, N)
        return self.proj((F.softmax(attn, dim=-1) @ v).transpose(1, 2).reshape(B, N, C))


class WindowBlock(nn.Module):
    """Every second block rolls the image by half a window."""

    def __init__(self, width: int, window: int, shift: int) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = WindowAttention(width, window), Mlp(width)
        self.modulation = nn.Linear(width, 2 * width)

    def windows(self, x: Tensor) -> Tensor:
        """(batch, rows, columns, width) to (batch * windows, places, width)."""
        B, H, W, C = x.shape
        x = x.view(B, H // self.window, self.window, W // self.window, self.window, C)
        return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, self.window**2, C)

    def shift_mask(self, x: Tensor) -> Tensor:
        """Keeps apart what the roll brings together."""
        region = torch.zeros(1, *x.shape[1:3], 1, device=x.device)
        cuts = (slice(0, -self.window), slice(-self.window, -self.shift), slice(-self.shift, None))
        for i, rows in enumerate(cuts):
            for j, columns in enumerate(cuts):
                region[:, rows, columns, :] = 3 * i + j
        region = self.windows(region).squeeze(-1)
        return (region.unsqueeze(1) != region.unsqueeze(2)).to(x.dtype) * -100.0

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x is (batch, rows, columns, width), c (batch, width)."""
        B, H, W, C = x.shape
        scale, gate = self.modulation(F.silu(c))[:, None, None].chunk(2, dim=-1)
        y = self.norm1(x) * (1 + scale)
        mask = None
        if self.shift:
            y = torch.roll(y, shifts=(-self.shift, -self.shift), dims=(1, 2))
            mask = self.shift_mask(y)
        y = self.attn(self.windows(y), mask)
        y = y.view(B, H // self.window, W // self.window, self.window, self.window, C)
        y = y.permute(0, 1, 3, 2, 4, 5).contiguous().view(B, H, W, C)
        if self.shift:
            y = torch.roll(y, shifts=(self.shift, self.shift), dims=(1, 2))
        x = x + gate * y
        return x + self.mlp(self.norm2(x))


class WindowDiT(nn.Module):
    """Attention in windows of 3x3 patches, shifted in every second block; pads the grid to whole windows."""

    def __init__(self, width: int = 48, window: int = 3) -> None:
        super().__init__()
        self.window = window
        self.patches = Patches(width)
        self.step = nn.Linear(width, width)
        self.blocks = nn.ModuleList([WindowBlock(width, window, i % 2 * (window // 2)) for i in range(4)])
        self.norm = nn.LayerNorm(width)

    def forward(self, image: Tensor, step: Tensor) -> Tensor:
        """image is (batch, 4, height, width), step (batch,)."""
        x = self.patches(image).unflatten(1, (image.shape[2] // 2, image.shape[3] // 2))
        rows, columns = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -columns % self.window, 0, -rows % self.window))
        c = self.step(embed_step(step, x.shape[-1]))
        for block in self.blocks:
            x = block(x, c)
        x = self.norm(x[:, :rows, :columns].contiguous())
        return self.patches.back(x.flatten(1, 2), rows, columns)


class AxialBlock(nn.Module):
    """Attention along rows, then along columns, of a grid that is never flattened."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])
        self.row, self.column = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)
        self.row_out, self.column_out = nn.Linear(width, width), nn.Linear(width, width)
        self.mlp, self.gate = Mlp(width), nn.Linear(width, 3 * width)

    def along(self, qkv: Tensor) -> Tensor:
        """Attention over the second-to-last place: (batch, lines, places, 3 * width)."""
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(-3)
        scores = torch.einsum("blqhd,blkhd->blhqk", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("blhqk,blkhd->blqhd", scores.softmax(-1), v).flatten(-2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x is (batch, rows, columns, width), c (batch, width)."""
        gate1, gate2, gate3 = self.gate(F.silu(c))[:, None, None].chunk(3, dim=-1)
        x = x + gate1 * self.row_out(self.along(self.row(self.norms[0](x))))
        y = self.along(self.column(self.norms[1](x)).transpose(1, 2)).transpose(1, 2)
        x = x + gate2 * self.column_out(y)
        return x + gate3 * self.mlp(self.norms[2](x))


class AxialDiT(nn.Module):
    """Attention along rows and columns, learned positions for each of the two."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.patches = Patches(width)
        self.rows = nn.Parameter(torch.zeros(1, 8, 1, width))
        self.columns = nn.Parameter(torch.zeros(1, 1, 8, width))
        self.step = nn.Linear(width, width)
        self.blocks = nn.ModuleList([AxialBlock(width) for _ in range(3)])
        self.norm = nn.LayerNorm(width)

    def forward(self, image: Tensor, step: Tensor) -> Tensor:
        """image is (batch, 4, height, width), step (batch,)."""
        rows, columns = image.shape[2] // 2, image.shape[3] // 2
        x = self.patches.enter(image).permute(0, 2, 3, 1)
        x = x + self.rows[:, :rows] + self.columns[:, :, :columns]
        c = self.step(embed_step(step, x.shape[-1]))
        for block in self.blocks:
            x = block(x, c)
        return self.patches.back(self.norm(x).reshape(x.shape[0], rows * columns, -1), rows, columns)


class HourglassDiT(nn.Module):
    """Merges 2x2 tokens with pixel_unshuffle for the middle blocks and splits them again; skips by a learned lerp."""

    def __init__(self, width: int = 32, middle: int = 64) -> None:
        super().__init__()
        self.patches = Patches(width)
        self.steps = nn.ModuleList([nn.Linear(32, width), nn.Linear(32, middle)])
        self.down = nn.ModuleList([Block(width) for _ in range(2)])
        self.merge = nn.Linear(4 * width, middle, bias=False)
        self.middle = nn.ModuleList([Block(middle) for _ in range(2)])
        self.split = nn.Linear(middle, 4 * width, bias=False)
        self.mix = nn.Parameter(torch.ones(1))
        self.up = nn.ModuleList([Block(width) for _ in range(2)])
        self.norm = nn.RMSNorm(width)

    def forward(self, image: Tensor, step: Tensor) -> Tensor:
        """image is (batch, 4, height, width), step (batch,)."""
        rows, columns = image.shape[2] // 2, image.shape[3] // 2
        x = self.patches(image)
        outer, inner = (layer(embed_step(step, 32)) for layer in self.steps)
        fine = grid_angles(rows, columns, x.shape[-1] // 8, x.device)
        for block in self.down:
            x = block(x, outer, fine)
        skip = x
        x = F.pixel_unshuffle(x.transpose(1, 2).unflatten(2, (rows, columns)), 2)
        x = self.merge(x.flatten(2).transpose(1, 2))
        coarse = grid_angles(rows // 2, columns // 2, x.shape[-1] // 8, x.device)
        for block in self.middle:
            x = block(x, inner, coarse)
        x = self.split(x).transpose(1, 2).unflatten(2, (rows // 2, columns // 2))
        x = torch.lerp(skip, F.pixel_shuffle(x, 2).flatten(2).transpose(1, 2), self.mix.to(x.dtype))
        for block in self.up:
            x = block(x, outer, fine)
        return self.patches.back(self.norm(x), rows, columns)


class LinearBlock(nn.Module):
    """Attention without softmax, and an MLP with a depthwise convolution over the grid in its middle."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.cross_attn = CrossAttention(width)
        self.inverted_conv = nn.Conv2d(width, 4 * width, 1)
        self.depth_conv = nn.Conv2d(4 * width, 4 * width, 3, padding=1, groups=4 * width)
        self.point_conv = nn.Conv2d(2 * width, width, 1, bias=False)
        self.table = nn.Parameter(torch.zeros(1, 6, width))

    def attend(self, x: Tensor) -> Tensor:
        """Sums of keys times values, and of keys, over all tokens; then one product for each query."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = F.relu(q), F.relu(k)
        sums = torch.einsum("bhnd,bhne->bhde", k, v)
        weight = torch.einsum("bhnd,bhd->bhn", q, k.sum(dim=2))
        x = torch.einsum("bhnd,bhde->bhne", q, sums) / (weight[..., None] + 1e-6)
        return self.proj(x.transpose(1, 2).flatten(2))

    def convolve(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """The MLP, on the tokens as an image."""
        x = x.transpose(1, 2).reshape(x.shape[0], -1, rows, columns)
        x, gate = self.depth_conv(F.silu(self.inverted_conv(x))).chunk(2, dim=1)
        return self.point_conv(x * F.silu(gate)).flatten(2).transpose(1, 2)

    def forward(self, x: Tensor, t: Tensor, text: Tensor, rows: int, columns: int) -> Tensor:
        """x is (batch, tokens, width), t (batch, 6, width)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.table + t).unbind(1)
        x = x + gate1[:, None] * self.attend(modulate(self.norm1(x), shift1, scale1))
        x = x + self.cross_attn(x, text)
        return x + gate2[:, None] * self.convolve(modulate(self.norm2(x), shift2, scale2), rows, columns)


class LinearDiT(nn.Module):
    """Linear attention; positions come from the depthwise convolutions alone."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.patches = Patches(width)
        self.step = nn.Linear(32, 6 * width)
        self.text = nn.Sequential(nn.Linear(20, width), nn.RMSNorm(width))
        self.blocks = nn.ModuleList([LinearBlock(width) for _ in range(3)])
        self.norm = nn.LayerNorm(width)

    def forward(self, image: Tensor, step: Tensor, text: Tensor) -> Tensor:
        """image is (batch, 4, height, width), step (batch,), text (batch, words, 20)."""
        rows, columns = image.shape[2] // 2, image.shape[3] // 2
        x, words = self.patches(image), self.text(text)
        t = self.step(embed_step(step, 32)).unflatten(1, (6, -1))
        for block in self.blocks:
            x = block(x, t, words, rows, columns)
        return self.patches.back(self.norm(x), rows, columns)


class GroupedBlock(nn.Module):
    """Two key and value heads for four query heads; norms before and after; a gated MLP; gates through tanh."""

    def __init__(self, width: int, heads: int = 4, kv_heads: int = 2) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.wq = nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(width, width, bias=False)
        self.w1, self.w3 = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.w2 = nn.Linear(2 * width, width, bias=False)
        self.q_norm, self.k_norm = nn.LayerNorm(width), nn.LayerNorm(kv_heads * self.head_dim)
        self.norms = nn.ModuleList([nn.RMSNorm(width) for _ in range(4)])
        self.modulation = nn.Linear(width, 4 * width)

    def attend(self, x: Tensor, turns: Tensor) -> Tensor:
        """Rotary positions as complex numbers; keys and values repeated for each query head."""
        q = self.q_norm(self.wq(x)).view(*x.shape[:2], self.heads, self.head_dim)
        k = self.k_norm(self.wk(x)).view(*x.shape[:2], self.kv_heads, self.head_dim)
        v = self.wv(x).view(*x.shape[:2], self.kv_heads, self.head_dim)
        q, k = turn_pairs(q, turns[None, :, None]), turn_pairs(k, turns[None, :, None])
        k = k.repeat_interleave(self.heads // self.kv_heads, dim=2)
        v = v.repeat_interleave(self.heads // self.kv_heads, dim=2)
        x = F.scaled_dot_product_attention(q.permute(0, 2, 1, 3), k.permute(0, 2, 1, 3), v.permute(0, 2, 1, 3))
        return self.wo(x.permute(0, 2, 1, 3).flatten(2))

    def forward(self, x: Tensor, c: Tensor, turns: Tensor) -> Tensor:
        """x is (batch, tokens, width), c (batch, width), turns (tokens, head channels / 2)."""
        scale1, gate1, scale2, gate2 = self.modulation(F.silu(c)).unsqueeze(1).chunk(4, dim=-1)
        x = x + gate1.tanh() * self.norms[1](self.attend(self.norms[0](x) * (1 + scale1), turns))
        y = self.norms[2](x) * (1 + scale2)
        return x + gate2.tanh() * self.norms[3](self.w2(F.silu(self.w1(y)) * self.w3(y)))


class RegisterDiT(nn.Module):
    """Registers, then words, then patches in one sequence; grouped heads; registers and words rest at place 0."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.patches = Patches(width)
        self.registers = nn.Parameter(torch.zeros(1, 3, width))
        self.text = nn.Linear(20, width)
        self.step = nn.Linear(32, width)
        self.blocks = nn.ModuleList([GroupedBlock(width) for _ in range(3)])
        self.norm = nn.RMSNorm(width)

    def forward(self, image: Tensor, step: Tensor, text: Tensor) -> Tensor:
        """image is (batch, 4, height, width), step (batch,), text (batch, words, 20)."""
        rows, columns = image.shape[2] // 2, image.shape[3] // 2
        x = torch.cat([self.registers.repeat(image.shape[0], 1, 1), self.text(text), self.patches(image)], dim=1)
        before = x.shape[1] - rows * columns
        angles = F.pad(grid_angles(rows, columns, 8, x.device), (0, 0, before, 0))
        turns = torch.polar(torch.ones_like(angles), angles)
        c = self.step(embed_step(step, 32)) + self.text(text).mean(dim=1)
        for block in self.blocks:
            x = block(x, c, turns)
        return self.patches.back(self.norm(x)[:, before:], rows, columns)


class PrefixBlock(nn.Module):
    """One key and value head for all query heads, expanded; a mask for each pair of tokens."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * self.head_dim)
        self.out, self.mlp = nn.Linear(width, width), Mlp(width)

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        """x is (batch, tokens, width), allowed (batch, 1, tokens, tokens)."""
        y = self.norm1(x)
        q = self.q(y).view(*y.shape[:2], self.heads, self.head_dim).transpose(1, 2)
        k, v = self.kv(y).split(self.head_dim, dim=-1)
        k, v = (t.unsqueeze(1).expand(-1, self.heads, -1, -1) for t in (k, v))
        scores = torch.matmul(q, k.mT) / self.head_dim**0.5
        weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(dim=-1)
        x = x + self.out(torch.matmul(weights, v).transpose(1, 2).reshape(x.shape))
        return x + self.mlp(self.norm2(x))


class PrefixDiT(nn.Module):
    """A language model that draws: words as indices, causal and padded, then the step, then patches that see all."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.patches = Patches(width)
        self.word, self.place = nn.Embedding(30, width), nn.Embedding(80, width)
        self.step = nn.Linear(32, width)
        self.blocks = nn.ModuleList([PrefixBlock(width) for _ in range(3)])
        self.norm = nn.LayerNorm(width)

    def forward(self, image: Tensor, step: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        """words is (batch, words) of indices, mask (batch, words) bool."""
        rows, columns = image.shape[2] // 2, image.shape[3] // 2
        x = torch.cat([self.word(words), self.step(embed_step(step, 32))[:, None], self.patches(image)], dim=1)
        x = x + self.place(torch.arange(x.shape[1], device=x.device))
        before = words.shape[1]
        allowed = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        allowed[before:, before:] = True
        allowed = allowed & F.pad(mask, (0, x.shape[1] - before), value=True)[:, None, None, :]
        for block in self.blocks:
            x = block(x, allowed)
        return self.patches.back(self.norm(x[:, before + 1 :]), rows, columns)


class ReferenceDiT(nn.Module):
    """A reference image in the same sequence, told apart by a learned vector; torch's own attention, tokens first."""

    def __init__(self, width: int = 48, heads: int = 4) -> None:
        super().__init__()
        self.patches = Patches(width)
        self.segment = nn.Parameter(torch.zeros(2, width))
        self.position = nn.Parameter(torch.zeros(64, 1, width))
        self.step = nn.Linear(width, width)
        self.attentions = nn.ModuleList([nn.MultiheadAttention(width, heads) for _ in range(3)])
        self.mlps = nn.ModuleList([Mlp(width) for _ in range(3)])
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(7)])

    def forward(self, image: Tensor, step: Tensor, reference: Tensor) -> Tensor:
        """image is (batch, 4, height, width), step (batch,), reference an image of another size."""
        rows, columns = image.shape[2] // 2, image.shape[3] // 2
        parts = [self.patches(part).transpose(0, 1) for part in (image, reference)]
        parts = [part + self.position[: part.shape[0]] + self.segment[i] for i, part in enumerate(parts)]
        x = torch.cat(parts, dim=0) + self.step(embed_step(step, parts[0].shape[-1]))[None]
        for i, (attention, mlp) in enumerate(zip(self.attentions, self.mlps, strict=True)):
            y = self.norms[2 * i](x)
            x = x + attention(y, y, y, need_weights=False)[0]
            x = x + mlp(self.norms[2 * i + 1](x))
        x = self.norms[-1](x[: rows * columns])
        return self.patches.back(x.transpose(0, 1), rows, columns)


class ParallelBlock(nn.Module):
    """Attention and MLP side by side, from one projection and into one; softmax by hand; q and k of learned length."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.linear1 = nn.Linear(width, 3 * width + 4 * width)
        self.linear2 = nn.Linear(width + 4 * width, width)
        self.length = nn.Parameter(torch.ones(heads, 1, 1))
        self.modulation = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, c: Tensor, turns: Tensor) -> Tensor:
        """x is (batch, tokens, width), c (batch, width), turns (tokens, head channels / 2)."""
        shift, scale, gate = self.modulation(F.silu(c)).chunk(3, dim=-1)
        qkv, mlp = torch.split(self.linear1(modulate(self.norm(x), shift, scale)), [3 * self.width, 4 * self.width], -1)
        q, k, v = qkv.view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = turn_pairs(F.normalize(q, dim=-1), turns), turn_pairs(F.normalize(k, dim=-1), turns)
        scores = (q @ k.transpose(2, 3)) * (2 + self.length.exp())
        scores = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
        mixed = (scores / scores.sum(dim=-1, keepdim=True)) @ v
        mixed = mixed.permute(0, 2, 1, 3).reshape(x.shape)
        return x + gate[:, None] * self.linear2(torch.cat([mixed, F.gelu(mlp)], dim=2))


class ParallelDiT(nn.Module):
    """Blocks of one stream: words and patches, told apart by their place only."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.patches = Patches(width)
        self.text, self.step = nn.Linear(20, width), nn.Linear(32, width)
        self.blocks = nn.ModuleList([ParallelBlock(width) for _ in range(3)])
        self.norm = nn.LayerNorm(width)

    def forward(self, image: Tensor, step: Tensor, text: Tensor) -> Tensor:
        """image is (batch, 4, height, width), step (batch,), text (batch, words, 20)."""
        rows, columns = image.shape[2] // 2, image.shape[3] // 2
        x = torch.cat([self.patches(image), self.text(text)], dim=1)
        angles = torch.cat(
            [grid_angles(rows, columns, 8, x.device), 9 + line_angles(text.shape[1], 8, x.device)], dim=0
        )
        turns = torch.complex(angles.cos(), angles.sin())
        c = self.step(embed_step(step, 32))
        for block in self.blocks:
            x = block(x, c, turns)
        x, _ = x.split([rows * columns, text.shape[1]], dim=1)
        return self.patches.back(self.norm(x), rows, columns)


class InterfaceBlock(nn.Module):
    """Few latents read from the tokens, think, and write back to them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(6)])
        self.read, self.write = CrossAttention(width), CrossAttention(width)
        self.think = nn.ModuleList([UViTBlock(width) for _ in range(2)])
        self.mlp = Mlp(width)

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """x is (batch, tokens, width), z (batch, latents, width)."""
        z = z + self.read(self.norms[0](z), self.norms[1](x))
        for block in self.think:
            z = block(z)
        x = x + self.write(self.norms[2](x), self.norms[3](z))
        return x + self.mlp(self.norms[4](x)), self.norms[5](z)


class InterfaceDiT(nn.Module):
    """Tokens never attend to each other: all goes through 7 latents, of which the step is one more."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.patches = Patches(width)
        self.position = nn.Parameter(torch.zeros(64, width))
        self.latents = nn.Parameter(torch.zeros(7, width))
        self.step = nn.Linear(32, width)
        self.blocks = nn.ModuleList([InterfaceBlock(width) for _ in range(2)])
        self.norm = nn.LayerNorm(width)

    def forward(self, image: Tensor, step: Tensor) -> Tensor:
        """image is (batch, 4, height, width), step (batch,)."""
        rows, columns = image.shape[2] // 2, image.shape[3] // 2
        x = self.patches(image)
        x = x + self.position[: x.shape[1]]
        z = torch.cat([self.latents.expand(x.shape[0], -1, -1), self.step(embed_step(step, 32))[:, None]], dim=1)
        for block in self.blocks:
            x, z = block(x, z)
        return self.patches.back(self.norm(x), rows, columns)


# --------------------------------------------------------------------------------------------------
# Models of videos and of audio


class FactorisedDiT(nn.Module):
    """Blocks over the places of each frame and blocks over the frames of each place, in turn."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.patches = Patches(width)
        self.position = nn.Parameter(torch.zeros(1, 1, 64, width))
        self.t_embedder = nn.Linear(32, width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.text = nn.Linear(20, width)
        self.space = nn.ModuleList([TableBlock(width) for _ in range(2)])
        self.time = nn.ModuleList([Block(width) for _ in range(2)])
        self.norm = nn.LayerNorm(width)

    def forward(self, video: Tensor, step: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """video is (batch, 4, frames, height, width), text (batch, words, 20), mask (batch, words) bool."""
        B, _, T, H, W = video.shape
        x = self.patches(video.permute(0, 2, 1, 3, 4).reshape(B * T, -1, H, W))
        S = x.shape[1]
        x = (x.view(B, T, S, -1) + self.position[:, :, :S]).view(B * T, S, -1)
        t = self.t_embedder(embed_step(step, 32))
        y = self.text(text)
        y_space = y.unsqueeze(1).expand(-1, T, -1, -1).reshape(B * T, y.shape[1], -1)
        mask_space = mask.unsqueeze(1).expand(-1, T, -1).reshape(B * T, -1)
        t_space = self.t_block(t).repeat_interleave(T, dim=0)
        t_time = t.repeat_interleave(S, dim=0)
        angles = line_angles(T, 6, x.device)
        for space, time in zip(self.space, self.time, strict=True):
            x = space(x, y_space, t_space, mask_space)
            x = x.view(B, T, S, -1).permute(0, 2, 1, 3).reshape(B * S, T, -1)
            x = time(x, t_time, angles)
            x = x.view(B, S, T, -1).permute(0, 2, 1, 3).reshape(B * T, S, -1)
        x = self.patches.back(self.norm(x), H // 2, W // 2)
        return x.view(B, T, -1, H, W).permute(0, 2, 1, 3, 4)


class Stream(nn.Module):
    """One modality's own layers in a joint block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv, self.out, self.mlp = nn.Linear(width, 3 * width), nn.Linear(width, width), Mlp(width)
        self.q_norm, self.k_norm = nn.RMSNorm(width // heads), nn.RMSNorm(width // heads)
        self.modulation = nn.Linear(width, 6 * width)

    def before(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k and v, (batch, heads, tokens, channels), and the modulation."""
        modulation = self.modulation(F.silu(c))
        shift, scale = modulation.chunk(6, dim=-1)[:2]
        qkv = self.qkv(modulate(self.norm1(x), shift, scale))
        q, k, v = qkv.reshape(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.q_norm(q), self.k_norm(k), v, modulation

    def after(self, x: Tensor, mixed: Tensor, modulation: Tensor) -> Tensor:
        """What follows attention; mixed is (batch, tokens, width)."""
        gate1, shift, scale, gate2 = modulation.chunk(6, dim=-1)[2:]
        x = x + gate1[:, None] * self.out(mixed)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift, scale))


class JointBlock(nn.Module):
    """Attention over the tokens of all modalities together."""

    def __init__(self, width: int, streams: int, heads: int = 4) -> None:
        super().__init__()
        self.streams = nn.ModuleList([Stream(width, heads) for _ in range(streams)])

    def forward(self, xs: list[Tensor], c: Tensor) -> list[Tensor]:
        """Each of xs is (batch, tokens, width)."""
        qs, ks, vs, modulations = zip(*(s.before(x, c) for s, x in zip(self.streams, xs, strict=True)), strict=True)
        mixed = F.scaled_dot_product_attention(torch.cat(qs, 2), torch.cat(ks, 2), torch.cat(vs, 2))
        parts = mixed.transpose(1, 2).flatten(2).split([x.shape[1] for x in xs], dim=1)
        return [s.after(*each) for s, *each in zip(self.streams, xs, parts, modulations, strict=True)]


class ThreeStreamDiT(nn.Module):
    """Image, text and audio in joint attention; convolutions over time give the audio its places; two outputs."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.patches = Patches(width)
        self.position = nn.Parameter(torch.zeros(64, width))
        self.text, self.audio, self.step = nn.Linear(20, width), nn.Linear(8, width), nn.Linear(32, width)
        self.audio_position = nn.Sequential(
            nn.Conv1d(width, width, 5, groups=4, padding=2), nn.Mish(),
            nn.Conv1d(width, width, 5, groups=4, padding=2), nn.Mish(),
        )  # fmt: skip
        self.blocks = nn.ModuleList([JointBlock(width, 3) for _ in range(3)])
        self.norm = nn.LayerNorm(width)
        self.audio_out = nn.Linear(width, 8)

    def forward(self, image: Tensor, audio: Tensor, step: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """image is (batch, 4, height, width), audio (batch, frames, 8), step (batch,), text (batch, words, 20)."""
        rows, columns = image.shape[2] // 2, image.shape[3] // 2
        sight = self.patches(image)
        sight = sight + self.position[: sight.shape[1]]
        sound = self.audio(audio)
        sound = sound + self.audio_position(sound.permute(0, 2, 1)).permute(0, 2, 1)
        c = self.step(embed_step(step, 32))
        xs = [sight, self.text(text), sound]
        for block in self.blocks:
            xs = block(xs, c)
        return self.patches.back(self.norm(xs[0]), rows, columns), self.audio_out(self.norm(xs[2]))


class CausalDiT(nn.Module):
    """Audio frames that see earlier ones only, each with its own step and so its own modulation; three norms."""

    def __init__(self, width: int = 48, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.enter, self.leave = nn.Linear(8, width), nn.Linear(width, 8)
        self.step = nn.Linear(32, width)
        self.qkvs = nn.ModuleList([nn.Linear(width, 3 * width) for _ in range(3)])
        self.outs = nn.ModuleList([nn.Linear(width, width) for _ in range(3)])
        self.mlps = nn.ModuleList([Mlp(width) for _ in range(3)])
        self.modulations = nn.ModuleList([nn.Linear(width, 4 * width) for _ in range(3)])
        self.norm = nn.LayerNorm(width, elementwise_affine=False)

    def forward(self, audio: Tensor, step: Tensor) -> Tensor:
        """audio is (batch, frames, 8), step (batch, frames)."""
        x, c = self.enter(audio), F.silu(self.step(embed_step(step, 32)))
        angles = line_angles(x.shape[1], 6, x.device)
        for qkv, out, mlp, modulation in zip(self.qkvs, self.outs, self.mlps, self.modulations, strict=True):
            scale1, gate1, scale2, gate2 = modulation(c).chunk(4, dim=-1)
            y = qkv(self.norm(x) * (1 + scale1)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            q, k, v = y.unbind(0)
            y = F.scaled_dot_product_attention(turn_halves(q, angles), turn_halves(k, angles), v, is_causal=True)
            x = x + gate1 * out(y.permute(0, 2, 1, 3).reshape(x.shape))
            x = x + gate2 * mlp(self.norm(x) * (1 + scale2))
        return self.leave(self.norm(x))


# --------------------------------------------------------------------------------------------------
# Inputs


def _plain_inputs(batch: int, odd: bool) -> Inputs:
    rows, columns = patch_grid(odd)
    return {
        "x": randn(1, batch, 4, 2 * rows, 2 * columns),
        "t": timesteps(batch) / 1000,
        "y": 1 + torch.arange(batch),
    }


def _image_inputs(batch: int, odd: bool, text: bool = False, mask: bool = False) -> Inputs:
    """Mask: (batch, text) bool."""
    rows, columns = patch_grid(odd)
    inputs = {"image": randn(1, batch, 4, 2 * rows, 2 * columns), "step": timesteps(batch) / 1000}
    if text:
        inputs["text"] = randn(2, batch, text_length(odd), 20)
    if mask:
        inputs["mask"] = padding_mask(batch, text_length(odd), torch.bool)
    return inputs


def _hourglass_inputs(batch: int, odd: bool) -> Inputs:
    """Grids of 6x10 and 4x8 patches, as the model merges 2x2 of them: 3x5 or 2x4 tokens in its middle."""
    rows, columns = (6, 10) if odd else (4, 8)
    return {"image": randn(1, batch, 4, 2 * rows, 2 * columns), "step": timesteps(batch) / 1000}


def _prefix_inputs(batch: int, odd: bool) -> Inputs:
    """Words as indices."""
    words = (7 * torch.arange(batch * text_length(odd)) % 30).view(batch, -1)
    return _image_inputs(batch, odd, mask=True) | {"words": words}


def _reference_inputs(batch: int, odd: bool) -> Inputs:
    """A reference of 3x5 patches, or 2x4."""
    rows, columns = (3, 5) if odd else (2, 4)
    return _image_inputs(batch, odd) | {"reference": randn(3, batch, 4, 2 * rows, 2 * columns)}


def _factorised_inputs(batch: int, odd: bool) -> Inputs:
    rows, columns = patch_grid(odd)
    inputs = _image_inputs(batch, odd, text=True, mask=True)
    del inputs["image"]
    return {"video": randn(1, batch, 4, frame_count(odd), 2 * rows, 2 * columns)} | inputs


def _audio(batch: int, odd: bool) -> Tensor:
    """37 or 32 frames."""
    return randn(4, batch, 37 if odd else 32, 8)


def _three_stream_inputs(batch: int, odd: bool) -> Inputs:
    return _image_inputs(batch, odd, text=True) | {"audio": _audio(batch, odd)}


def _causal_inputs(batch: int, odd: bool) -> Inputs:
    """Each frame is a little further from noise than the one after it."""
    audio = _audio(batch, odd)
    return {"audio": audio, "step": timesteps(batch)[:, None] / 1000 + torch.arange(audio.shape[1]) / 200}


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("plain", PlainDiT, _plain_inputs, 4),
        Case("uvit", UViT, partial(_image_inputs, text=True), 4),
        Case("shared_table", SharedTableDiT, partial(_image_inputs, text=True, mask=True), 4),
        Case("window", WindowDiT, _image_inputs, 4),
        Case("axial", AxialDiT, _image_inputs, 4),
        Case("hourglass", HourglassDiT, _hourglass_inputs, 4),
        Case("linear", LinearDiT, partial(_image_inputs, text=True), 4),
        Case("registers", RegisterDiT, partial(_image_inputs, text=True), 4),
        Case("prefix", PrefixDiT, _prefix_inputs, 4),
        Case("reference", ReferenceDiT, _reference_inputs, 4),
        Case("parallel", ParallelDiT, partial(_image_inputs, text=True), 4),
        Case("interface", InterfaceDiT, _image_inputs, 4),
        Case("factorised", FactorisedDiT, _factorised_inputs, 4),
        Case("three_streams", ThreeStreamDiT, _three_stream_inputs, 4),
        Case("causal", CausalDiT, _causal_inputs, 4),
    )
}
