"""Small models for what is compiled, and what the workers of the pool run with them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from emulation import difference
from torch import Tensor, nn
from torch._dynamo.utils import counters

import xdit_compile
from xdit_compile.ir.call_arguments import call_arguments

WIDTH, HEADS = 24, 6


class Block(nn.Module):
    """Attention and MLP side by side, as in single-stream blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.up = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        y = F.layer_norm(x, x.shape[-1:]) * scale
        q, k, v = (t.unflatten(2, (HEADS, -1)).transpose(1, 2) for t in self.qkv(y).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.down(torch.cat([attended, F.gelu(self.up(y))], -1))


class Deep(nn.Module):
    """Tokens and a time; something to do before, between and after the blocks."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.embed, self.time, self.out = nn.Linear(8, WIDTH), nn.Linear(1, WIDTH), nn.Linear(WIDTH, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x, scale = self.embed(x), 1 + F.silu(self.time(time[:, None]))[:, None]
        for block in self.blocks:
            x = block(x, scale)
        return self.out(F.layer_norm(x, x.shape[-1:])).tanh()


def deep(blocks: int) -> nn.Module:
    torch.manual_seed(0)
    return Deep(blocks).eval()


def inputs(step: int = 0, tokens: int = 17) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"x": torch.randn(1, tokens, 8, generator=generator), "time": torch.rand(1, generator=generator)}


def compiles() -> dict[str, int]:
    """How often a graph was compiled so far, and how often dynamo, which has nothing to do here, traced one."""
    return {"lowered": counters["aot_autograd"]["total"], "traced": counters["stats"]["unique_graphs"]}


def difference_of_outputs(parallel: Any, model: nn.Module, step: int = 0) -> float:
    with torch.no_grad():
        return difference(parallel(**inputs(step)), model(**inputs(step)))


def run(spec: str, world: int) -> dict[str, Any]:
    """What two steps under ``spec`` give: differences to the model, how it was made, and the code of inductor."""
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    counters.clear()
    model = deep(2)
    parallel = xdit_compile.parallelize(model, spec, ranks=range(world), timeout=100)
    error, codes = run_and_get_code(difference_of_outputs, parallel, model)
    before = compiles()
    errors = [error, difference_of_outputs(parallel, model, 1)]
    (ready,) = parallel.runners["forward"].programs.values()
    return {"errors": errors, "first": before, "after": compiles(), "codes": codes,
            "notes": [str(n) for n in ready.compiled.local.notes]}


def arguments(model: nn.Module, tokens: int = 17) -> Any:
    return call_arguments(model, inputs(tokens=tokens))
