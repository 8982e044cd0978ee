"""What the ranks of the pool run for the tests of the user's call: tiny models, and scenes to act out.

A scene is a function that every rank runs; it returns what was seen, and the test says what should have been.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import xdit_compile
import xdit_compile.frontend.capture as frontend
import xdit_compile.frontend.program_cache as cache
from xdit_compile.frontend.objects import CAPTURES
from xdit_compile.ir.pytree import flatten

# Seconds a rank waits for another; only what should not happen takes so long.
TIMEOUT = 30.0

# --------------------------------------------------------------------------------------------------
# Models


class Gain:
    """A processor as adapters install them: a plain object that attention consults, with a number in it."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.factor


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.rise, self.fall = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)
        self.processor: Callable[[Tensor], Tensor] = Gain(1.0)

    def forward(self, x: Tensor) -> Tensor:
        """x is (batch, tokens, width)."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.processor(self.out(mixed))
        return x + self.fall(self.dropout(F.gelu(self.rise(self.norm2(x)))))


@dataclass
class Output:
    """Of a class that pytree does not know, with what is no tensor in it."""

    sample: Tensor
    tokens: int
    label: str | None


class Tiny(nn.Module):
    """Two blocks over (batch, tokens, 6), with a step, and Python arguments."""

    def __init__(self, width: int = 24, heads: int = 4, layers: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, width), nn.Linear(width, 6)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.strength = 1.0

    def forward(
        self,
        x: Tensor,
        step: Tensor,
        shift: Tensor | None = None,
        label: str | None = None,
        *,
        scale: float = 1.0,
        return_dict: bool = True,
    ) -> Output | tuple[Tensor]:
        y = self.body(self.enter(x) * step[:, None, None] * scale)
        y = self.leave(y) * self.strength
        y = y if shift is None else y + shift
        return Output(y, y.shape[1], label) if return_dict else (y,)

    def body(self, y: Tensor) -> Tensor:
        for block in self.blocks:
            y = block(y)
        return y


class Undecided(Tiny):
    """Reads a value that depends on its weights."""

    def body(self, y: Tensor) -> Tensor:
        if self.enter.weight.sum() + y.mean().item() > 0:  # the line that cannot be captured
            y = -y
        return super().body(y)


class Counting(Tiny):
    """Keeps a count of its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def body(self, y: Tensor) -> Tensor:
        self.calls.add_(1)
        return super().body(y) + self.calls


class Forked(Tiny):
    """Two optional tensors that do opposite things."""

    def forward(
        self,
        x: Tensor,
        step: Tensor,
        plus: Tensor | None = None,  # type: ignore[override]
        minus: Tensor | None = None,
    ) -> Tensor:
        y = self.leave(self.body(self.enter(x) * step[:, None, None]))
        if plus is not None:
            y = y + plus
        return y if minus is None else y - minus


class Mlp(nn.Module):
    """No attention, hence no tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@torch.library.custom_op("calls::trip", mutates_args=())
def trip(x: Tensor, rank: int) -> Tensor:
    """Fails on one rank while the forward runs, as a kernel out of memory would."""
    if dist.is_initialized() and dist.get_rank() == rank:
        raise ValueError("tripped")
    return x.clone()


@trip.register_fake
def _(x: Tensor, rank: int) -> Tensor:
    return torch.empty_like(x)


class Tripping(Tiny):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def body(self, y: Tensor) -> Tensor:
        return super().body(trip(super().body(y), self.rank))


class OneRefuses(Tiny):
    """Whose Python fails on rank 1 alone."""

    def body(self, y: Tensor) -> Tensor:
        if dist.get_rank() == 1:
            raise ValueError("rank 1 refuses")
        return super().body(y)


def made(cls: type[nn.Module] = Tiny, seed: int = 0, **kwargs: Any) -> Any:
    """A model of its own seed, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cls(**kwargs).eval().requires_grad_(False)


