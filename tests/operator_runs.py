"""One call of an operator between two blocks of attention, on two ranks in lock-step, against plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from emulation import sharded
from operators import FAMILIES
from torch import Tensor, nn

from xdit_compile.frontend.capture import capture
from xdit_compile.ir.call_arguments import call_arguments
from xdit_compile.ir.layout import Dim, Layout
from xdit_compile.ir.program import module_of
from xdit_compile.ir.pytree import flatten
from xdit_compile.passes.canonicalize import canonicalize
from xdit_compile.passes.rules import RULES, find_rule
from xdit_compile.spec import ShardingSpec

BATCH, TOKENS, WIDTH = 2, 12, 16


def written(x: Tensor, where: Any, value: Any) -> Tensor:
    """``x`` with ``x[where] = value``."""
    x = x.clone()
    x[where] = value
    return x


NAMES = {"torch": torch, "F": F, "set_": written}


class Block(nn.Module):
    """Attention of two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Call(nn.Module):
    """The call itself, and what it may name."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.code = compile(text.strip(), "<call>", "eval")
        draw = torch.Generator().manual_seed(1)
        for name, shape in {"weight": (16, 16), "bias": (16,), "cube": (4, 16, 16), "kernel1": (16, 16, 3),
                            "kernel2": (16, 16, 3, 3), "theta": (2, 2, 3)}.items():
            self.register_buffer(name, torch.randn(shape, generator=draw) / 4)
        self.register_buffer("ones", torch.ones(16))
        self.register_buffer("picked", torch.tensor([7, 0, 4]))
        self.register_buffer("rows", torch.tensor([1, 0, 1]))
        self.register_buffer("counts", torch.tensor([1, 2, 0, 3, 1, 1, 1, 1, 1, 1, 2, 1]))

    def forward(self, x: Tensor, y: Tensor) -> Any:
        given = dict(self.named_buffers()) | {
            "x": x, "y": y, "numbers": (x[..., 0].tanh() * 4 + 5).long(), "image": x.mT.unflatten(2, (4, 3)),
            "square": x @ x.mT + 4 * torch.eye(TOKENS)}
        if "numbers" not in self.code.co_names:
            del given["numbers"]
        return eval(self.code, NAMES, given)


class Model(nn.Module):
    """Two blocks with the call between them, whose result, of whatever shape, scales what enters the second."""

    def __init__(self, text: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.other, self.second = nn.Linear(8, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks, self.call = nn.ModuleList(Block() for _ in range(2)), Call(text)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.blocks[0](self.first(x))
        made = self.call(x, self.other(x))
        made = list(made) if isinstance(made, (tuple, list)) else [made]
        gates = [_gate(m) for m in made]
        for gate in gates:
            x = x + self.second(x) * gate
        return (self.blocks[1](x), *made)


def _gate(made: Tensor) -> Tensor:
    """Something that goes with (batch, tokens, width)."""
    made = torch.view_as_real(made) if made.is_complex() else made.float()
    if made.shape[:2] == (BATCH, TOKENS):
        return made.flatten(2).mean(2, keepdim=True).tanh() if made.ndim > 2 else made[..., None].tanh()
    return made.mean().tanh()


@dataclass(frozen=True)
class Found:
    """How a call went: the operators that it became, what they met, and the largest difference."""

    text: str
    operators: tuple[str, ...]
    error: float
    exchanges: tuple[str, ...]
    """Kinds of collectives on the call's behalf."""
    fallbacks: tuple[str, ...]

    @property
    def how(self) -> str:
        if self.fallbacks:
            return "computed whole, for want of a rule"
        if not self.operators:
            return "no operator is left"
        return ", ".join(sorted(set(self.exchanges))) or "local"


def calls() -> dict[str, list[str]]:
    """The calls of each family."""
    return {family: [line.strip() for line in text.strip().splitlines()] for family, text in FAMILIES.items()}


@torch.no_grad()
def measure(text: str, spec: str = "ulysses=2") -> Found:
    model = Model(text).eval().requires_grad_(False)
    arguments = call_arguments(model, {"x": torch.randn(BATCH, TOKENS, 8, generator=torch.Generator().manual_seed(0))})
    result = model(*arguments[0], **arguments[1])
    program = capture(model, *arguments)
    whole = replace(canonicalize(program), spec=ShardingSpec.parse(spec))
    graph = whole.main.graph
    first = next(n for n in graph.nodes if n.target is torch.ops.aten.linear.default)
    cut = Layout.replicated((BATCH, TOKENS, WIDTH)).replace(1, Dim.even(TOKENS, 2))
    found = sharded(model, arguments, flatten((result, arguments))[0], whole, {first.name: cut})
    mine = [n for n in found.notes if n.module == "call"]
    targets = dict.fromkeys(str(n.target) for n in graph.nodes if n.op == "call_function" and module_of(n) == "call"
                            and isinstance(n.target, torch._ops.OpOverload))
    return Found(text, tuple(targets), found.error,
                 tuple(n.text.partition(":")[0] for n in mine if n.kind == "collective"),
                 tuple(n.text for n in mine if n.kind == "fallback"))


def kind_of(operator: str) -> str:
    """How an operator of a graph is followed."""
    namespace, packet, overload = operator.split(".")
    op = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    return "rule" if op in RULES else "element-wise" if find_rule(op) else "none"
