"""Two transformers in plain PyTorch, built and called like those of FLUX and Wan, for machines without diffusers.

They have the same products of matrices and the same attentions as these, and so cost the same; they take no weights of
theirs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rotary(places: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (tokens, width / 2) in float32, of places (tokens, axes), which share the width out."""
    share = width // 2 // places.shape[1]
    counts = [share] * (places.shape[1] - 1) + [width // 2 - share * (places.shape[1] - 1)]
    angles = [places[:, i : i + 1].float() * 10000.0 ** (-torch.arange(n, device=places.device) / n)
              for i, n in enumerate(counts)]
    turned = torch.cat(angles, 1)
    return turned.cos(), turned.sin()


def rotate(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """(batch, heads, tokens, width), each token turned by its place."""
    cos, sin = turns
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def normed(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def embedded(values: Tensor, width: int) -> Tensor:
    """Sinusoids, (batch, width), of one number for each sample."""
    angles = values.float()[:, None] * torch.exp(-9.2 * torch.arange(width // 2, device=values.device) / (width // 2))
    return torch.cat([angles.cos(), angles.sin()], -1).to(values.dtype)


def mlp(width: int, inner: int, out: int | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, inner), nn.GELU(approximate="tanh"), nn.Linear(inner, out or width))


class Stream(nn.Module):
    """One of the two streams of a block with two: its own weights for all but the attention they share."""

    def __init__(self, hidden: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.modulation, self.qkv = nn.Linear(hidden, 6 * hidden), nn.Linear(hidden, 3 * hidden)
        self.norm_q, self.norm_k = (nn.RMSNorm(hidden // count, eps=1e-6) for _ in range(2))
        self.out, self.mlp = nn.Linear(hidden, hidden), mlp(hidden, 4 * hidden)

    def before(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        shift, scale, *rest = self.modulation(F.silu(condition))[:, None].chunk(6, -1)
        q, k, v = (heads(t, self.count) for t in self.qkv(normed(x) * (1 + scale) + shift).chunk(3, -1))
        return self.norm_q(q), self.norm_k(k), v, tuple(rest)

    def after(self, x: Tensor, attended: Tensor, rest: tuple[Tensor, ...]) -> Tensor:
        gate, shift, scale, last = rest
        x = x + gate * self.out(attended)
        return x + last * self.mlp(normed(x) * (1 + scale) + shift)


class DoubleBlock(nn.Module):
    """Text and image attend to each other, each with weights of its own."""

    def __init__(self, hidden: int, count: int) -> None:
        super().__init__()
        self.image, self.text = Stream(hidden, count), Stream(hidden, count)

    def forward(self, x: Tensor, text: Tensor, condition: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        *image, gates = self.image.before(x, condition)
        *words, text_gates = self.text.before(text, condition)
        q, k, v = (torch.cat(pair, 2) for pair in zip(words, image, strict=True))
        attended = joined(F.scaled_dot_product_attention(rotate(q, (cos, sin)), rotate(k, (cos, sin)), v))
        first, second = attended.split([text.shape[1], x.shape[1]], 1)
        return self.image.after(x, second, gates), self.text.after(text, first, text_gates)


class SingleBlock(nn.Module):
    """Text and image as one sequence; attention and MLP side by side."""

    def __init__(self, hidden: int, count: int) -> None:
        super().__init__()
        self.count, self.hidden = count, hidden
        self.modulation, self.first = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, 7 * hidden)
        self.second = nn.Linear(5 * hidden, hidden)
        self.norm_q, self.norm_k = (nn.RMSNorm(hidden // count, eps=1e-6) for _ in range(2))

    def forward(self, x: Tensor, condition: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(F.silu(condition))[:, None].chunk(3, -1)
        qkv, inner = self.first(normed(x) * (1 + scale) + shift).split([3 * self.hidden, 4 * self.hidden], -1)
        q, k, v = (heads(t, self.count) for t in qkv.chunk(3, -1))
        q, k = rotate(self.norm_q(q), (cos, sin)), rotate(self.norm_k(k), (cos, sin))
        attended = joined(F.scaled_dot_product_attention(q, k, v))
        return x + gate * self.second(torch.cat([attended, F.gelu(inner, approximate="tanh")], -1))


class TwoStreams(nn.Module):
    """As FLUX: packed tokens of an image and of a text, a pooled text, a time and the strength of guidance."""

    def __init__(self, channels: int, text: int, pooled: int, count: int, width: int, double: int, single: int) -> None:
        super().__init__()
        hidden = count * width
        self.width = width
        self.embed, self.embed_text = nn.Linear(channels, hidden), nn.Linear(text, hidden)
        self.time, self.strength, self.pooled = (mlp(n, hidden, hidden) for n in (256, 256, pooled))
        self.double_blocks = nn.ModuleList(DoubleBlock(hidden, count) for _ in range(double))
        self.single_blocks = nn.ModuleList(SingleBlock(hidden, count) for _ in range(single))
        self.modulation, self.out = nn.Linear(hidden, 2 * hidden), nn.Linear(hidden, channels)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor,
                timestep: Tensor, guidance: Tensor, img_ids: Tensor, txt_ids: Tensor) -> tuple[Tensor]:
        x, text = self.embed(hidden_states), self.embed_text(encoder_hidden_states)
        condition = (self.time(embedded(1000 * timestep, 256)) + self.strength(embedded(1000 * guidance, 256))
                     + self.pooled(pooled_projections))
        cos, sin = rotary(torch.cat([txt_ids, img_ids]), self.width)
        for block in self.double_blocks:
            x, text = block(x, text, condition, cos, sin)
        both = torch.cat([text, x], 1)
        for block in self.single_blocks:
            both = block(both, condition, cos, sin)
        scale, shift = self.modulation(F.silu(condition))[:, None].chunk(2, -1)
        return (self.out(normed(both[:, text.shape[1] :]) * (1 + scale) + shift),)


class VideoBlock(nn.Module):
    """Attention among tokens of a video, to a text, and an MLP."""

    def __init__(self, hidden: int, count: int, inner: int) -> None:
        super().__init__()
        self.count = count
        self.modulation = nn.Parameter(torch.randn(1, 6, hidden) * hidden**-0.5)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.q, self.kv, self.out_text = (nn.Linear(hidden, n * hidden) for n in (1, 2, 1))
        self.norm_q, self.norm_k, self.norm_q_text, self.norm_k_text = (nn.RMSNorm(hidden, eps=1e-6) for _ in range(4))
        self.norm, self.mlp = nn.LayerNorm(hidden, eps=1e-6), mlp(hidden, inner)

    def forward(self, x: Tensor, text: Tensor, condition: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shift, scale, gate, shift_2, scale_2, gate_2 = (self.modulation + condition).unsqueeze(2).unbind(1)
        q, k, v = self.qkv(normed(x) * (1 + scale) + shift).chunk(3, -1)
        q, k = (rotate(heads(t, self.count), (cos, sin)) for t in (self.norm_q(q), self.norm_k(k)))
        x = x + gate * self.out(joined(F.scaled_dot_product_attention(q, k, heads(v, self.count))))
        k, v = self.kv(text).chunk(2, -1)
        q, k, v = (heads(t, self.count) for t in (self.norm_q_text(self.q(self.norm(x))), self.norm_k_text(k), v))
        x = x + self.out_text(joined(F.scaled_dot_product_attention(q, k, v)))
        return x + gate_2 * self.mlp(normed(x) * (1 + scale_2) + shift_2)


class Video(nn.Module):
    """As Wan: a video as latents, cut into patches of 1x2x2, a text, and a time."""

    def __init__(self, channels: int, text: int, count: int, width: int, inner: int, blocks: int) -> None:
        super().__init__()
        hidden = count * width
        self.width = width
        self.embed = nn.Conv3d(channels, hidden, (1, 2, 2), stride=(1, 2, 2))
        self.embed_text, self.time = (mlp(n, hidden, hidden) for n in (text, 256))
        self.condition = nn.Linear(hidden, 6 * hidden)
        self.blocks = nn.ModuleList(VideoBlock(hidden, count, inner) for _ in range(blocks))
        self.out = nn.Linear(hidden, 4 * channels)

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor]:
        frames, rows, columns = hidden_states.shape[2], hidden_states.shape[3] // 2, hidden_states.shape[4] // 2
        x, text = self.embed(hidden_states).flatten(2).transpose(1, 2), self.embed_text(encoder_hidden_states)
        condition = self.condition(F.silu(self.time(embedded(timestep.to(x.dtype), 256)))).unflatten(1, (6, -1))
        places = torch.cartesian_prod(*(torch.arange(n, device=x.device) for n in (frames, rows, columns)))
        cos, sin = rotary(places, self.width)
        for block in self.blocks:
            x = block(x, text, condition, cos, sin)
        made = self.out(normed(x)).reshape(x.shape[0], frames, rows, columns, 1, 2, 2, -1)
        return (made.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3),)