def shortened(name: str) -> nn.Module:
    """A model of the exactness tests with only the last of its blocks of each kind."""
    import models

    model = models.build(name)
    for child, module in list(model.named_children()):
        if isinstance(module, nn.ModuleList):
            setattr(model, child, module[-1:])
    return model


def inputs(
    batch: int = 1, tokens: int = 7, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(batch, tokens, 6, generator=generator).to(dtype),
        "step": (0.5 + torch.arange(batch) / 4).to(dtype),
    }


# --------------------------------------------------------------------------------------------------
# Tools


def parallel(model: nn.Module, spec: str = "ulysses=2", **kwargs: Any) -> Any:
    """On the first ranks, as many as the spec needs."""
    world = xdit_compile.ShardingSpec.parse(spec).world_size
    return xdit_compile.parallelize(model, spec, **({"ranks": range(world), "timeout": TIMEOUT} | kwargs))


class Counter:
    """How many captures were made since it was last asked."""

    def __init__(self) -> None:
        self.total = self.told = 0

    def __call__(self) -> int:
        new, self.told = self.total - self.told, self.total
        return new


@contextmanager
def counting() -> Iterator[Counter]:
    counter = Counter()

    def counted(*args: Any, **kwargs: Any) -> Any:
        counter.total += 1
        return frontend.recorded(*args, **kwargs)

    with mock.patch.object(cache, "recorded", counted):
        yield counter


def error(actual: Any, expected: Any) -> float:
    """The largest difference over the largest value, of all tensors in two outputs of one type."""
    assert type(actual) is type(expected), (type(actual), type(expected))
    pairs = list(zip(flatten(actual)[0], flatten(expected)[0], strict=True))
    for a, b in pairs:
        assert a.shape == b.shape and a.dtype == b.dtype and a.device == b.device, (a, b)
    return max(((a.double() - b.double()).abs().max() / b.double().abs().max()).item() for a, b in pairs)


def outcome(call: Callable[[], Any]) -> tuple[str, str]:
    """The class and the text of what a call raises; ("", "") if it succeeds."""
    try:
        call()
    except Exception as raised:
        return type(raised).__name__, str(raised)
    return "", ""


