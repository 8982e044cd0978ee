"""Random diffusion transformers in plain PyTorch: attention, norms, conditioning, skips and containers drawn by a seed.

``drawn(seed)`` is a model with the arguments of one call and a description of what was drawn; the same for the same
seed. Nothing here knows what is made of it.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ATTENTIONS = ("plain", "joint", "cross", "grouped", "linear", "windows", "axial", "by hand", "einsum", "pair bias",
              "masked", "causal", "convolved", "packed")
NORMS = ("layer", "layer plain", "rms", "group", "variance", "deviation", "length", "none")
CONDITIONS = ("shift and scale", "film", "gate", "token", "none")
FEEDS = ("gelu", "gated", "convolution", "experts", "none")
EMBEDDINGS = ("convolution", "patches", "given", "unfold")
POSITIONS = ("none", "table", "sine", "rotary", "grid")
TAILS = ("patches", "transposed convolution", "fold", "tokens", "mean")
CONTAINERS = ("tensors", "list", "dictionary", "object", "samples")


@dataclass
class Sample:
    """What a forward may take or return as one object."""

    sample: Tensor
    more: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """What was drawn."""

    width: int
    heads: int
    key_heads: int
    grid: tuple[int, int]
    text: int
    batch: int
    depth: int
    blocks: tuple[tuple[str, str, str, str], ...]
    """Attention, norm, condition and feed-forward of each kind of block; they take turns."""
    embedding: str
    position: str
    tail: str
    container: str
    skips: bool
    text_projected: bool

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]


def plan(rng: random.Random) -> Plan:
    heads = rng.choice([1, 2, 3, 4, 4, 6])
    kinds = rng.choice([1, 1, 2])
    blocks = tuple((rng.choice(ATTENTIONS), rng.choice(NORMS), rng.choice(CONDITIONS), rng.choice(FEEDS))
                   for _ in range(kinds))
    return Plan(
        width=heads * rng.choice([8, 12, 16]), heads=heads,
        key_heads=rng.choice([k for k in range(1, heads + 1) if heads % k == 0]),
        grid=(rng.randint(2, 7), rng.randint(2, 8)), text=rng.randint(1, 11), batch=rng.choice([1, 1, 2, 2, 3, 4]),
        depth=kinds * rng.randint(1, 3), blocks=blocks, embedding=rng.choice(EMBEDDINGS),
        position=rng.choice(POSITIONS), tail=rng.choice(TAILS), container=rng.choice(CONTAINERS),
        skips=rng.random() < 0.25, text_projected=rng.random() < 0.7)


class Norm(nn.Module):
    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind = kind
        self.layer = nn.LayerNorm(width, elementwise_affine=kind == "layer") if kind.startswith("layer") else None
        self.gain = nn.Parameter(1 + torch.randn(width) / 10)

    def forward(self, x: Tensor) -> Tensor:
        if self.layer is not None:
            return self.layer(x)
        if self.kind == "rms":
            return F.rms_norm(x, x.shape[-1:], self.gain, 1e-5)
        if self.kind == "group":
            return F.group_norm(x.transpose(1, 2), 4 if x.shape[-1] % 4 == 0 else 1, self.gain).transpose(1, 2)
        if self.kind == "variance":
            return self.gain * x * torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5)
        if self.kind == "deviation":
            mean, deviation = x.mean(1, keepdim=True), x.std((1, 2), keepdim=True)
            return self.gain * (x - mean) / (deviation + 1e-3)
        if self.kind == "length":
            return F.normalize(x, dim=-1) * self.gain * x.shape[-1] ** 0.5
        return x


def rotated(x: Tensor, table: tuple[Tensor, Tensor] | None) -> Tensor:
    """``x`` (..., tokens, width) turned by cosines and sines of (tokens, width)."""
    if table is None:
        return x
    cosine, sine = table
    a, b = x.chunk(2, -1)
    return x * cosine + torch.cat([-b, a], -1) * sine


class Attention(nn.Module):
    """One of ``ATTENTIONS`` from (batch, tokens, width)."""

    def __init__(self, kind: str, p: Plan) -> None:
        super().__init__()
        self.kind, self.p, d = kind, p, p.width
        self.each = d // p.heads
        narrow = p.key_heads * self.each if kind == "grouped" else d
        self.q, self.kv, self.out = nn.Linear(d, d), nn.Linear(d, 2 * narrow), nn.Linear(d, d)
        self.text_q = nn.Linear(d, d) if kind == "joint" else None
        self.text_kv = nn.Linear(d, 2 * d) if kind in ("joint", "cross") else None
        self.text_out = nn.Linear(d, d) if kind == "joint" else None
        self.pair = nn.Linear(3, p.heads) if kind == "pair bias" else None
        self.near = nn.Conv2d(d, d, 3, padding=1, groups=d) if kind == "convolved" else None

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.each)).transpose(-2, -3)

    def forward(self, x: Tensor, c: dict[str, Any]) -> tuple[Tensor, Tensor]:
        attended = getattr(self, "_" + self.kind.replace(" ", "_"))
        return attended(x, c)

    def _projected(self, x: Tensor, c: dict[str, Any]) -> list[Tensor]:
        q, k, v = (self.split(y) for y in (self.q(x), *self.kv(x).chunk(2, -1)))
        return [rotated(q, c["rotary"]), rotated(k, c["rotary"]), v]

    def _joined(self, heads: Tensor) -> Tensor:
        return self.out(heads.transpose(-2, -3).flatten(-2))

    def _plain(self, x: Tensor, c: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return self._joined(F.scaled_dot_product_attention(*self._projected(x, c))), c["text"]

    def _grouped(self, x: Tensor, c: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return self._joined(F.scaled_dot_product_attention(*self._projected(x, c), enable_gqa=True)), c["text"]

    def _causal(self, x: Tensor, c: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return self._joined(F.scaled_dot_product_attention(*self._projected(x, c), is_causal=True)), c["text"]

    def _masked(self, x: Tensor, c: dict[str, Any]) -> tuple[Tensor, Tensor]:
        kept = torch.arange(x.shape[1]) < c["kept"][:, None]
        mask = kept[:, None, None, :] | torch.eye(x.shape[1], dtype=torch.bool)
        return self._joined(F.scaled_dot_product_attention(*self._projected(x, c), attn_mask=mask)), c["text"]

    def _joint(self, x: Tensor, c: dict[str, Any]) -> tuple[Tensor, Tensor]:
        n, text = c["text"].shape[1], c["text"]
        own = self._projected(x, c)
        theirs = [self.split(y) for y in (self.text_q(text), *self.text_kv(text).chunk(2, -1))]
        both = F.scaled_dot_product_attention(*(torch.cat(pair, -2) for pair in zip(theirs, own, strict=True)))
        both = both.transpose(1, 2).flatten(2)
        return self.out(both[:, n:]), text + self.text_out(both[:, :n])

    def _cross(self, x: Tensor, c: dict[str, Any]) -> tuple[Tensor, Tensor]:
        k, v = (self.split(y) for y in self.text_kv(c["text"]).chunk(2, -1))
        mixed, _ = self._plain(x, c)
        return mixed + self._joined(F.scaled_dot_product_attention(self.split(self.q(x)), k, v)), c["text"]

    def _linear(self, x: Tensor, c: dict[str, Any]) -> tuple[Tensor, Tensor]:
        q, k, v = self._projected(x, c)
        q, k = F.relu(q) + 0.1, F.relu(k) + 0.1
        state = k.transpose(-1, -2) @ v
        return self._joined(q @ state / (q @ k.sum(-2)[..., None])), c["text"]

    def _windows(self, x: Tensor, c: dict[str, Any]) -> tuple[Tensor, Tensor]:
        rows, columns = self.p.grid
        size = next(s for s in (3, 2, 1) if rows % s == 0)
        grid = x.unflatten(1, (rows // size, size * columns)).flatten(0, 1)
        mixed = F.scaled_dot_product_attention(*self._projected(grid, c | {"rotary": None}))
        return self._joined(mixed).unflatten(0, (x.shape[0], -1)).flatten(1, 2), c["text"]

    def _axial(self, x: Tensor, c: dict[str, Any]) -> tuple[Tensor, Tensor]:
        grid, c0 = x.unflatten(1, self.p.grid), c | {"rotary": None}
        along = self._joined(F.scaled_dot_product_attention(*self._projected(grid, c0)))
        down = self._joined(F.scaled_dot_product_attention(*self._projected(grid.transpose(1, 2), c0)))
        return (along + down.transpose(1, 2)).flatten(1, 2), c["text"]

    def _by_hand(self, x: Tensor, c: dict[str, Any]) -> tuple[Tensor, Tensor]:
        q, k, v = self._projected(x, c)
        return self._joined((q @ k.transpose(-1, -2) / math.sqrt(self.each)).softmax(-1) @ v), c["text"]

    def _einsum(self, x: Tensor, c: dict[str, Any]) -> tuple[Tensor, Tensor]:
        q, k, v = self._projected(x, c)
        scores = torch.einsum("bhid,bhjd->bhij", q, k) * self.each**-0.5
        return self.out(torch.einsum("bhij,bhjd->bihd", scores.softmax(-1), v).flatten(2)), c["text"]

    def _pair_bias(self, x: Tensor, c: dict[str, Any]) -> tuple[Tensor, Tensor]:
        bias = self.pair(c["pairs"]).movedim(-1, 1)
        return self._joined(F.scaled_dot_product_attention(*self._projected(x, c), attn_mask=bias)), c["text"]

    def _convolved(self, x: Tensor, c: dict[str, Any]) -> tuple[Tensor, Tensor]:
        near = self.near(x.transpose(1, 2).unflatten(2, self.p.grid)).flatten(2).transpose(1, 2)
        q, _, _ = self._projected(x, c)
        _, k, v = self._projected(near, c)
        return self._joined(F.scaled_dot_product_attention(q, k, v)), c["text"]

    def _packed(self, x: Tensor, c: dict[str, Any]) -> tuple[Tensor, Tensor]:
        sample = torch.arange(x.shape[0]).repeat_interleave(x.shape[1])
        flat = self._projected(x, c)
        q, k, v = (y.transpose(0, 1).flatten(1, 2)[None] for y in flat)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=sample[:, None] == sample[None])
        return self._joined(mixed[0].unflatten(1, x.shape[:2]).transpose(0, 1)), c["text"]


class Feed(nn.Module):
    def __init__(self, kind: str, p: Plan) -> None:
        super().__init__()
        self.kind, self.p, d = kind, p, p.width
        self.up, self.down = nn.Linear(d, 4 * d if kind == "gated" else 2 * d), nn.Linear(2 * d, d)
        self.near = nn.Conv2d(2 * d, 2 * d, 3, padding=1, groups=2 * d) if kind == "convolution" else None
        self.choice = nn.Linear(d, 3) if kind == "experts" else None
        self.experts = nn.Parameter(torch.randn(3, d, d) / d) if kind == "experts" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "experts":
            return torch.einsum("bne,bnc,ecd->bnd", self.choice(x).softmax(-1), x, self.experts)
        h = self.up(x)
        if self.kind == "gated":
            a, b = h.chunk(2, -1)
            return self.down(F.silu(a) * b)
        if self.near is not None:
            h = self.near(h.transpose(1, 2).unflatten(2, self.p.grid)).flatten(2).transpose(1, 2)
        return self.down(F.gelu(h))


class Block(nn.Module):
    def __init__(self, kinds: tuple[str, str, str, str], p: Plan, number: int) -> None:
        super().__init__()
        attention, norm, self.condition, feed = kinds
        self.number, self.norm, self.again = number, Norm(norm, p.width), Norm(norm, p.width)
        self.attention = Attention(attention, p)
        self.feed = None if feed == "none" else Feed(feed, p)
        self.change = nn.Linear(p.width, {"shift and scale": 6, "film": 2, "gate": 1}.get(self.condition, 1) * p.width)

    def forward(self, x: Tensor, text: Tensor, c: dict[str, Any]) -> tuple[Tensor, Tensor]:
        parts = [Tensor.unsqueeze(p, 1) for p in self.change(F.silu(c["time"])).chunk(6, -1)] if (
            self.condition == "shift and scale") else []
        h = self.norm(x)
        if parts:
            h = h * (1 + parts[0]) + parts[1]
        elif self.condition == "film":
            scale, shift = self.change(c["time"])[:, None].chunk(2, -1)
            h = torch.addcmul(shift, h, 1 + scale.tanh())
        elif self.condition == "token":
            h = h + self.change(c["time"])[:, None]
        mixed, text = self.attention(h, c | {"text": text})
        gate = parts[2] if parts else self.change(c["time"])[:, None].sigmoid() if self.condition == "gate" else 1.0
        x = x + gate * mixed
        if self.feed is not None:
            h = self.again(x)
            h = h * (1 + parts[3]) + parts[4] if parts else h
            x = x + (parts[5] if parts else 1.0) * self.feed(h)
        return x, text


class Model(nn.Module):
    """Patches of a picture of four channels, text and a time to the picture's noise."""

    def __init__(self, p: Plan) -> None:
        super().__init__()
        self.p, d = p, p.width
        self.embed = nn.Conv2d(4, d, 2, 2) if p.embedding == "convolution" else nn.Linear(16, d)
        self.times = nn.Sequential(nn.Linear(16, d), nn.SiLU(), nn.Linear(d, d))
        self.words = nn.Linear(10, d) if p.text_projected else nn.Identity()
        self.table = nn.Parameter(torch.randn(1, p.tokens + 3, d) / 4)
        self.blocks = nn.ModuleList(Block(p.blocks[i % len(p.blocks)], p, i) for i in range(p.depth))
        self.merges = nn.ModuleList(nn.Linear(2 * d, d) for _ in range(p.depth // 2)) if p.skips else None
        self.norm = nn.LayerNorm(d, elementwise_affine=False)
        self.tail = nn.ConvTranspose2d(d, 4, 2, 2) if p.tail == "transposed convolution" else nn.Linear(d, 16)

    def tokens(self, picture: Tensor) -> Tensor:
        p, (rows, columns) = self.p, self.p.grid
        if p.embedding == "given":
            return picture
        if p.embedding == "convolution":
            return self.embed(picture).flatten(2).transpose(1, 2)
        if p.embedding == "unfold":
            return self.embed(F.unfold(picture, 2, stride=2).transpose(1, 2))
        grid = picture.unflatten(3, (columns, 2)).unflatten(2, (rows, 2))
        return self.embed(grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))

    def picture(self, x: Tensor) -> Tensor:
        p, (rows, columns) = self.p, self.p.grid
        if p.tail == "transposed convolution":
            return self.tail(x.transpose(1, 2).unflatten(2, (rows, columns)))
        x = self.tail(x)
        if p.tail == "fold":
            return F.fold(x.transpose(1, 2), (2 * rows, 2 * columns), 2, stride=2)
        if p.tail == "patches":
            x = x.unflatten(2, (2, 2, 4)).unflatten(1, (rows, columns))
            return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
        return x.mean(1) if p.tail == "mean" else x

    def forward(self, inputs: Any, time: Tensor, text: Tensor, pairs: Tensor | None = None,
                kept: Tensor | None = None) -> Any:
        p = self.p
        picture = {"tensors": lambda: inputs, "list": lambda: inputs[0], "dictionary": lambda: inputs["sample"],
                   "object": lambda: inputs.sample, "samples": lambda: torch.stack(inputs)}[p.container]()
        x, text, n = self.tokens(picture), self.words(text), p.tokens
        waves = torch.exp(-torch.arange(8) / 4)
        angles = time[:, None] * waves
        c = {"time": self.times(torch.cat([angles.cos(), angles.sin()], -1)), "pairs": pairs, "kept": kept,
             "rotary": None}
        if p.position == "table":
            x = x + self.table[:, :n]
        elif p.position == "sine":
            x = x + torch.outer(torch.arange(n).float(), torch.exp(-torch.arange(p.width) / 8)).sin()
        elif p.position == "grid":
            row, column = self.table[:, : p.grid[0]], self.table[:, 1 : 1 + p.grid[1]]
            x = x + (row[:, :, None] + column[:, None]).flatten(1, 2)
        elif p.position == "rotary":
            turns = torch.outer(torch.arange(n).float(), torch.exp(-torch.arange(p.width // p.heads // 2).float()))
            c["rotary"] = tuple(t.repeat(1, 2) for t in (turns.cos(), turns.sin()))
        kept_for_later: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if self.merges is not None and i >= p.depth - len(self.merges):
                x = self.merges[p.depth - 1 - i](torch.cat([x, kept_for_later.pop()], -1))
            x, text = block(x, text, c)
            if self.merges is not None and i < len(self.merges):
                kept_for_later.append(x)
        out = self.picture(self.norm(x))
        return {"tensors": lambda: out, "list": lambda: [out, text.mean(1)], "dictionary": lambda: {"out": out},
                "object": lambda: Sample(out, [text]), "samples": lambda: list(out)}[p.container]()


def drawn(seed: int) -> tuple[Plan, Model, dict[str, Any]]:
    """The model of this seed, and the arguments of a call."""
    p = plan(random.Random(seed))
    torch.manual_seed(seed)
    model = Model(p).eval().requires_grad_(False)
    rows, columns = p.grid
    picture = torch.randn(p.batch, p.tokens, p.width) if p.embedding == "given" else torch.randn(
        p.batch, 4, 2 * rows, 2 * columns)
    inputs = {"tensors": picture, "list": [picture, torch.randn(3)], "dictionary": {"sample": picture},
              "object": Sample(picture), "samples": [*picture]}[p.container]
    given: dict[str, Any] = {"inputs": inputs, "time": torch.rand(p.batch) * 9,
                             "text": torch.randn(p.batch, p.text, 10 if p.text_projected else p.width)}
    kinds = {block[0] for block in p.blocks}
    if "pair bias" in kinds:
        given["pairs"] = torch.randn(p.batch, p.tokens, p.tokens, 3)
    if "masked" in kinds:
        given["kept"] = torch.randint(1, p.tokens + 1, (p.batch,))
    return p, model, given
