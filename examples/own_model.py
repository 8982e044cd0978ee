"""A model of your own, with nothing of diffusers in it, on two processes that this script starts itself.

    python examples/own_model.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import xdit_compile


class Block(nn.Module):
    """Attention and a perceptron, modulated by the time."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 4 * width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        scale, gate, scale_2, gate_2 = self.modulation(time)[:, None].chunk(4, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for t in self.qkv(self.norm(x) * (1 + scale)).chunk(3, dim=-1))
        x = x + gate * self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + gate_2 * self.down(F.gelu(self.up(self.norm(x) * (1 + scale_2))))


class OwnDiT(nn.Module):
    """Noise in, velocity out; over (batch, tokens, 16)."""

    def __init__(self, width: int = 64, heads: int = 4, layers: int = 3) -> None:
        super().__init__()
        self.enter, self.leave, self.time = nn.Linear(16, width), nn.Linear(width, 16), nn.Linear(1, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        x, time = self.enter(x), F.silu(self.time(time[:, None]))
        for block in self.blocks:
            x = block(x, time)
        return self.leave(x)


def example() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A model and the arguments of a call: ``xdit-compile explain examples/own_model.py:example --spec ulysses=2``."""
    torch.manual_seed(0)
    return OwnDiT().eval(), {"x": torch.randn(1, 256, 16), "time": torch.tensor([0.7])}


def run(spec: str) -> torch.Tensor:
    """What each process does."""
    model, inputs = example()
    with torch.no_grad():
        return xdit_compile.parallelize(model, spec)(**inputs)


def main() -> None:
    model, inputs = example()
    with torch.no_grad():
        expected = model(**inputs)
    for rank, result in enumerate(xdit_compile.launch(run, "ulysses=2", world_size=2)):
        print(f"rank {rank}: largest difference to one device {(result - expected).abs().max():.1e}")
    print(xdit_compile.explain(model, "ulysses=2", inputs).verdict())


if __name__ == "__main__":  # because every process imports this file
    main()