def differs(call: Callable[..., Any], reference: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
    """The error of one call against plain PyTorch."""
    return error(call(*args, **kwargs), reference(*args, **kwargs))


def on_rank(rank: int, there: Any, elsewhere: Any) -> Any:
    return there if dist.get_rank() == rank else elsewhere


# --------------------------------------------------------------------------------------------------
# Scenes: standing where the model stood


def diffusers_stand_in(name: str) -> dict[str, Any]:
    """A parallel model of diffusers, and all that its callers ask of it."""
    import inspect

    import models

    model, call = shortened(name), models.CASES[name].inputs(1, True)
    other = shortened(name)
    p = parallel(model)
    ours, theirs = p.state_dict(), model.state_dict()
    seen: dict[str, Any] = {
        "isinstance": isinstance(p, type(model)),
        "class name": type(p).__name__ == type(model).__name__,
        "config": p.config == model.config,
        "dtype": p.dtype == model.dtype,
        "device": p.device == model.device,
        "training": p.training == model.training,
        "keys": list(ours) == list(theirs),
        "same tensors": all(ours[k].data_ptr() == theirs[k].data_ptr() for k in ours),
        "same parameters": all(a is b for a, b in zip(p.parameters(), model.parameters(), strict=True)),
        "signature": inspect.signature(p.forward) == inspect.signature(model.forward),
        "modules": [n for n, _ in p.named_modules()] == [n for n, _ in model.named_modules()],
        "another object": p is not model and p.forward.__func__ is not model.forward.__func__,
    }
    values = list(inspect.signature(model.forward).parameters)
    positional = [call.get(v, inspect.signature(model.forward).parameters[v].default) for v in values]
    with torch.no_grad(), counting() as captures:
        expected = other(**call)
        out = p(**call)
        seen["type"] = type(out) is type(expected)
        seen["dict error"] = error(out, expected)
        seen["dict captures"] = captures()
        seen["again error"], seen["again captures"] = error(p(**call), expected), captures()
        seen["forward error"], seen["forward captures"] = error(p.forward(**call), expected), captures()
        as_tuple = p(**call | {"return_dict": False})
        seen["tuple"] = type(as_tuple) is tuple
        seen["tuple error"] = error(as_tuple, other(**call | {"return_dict": False}))
        seen["tuple captures"] = captures()
        first = [call[v] for v in values[: len(call)] if v in call]
        rest = {v: call[v] for v in values[len(first) :] if v in call}
        if set(values[: len(first)]) <= set(call):
            seen["positional error"] = error(p(*first, **rest), expected)
            seen["positional captures"] = captures()
        seen["all positional error"] = error(p(*positional), expected)
        captures()
        with p.cache_context("cond"):
            seen["context error"] = error(p(**call), expected)
        with model.cache_context("cond"):
            seen["model error"] = error(model(**call), expected)
    return seen


def shared_by_keyword_and_position() -> dict[str, Any]:
    model, call = made(), inputs()
    p, expected = parallel(model), made()(**inputs())
    with counting() as captures:
        errors = [
            error(p(**call), expected),
            error(p(call["x"], call["step"]), expected),
            error(p(call["x"], step=call["step"]), expected),
            error(p(step=call["step"], x=call["x"]), expected),
        ]
        return {"errors": errors, "captures": captures()}


def python_arguments() -> dict[str, Any]:
    model, reference = made(), made()
    p, call = parallel(model), inputs()
    shift = torch.randn(1, 7, 6, generator=torch.Generator().manual_seed(5))
    seen: dict[str, Any] = {}
    with counting() as captures:
        for name, extra in {
            "scale 1": {"scale": 1.0},
            "scale 2": {"scale": 2.0},
            "scale 1 again": {"scale": 1.0},
            "label": {"label": "a cat"},
            "shift": {"shift": shift},
            "tuple": {"return_dict": False},
        }.items():
            out, expected = p(**call, **extra), reference(**call, **extra)
            seen[name] = error(out, expected), captures()
            if isinstance(expected, Output):
                assert (out.tokens, out.label) == (expected.tokens, expected.label)
    return seen


def output_of_views() -> dict[str, Any]:
    import models

    model, call = models.build("views"), models.CASES["views"].inputs(1, True)
    out, expected = parallel(model)(**call), model(**call)
    return {
        "type": type(out) is type(expected),
        "fields": list(vars(out)) == list(vars(expected)),
        "error": error(out, expected),
    }


def casts() -> dict[str, tuple[float, float, bool]]:
    """By dtype: the error against plain PyTorch in that dtype, that of plain PyTorch in it against float64,
    and whether ``to`` gave back the model it was called on."""
    model = made()
    p = parallel(model)
    exact = made().double()(**inputs(dtype=torch.float64)).sample
    p(**inputs())
    seen = {}
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        p_is_self = p.to(dtype) is p
        p.load_state_dict(made().state_dict())  # an earlier cast has rounded them
        reference = made().to(dtype)
        expected = reference(**inputs(dtype=dtype))
        out = p(**inputs(dtype=dtype))
        rounding = ((expected.sample.double() - exact).abs().max() / exact.abs().max()).item()
        seen[str(dtype)] = error(out, expected), rounding, p_is_self
    return seen


def weights() -> dict[str, tuple[float, int]]:
    """By way of changing weights: the error after it, and the captures it took."""
    model, reference, call = made(), made(), inputs()
    p = parallel(model)
    seen = {}
    with counting() as captures:

        def look(name: str) -> None:
            seen[name] = differs(p, reference, **call), captures()

        look("first")
        for m in (model, reference):
            m.blocks[0].qkv.weight.mul_(1.5)
            m.leave.bias.add_(3)
        look("in place")
        p.load_state_dict(made(seed=1).state_dict())
        reference.load_state_dict(made(seed=1).state_dict())
        look("load_state_dict")
        p.load_state_dict(made(seed=2).state_dict(), assign=True)
        reference.load_state_dict(made(seed=2).state_dict())
        look("assign")
        model.load_state_dict(made(seed=3).state_dict(), assign=True)
        reference.load_state_dict(made(seed=3).state_dict())
        look("assign on the model")
        for m in (model, reference):
            m.blocks[1].out.weight = nn.Parameter(made(seed=4).blocks[1].out.weight)
        look("new parameter")
        for m in (p, reference):
            m.enter.weight.data = made(seed=5).enter.weight.data
        look("data")
    return seen


def tied() -> dict[str, float]:
    """Two layers that share a weight, and no longer do."""
    model, reference, call = made(), made(), inputs()
    for m in (model, reference):
        m.blocks[1].out.weight = m.blocks[0].out.weight
    p = parallel(model)
    seen = {"tied": differs(p, reference, **call)}
    for m in (model, reference):
        m.blocks[1].out.weight = nn.Parameter(made(seed=4).blocks[1].out.weight)
    return seen | {"untied": differs(p, reference, **call)}


def exchanged_modules() -> list[float]:
    """One layer after the other takes a place in the model, every other one at the address of a freed one."""
    model, reference, call = made(), made(), inputs()
    p = parallel(model)

    def look() -> float:
        reference.leave.load_state_dict(model.leave.state_dict())
        return differs(p, reference, **call)

    seen = [look()]
    with torch.random.fork_rng():
        torch.manual_seed(0)  # layers are alike on all ranks
        for _ in range(3):
            address = id(model.leave)
            p.leave = nn.Linear(24, 6).requires_grad_(False)
            layers = [nn.Linear(24, 6).requires_grad_(False) for _ in range(300)]
            seen.append(look())
            # Which of them has the address differs from rank to rank, and what they compute must not.
            layer = next((x for x in layers if id(x) == address), layers[0])
            layer.load_state_dict(layers[-1].state_dict())
            p.leave = layer
            del layers, layer
            seen.append(look())
            p.leave = nn.Linear(24, 6).requires_grad_(False)
    return seen


def other_layer() -> tuple[float, int]:
    model, reference, call = made(), made(), inputs()
    p = parallel(model)
    with counting() as captures:
        p(**call)
        captures()
        for m in (model, reference):
            m.blocks[1].rise = nn.Sequential(made(seed=3).blocks[0].rise, nn.Tanh())
        return differs(p, reference, **call), captures()


def processors(kind: str) -> dict[str, tuple[float, int]]:
    """Another attention processor of diffusers: the error and the captures without and with it."""
    import models
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    class Tripled(AttnProcessor2_0):
        def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
            return 3 * super().__call__(*args, **kwargs)

    model, reference, call = shortened("dit"), shortened("dit"), models.CASES["dit"].inputs(1, True)
    p = parallel(model)
    with torch.no_grad(), counting() as captures:
        seen = {"as built": (differs(p, reference, **call), captures())}
        for m in (p, reference):
            m.transformer_blocks[0].attn1.set_processor(
                {"tripled": Tripled, "written out": AttnProcessor}[kind]()
            )
        return seen | {"exchanged": (differs(p, reference, **call), captures())}


def own_processors() -> dict[str, float]:
    """Plain objects that a block consults: exchanged again and again, and changed from inside."""
    model, reference, call = made(), made(), inputs()
    p = parallel(model)
    seen = {"gain 1": differs(p, reference, **call)}
    for factor in (2.0, 3.0, 4.0):
        for m in (model, reference):
            m.blocks[0].processor = Gain(factor)
        seen[f"gain {factor}"] = differs(p, reference, **call)
    for m in (model, reference):
        m.blocks[0].processor.factor = 7.0
    return seen | {"gain 7 from inside": differs(p, reference, **call)}


def attributes(where: str) -> dict[str, float]:
    """A Python attribute that forward reads, set on the model, on the parallel model or on a block of it."""
    model, reference, call = made(), made(), inputs()
    p = parallel(model)
    seen = {"before": differs(p, reference, **call)}
    if where == "block":
        reference.blocks[0].processor, p.blocks[0].processor = Gain(0.5), Gain(0.5)
    else:
        reference.strength = 2.0
        (p if where == "parallel" else model).strength = 2.0
    return seen | {"after": differs(p, reference, **call), "alone": differs(model, reference, **call)}


def _tripled(module: nn.Module, args: Any, output: Any) -> Any:
    return (3 * output[0],) if isinstance(output, tuple) else 3 * output


def _shifted(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return args, kwargs | {"x": kwargs["x"] + 1}


def hooks(where: str) -> dict[str, float]:
    """Hooks on a layer, or on the model itself, registered before and after the first call."""
    call = inputs() | {"return_dict": False}
    seen = {}
    for when in ("before", "after"):
        model, reference = made(), made()
        p = parallel(model)
        if when == "after":
            p(**call)
        if where == "layer":
            handles = [m.blocks[1].out.register_forward_hook(_tripled) for m in (model, reference)]
        elif where == "output":
            handles = [m.register_forward_hook(_tripled) for m in (model, reference)]
        else:
            handles = [m.register_forward_pre_hook(_shifted, with_kwargs=True) for m in (model, reference)]
        seen[f"{when} the first call"] = differs(p, reference, **call)
        for handle in handles:
            handle.remove()
        seen[f"{when} the first call, and removed"] = differs(p, reference, **call)
    return seen


def modes(*names: str) -> list[tuple[float, bool]]:
    """One call after the other in these modes: the error, and whether plain PyTorch's dtype came out."""
    model, reference, call = made(), made(), inputs()
    p, seen = parallel(model), []
    scale = reference(**call).sample.abs().max()
    contexts: dict[str, Callable[[], Any]] = {
        "plain": nullcontext,
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        "inference": torch.inference_mode,
        "no grad": torch.no_grad,
    }
    for name in names:
        with contexts[name]():
            expected, out = reference(**call).sample, p(**call).sample
            seen.append((((out - expected).abs().max() / scale).item(), out.dtype == expected.dtype))
    return seen


def strides() -> dict[str, float]:
    """Inputs that lie otherwise in memory than those captured with."""
    model, reference = made(), made()
    p = parallel(model)
    call = inputs(2)
    across = call | {"x": call["x"].transpose(1, 2).contiguous().transpose(1, 2)}
    spread = call | {"x": call["x"][:1].expand(2, -1, -1)}
    return {
        "plain": differs(p, reference, **call),
        "transposed": differs(p, reference, **across),
        "expanded": differs(p, reference, **spread),
        "plain again": differs(p, reference, **call),
    }


def shapes() -> dict[str, tuple[float, int]]:
    model, reference = made(), made()
    p = parallel(model)
    seen = {}
    with counting() as captures:
        for name, (batch, tokens, seed) in {
            "7 tokens": (1, 7, 0),
            "12 tokens": (1, 12, 0),
            "7 again": (1, 7, 1),
            "batch of 3": (3, 7, 0),
            "12 again": (1, 12, 2),
        }.items():
            seen[name] = differs(p, reference, **inputs(batch, tokens, seed)), captures()
        q = parallel(model, "ring=2")
        seen["another spec"] = differs(q, reference, **inputs(1, 12, 3)), captures()
    return seen


def between(name: str) -> dict[str, float]:
    """The model alone, between and after parallel calls of two kinds; nothing ran before the first."""
    import models

    reference = shortened(name)
    case = models.CASES[name]
    one, two = case.inputs(1, True), case.inputs(2, False)
    with torch.no_grad():
        # In this order: what the reference caches on its class must not help the model.
        model = shortened(name)
        p = parallel(model)
        outs = [p(**one), model(**one), p(**two), model(**two), model(**one), p(**one)]
        wanted = [reference(**i) for i in (one, one, two, two, one, one)]
    names = (
        "parallel first",
        "alone",
        "parallel, new shape",
        "alone, new shape",
        "alone, old shape",
        "parallel again",
    )
    return {n: error(o, w) for n, o, w in zip(names, outs, wanted, strict=True)}


def gradients() -> dict[str, Any]:
    model = made().requires_grad_(True)
    p, call = parallel(model), inputs()
    needing = call | {"x": call["x"].clone().requires_grad_()}
    with torch.no_grad():
        quiet = p(**call).sample.requires_grad
        allowed = outcome(lambda: p(**needing))
    with torch.enable_grad():
        loud = p(**call).sample.requires_grad
        refused = outcome(lambda: p(**needing))
    return {
        "under no_grad": quiet,
        "under grad": loud,
        "allowed": allowed,
        "refused": refused,
        "after": differs(p, made(), **call),
    }


def unknown_keyword() -> dict[str, Any]:
    model, call = made(), inputs()
    p = parallel(model)
    return {
        "parallel": outcome(lambda: p(**call, colour="red")),
        "model": outcome(lambda: model(**call, colour="red")),
        "missing": outcome(lambda: p(call["x"])),
        "after": differs(p, model, **call),
    }


def captured_ahead(way: str) -> dict[str, Any]:
    """Captured on the meta device, then given weights, then called."""
    with torch.device("meta"):
        model = made()
    call = inputs()
    with counting() as captures:
        xdit_compile.capture(
            model, {k: v.to("meta") for k, v in call.items()} if way == "meta inputs" else call
        )
        ahead = captures()
        if way == "assign":
            model.load_state_dict(made().state_dict(), assign=True)
        else:
            model.to_empty(device="cpu")
            model.load_state_dict(made().state_dict())
        p = parallel(model)
        return {
            "ahead": ahead,
            "error": differs(p, made(), **call),
            "then": captures(),
            "positional": outcome(lambda: xdit_compile.capture(model, [call["x"], call["step"]])),
            "positional captures": captures(),
        }


def masks() -> dict[str, tuple[float, int]]:
    """A model that reads its mask: masks of another sum, of the same, and one seen before."""
    import models

    model, reference = shortened("mochi"), shortened("mochi")
    call = models.CASES["mochi"].inputs(1, True)
    p = parallel(model)
    mask = call["encoder_attention_mask"]
    fewer = mask.clone()
    fewer[:, 4:] = False
    moved = mask.roll(1, dims=1)
    seen = {}
    with torch.no_grad(), counting() as captures:
        for name, m in {"first": mask, "fewer": fewer, "moved": moved, "first again": mask.clone()}.items():
            seen[name] = differs(p, reference, **call | {"encoder_attention_mask": m}), captures()
    return seen


def overlapping() -> list[float]:
    """Rank 0 belongs to two groups of one shape, and uses one after the other."""
    reference, call = made(), inputs()
    here = [pair for pair in ((0, 1), (0, 2)) if dist.get_rank() in pair]
    both = [parallel(made(), "ring=2", ranks=pair) for pair in here]
    return [differs(p, reference, **call) for _ in range(2) for p in both]


def dumped() -> list[str]:
    names: list[str] = []
    p = parallel(made(), dump=lambda name, program: names.append(name))
    p(**inputs())
    return names


# --------------------------------------------------------------------------------------------------
# Scenes: bad input


def refused(
    world: int,
    spec: Any,
    cls: type[nn.Module] = Tiny,
    call: dict[str, Any] | None = None,
    training: bool = False,
    **kwargs: Any,
) -> dict[str, Any]:
    """Parallelize and call; what was raised, and how another model does in the same processes afterwards."""
    model = made(cls, **kwargs)

    def attempt() -> None:
        p = xdit_compile.parallelize(model, spec, ranks=range(world), timeout=TIMEOUT)
        p.train(training)
        p(**inputs() if call is None else call)

    raised, text = outcome(attempt)
    good = parallel(made(), f"ring={world}")
    return {"raised": raised, "text": text, "next": differs(good, made(), **inputs())}


def warned(cls: type[nn.Module]) -> dict[str, Any]:
    """A model of which nothing can be split: what it gives, and what was said."""
    with warnings.catch_warnings(record=True) as said, torch.no_grad():
        warnings.simplefilter("always", UserWarning)
        p = parallel(made(cls), "ulysses=2", ranks=range(2))
        call = {"x": inputs()["x"]}
        error = differs(p, made(cls), **call)
    return {"error": error, "warnings": " ".join(str(w.message) for w in said if w.category is UserWarning)}


def refused_twice() -> tuple[str, str]:
    return outcome(lambda: parallel(parallel(made())))


def disagreeing(name: str) -> dict[str, Any]:
    """Rank 1 calls with something else; then all call alike."""
    model = made(Forked) if name == "keyword" else made()
    p, call = parallel(model, "ring=3"), inputs()
    tensor = torch.ones(1, 7, 6)
    theirs: dict[str, Any] = {
        "value": call | {"x": call["x"] + 1e-6},
        "shape": inputs(tokens=8),
        "dtype": call | {"step": call["step"].double()},
        "Python": call | {"scale": 2.0},
        "string": call | {"label": "dog"},
        "missing": call | {"shift": tensor},
        "keyword": call | {"plus": tensor},
    }[name]
    ours = call | {"minus": tensor} if name == "keyword" else call
    first = outcome(lambda: p(**on_rank(1, theirs, ours)))
    return {
        "first": first,
        "then": differs(p, model, **call),
        "again": outcome(lambda: p(**on_rank(1, theirs, ours))),
    }


def tripping(rank: int) -> dict[str, Any]:
    """One rank fails while the forward runs."""
    p = parallel(made(Tripping, rank=rank), "ring=3")
    start = time.monotonic()
    first = outcome(lambda: p(**inputs()))
    took = time.monotonic() - start
    return {
        "first": first,
        "took": took,
        "again": outcome(lambda: p(**inputs())),
        "next": differs(parallel(made(), "ring=3"), made(), **inputs()),
    }


def one_refuses() -> dict[str, Any]:
    p = parallel(made(OneRefuses), "ring=3")
    return {
        "first": outcome(lambda: p(**inputs())),
        "next": differs(parallel(made(), "ring=3"), made(), **inputs()),
    }


def one_stays_away(timeout: float) -> tuple[str, str]:
    """Rank 1 makes a call that fails before any rank is asked."""
    p = parallel(made(), timeout=timeout)
    p(**inputs())
    return outcome(lambda: p(**on_rank(1, inputs() | {"colour": "red"}, inputs())))


def models_differ(how: str) -> tuple[str, str]:
    """Rank 1 holds another class, one more layer, another spec, or another number in Python."""
    model, spec = made(), "ulysses=2"
    if dist.get_rank() == 1:
        model = made(layers=3) if how == "layers" else made(Undecided) if how == "class" else model
        spec = "ring=2" if how == "spec" else spec
        model.strength = 2.0 if how == "attribute" else 1.0
    return outcome(lambda: parallel(model, spec)(**inputs()))


def model_changes_on_one_rank() -> dict[str, Any]:
    """Rank 1 alone needs another program from its second call on."""
    model = made()
    p = parallel(model)
    p(**inputs())
    model.strength = on_rank(1, 2.0, 1.0)
    start = time.monotonic()
    raised, text = outcome(lambda: p(**inputs()))
    return {"raised": raised, "text": text, "took": time.monotonic() - start}


def uncaptured_is_unharmed() -> dict[str, Any]:
    """A model that cannot be captured goes on alone as before."""
    model = made(Undecided)
    call = inputs()
    expected = model(**call)
    state = {k: dict(vars(m)) for k, m in model.named_modules()}
    raised, _ = outcome(lambda: parallel(model)(**call))
    # Its programs are kept on the model, so that they are freed with it.
    same = all(vars(m).keys() - {CAPTURES} == state[k].keys() for k, m in model.named_modules())
    return {"raised": raised, "same": same, "error": error(model(**call), expected)}
