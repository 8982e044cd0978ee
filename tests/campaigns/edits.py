"""Random edits of random models between calls, against plain PyTorch.

    python tests/campaigns/edits.py --count 2000 --seed 0

Each case is a small denoiser that reads a few pieces of state, each of another kind (``KINDS``), in its forward. It
runs in parallel on one rank; between calls, in the middle of loops and between them, pieces are edited. A result that
is not the model's own is a failure. So is a refusal: all of these can be watched.
"""

from __future__ import annotations

import argparse
import array
import collections
import contextvars
import ctypes
import dataclasses
import enum
import functools
import os
import random
import sys
import threading
import traceback
import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import xdit_compile

F = types.SimpleNamespace(act=lambda x: x.sin(), other=lambda x: x.cos())
GAIN, FLAGS, TABLES = 1.0, {"scale": 1.0, "inner": [1.0]}, [torch.ones(8)]
CONTEXT = contextvars.ContextVar("CONTEXT", default=1.0)
LOCAL = threading.local()
Point = collections.namedtuple("Point", "x y")


class Mode(enum.Enum):
    SMALL, LARGE = 1.0, 2.0


@dataclasses.dataclass(slots=True)
class Slotted:
    scale: float = 1.0


@dataclasses.dataclass
class Fields:
    scale: float = 1.0


class Slots:
    __slots__ = ("inner", "scale")

    def __init__(self) -> None:
        self.scale, self.inner = 1.0, [1.0]


class Forwarding:
    """Answers for what it holds."""

    def __init__(self) -> None:
        self.held = {"scale": 1.0}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "held":
            raise AttributeError(name)
        return self.held[name]


class Derived:
    """Its scale is a property over a class attribute and a hidden one."""

    factor = 1.0

    def __init__(self) -> None:
        self._own = 1.0

    @property
    def scale(self) -> float:
        return self._own * self.factor

    def method(self) -> float:
        return self._own


class Listed(list):  # type: ignore[type-arg]
    """A list with an attribute."""

    scale = 1.0


def scaled(x: Tensor, by: float = 1.0) -> Tensor:
    return x * by


def closed() -> tuple[Callable[[], float], Callable[[float], None]]:
    """A function over a cell, and one that fills it."""
    value = 1.0

    def fill(new: float) -> None:
        nonlocal value
        value = new

    return lambda: value, fill


@functools.lru_cache
def remembered(n: int) -> Tensor:
    return torch.linspace(0, 1, n) * GAIN


def _global(new: float) -> None:
    global GAIN
    GAIN = new
    remembered.cache_clear()


@dataclasses.dataclass(frozen=True)
class Kind:
    """A piece of state: how a model gets it, what forward makes of it, and how it is edited, by a number."""

    make: Callable[[], Any]
    read: Callable[[Any, Tensor], Tensor]
    edit: Callable[[Any, Any, float], Any]
    """Of (model, piece, number); what it returns takes the place of the piece, if it is not None."""


def _set(name: str) -> Callable[[Any, Any, float], None]:
    return lambda m, v, n: setattr(v, name, n)


def _item(key: Any) -> Callable[[Any, Any, float], None]:
    return lambda m, v, n: v.__setitem__(key, n)


def _default(m: Any, v: Any, n: float) -> None:
    scaled.__defaults__ = (n,)


def _class(cls: type, name: str) -> Callable[[Any, Any, float], None]:
    return lambda m, v, n: setattr(cls, name, n)


def _function(m: Any, v: Any, n: float) -> None:
    F.act = (lambda x: x.sin() * n) if n > 1 else F.other


def _method(m: Any, v: Any, n: float) -> None:
    Derived.method = lambda self: self._own * n  # type: ignore[method-assign]


def _block(m: Any, v: Any, n: float) -> None:
    Block.forward = (lambda self, x, text: _FORWARD(self, x, text) * n)  # type: ignore[method-assign]


def _same(value: Any, x: Tensor) -> Tensor:
    return x * value


def _nothing(value: Any, x: Tensor) -> Tensor:
    return x


def _data(m: Any, v: Any, n: float) -> None:
    m.text.weight.data.mul_(n)


KINDS: dict[str, Kind] = {
    "number": Kind(lambda: 1.0, _same, lambda m, v, n: n),
    "number of another type": Kind(lambda: 1, lambda v, x: x / 2 if isinstance(v, float) else x,
                                   lambda m, v, n: 1.0 if isinstance(v, int) else 1),
    "string": Kind(lambda: "a", lambda v, x: x * len(v), lambda m, v, n: "b" * int(n * 3)),
    "slotted dataclass": Kind(Slotted, lambda v, x: x * v.scale, _set("scale")),
    "dataclass": Kind(Fields, lambda v, x: x * v.scale, _set("scale")),
    "slots": Kind(Slots, lambda v, x: x * v.scale * v.inner[0], lambda m, v, n: v.inner.__setitem__(0, n)),
    "namespace": Kind(types.SimpleNamespace, lambda v, x: x * getattr(v, "scale", 1.0), _set("scale")),
    "getattr": Kind(Forwarding, lambda v, x: x * v.scale, lambda m, v, n: v.held.update(scale=n)),
    "property": Kind(Derived, lambda v, x: x * v.scale, _set("_own")),
    "class attribute": Kind(Derived, lambda v, x: x * v.scale, _class(Derived, "factor")),
    "method replaced": Kind(Derived, lambda v, x: x * v.method(), _method),
    "list subclass": Kind(Listed, lambda v, x: x * v.scale, _set("scale")),
    "list": Kind(lambda: [1.0, [2.0]], lambda v, x: x * v[1][0], lambda m, v, n: v[1].__setitem__(0, n)),
    "dictionary": Kind(lambda: {"a": 1.0}, lambda v, x: x * sum(v.values()), _item("a")),
    "new key": Kind(dict, lambda v, x: x * len(v) + x, lambda m, v, n: v.__setitem__(n, n)),
    "set": Kind(set, lambda v, x: x * (1 + sum(v)), lambda m, v, n: v.add(n)),
    "deque": Kind(lambda: collections.deque([1.0]), lambda v, x: x * v[0], _item(0)),
    "array": Kind(lambda: array.array("d", [1.0]), lambda v, x: x * v[0], _item(0)),
    "bytearray": Kind(lambda: bytearray(b"\1"), lambda v, x: x * v[0], lambda m, v, n: v.__setitem__(0, int(n * 9))),
    "numpy": Kind(lambda: np.ones(3), lambda v, x: x * float(v[1]), lambda m, v, n: v.fill(n)),
    "numpy scalar": Kind(lambda: np.float64(1), lambda v, x: x * float(v), lambda m, v, n: np.float64(n)),
    "ctypes": Kind(lambda: ctypes.c_double(1.0), lambda v, x: x * v.value, _set("value")),
    "named tuple": Kind(lambda: Point(1.0, 2.0), lambda v, x: x * v.y, lambda m, v, n: v._replace(y=n)),
    "enum": Kind(lambda: Mode.SMALL, lambda v, x: x * v.value, lambda m, v, n: Mode.LARGE if n > 1 else Mode.SMALL),
    "partial": Kind(lambda: functools.partial(scaled, by=1.0), lambda v, x: v(x),
                    lambda m, v, n: functools.partial(scaled, by=n)),
    "defaults": Kind(lambda: scaled, lambda v, x: v(x), _default),
    "lambda": Kind(lambda: [lambda x: x], lambda v, x: v[0](x), lambda m, v, n: v.__setitem__(0, lambda x: x * n)),
    "cell": Kind(closed, lambda v, x: x * v[0](), lambda m, v, n: v[1](n)),
    "module global": Kind(lambda: None, lambda v, x: x * GAIN, lambda m, v, n: _global(n)),
    "global dictionary": Kind(lambda: None, lambda v, x: x * FLAGS["scale"], lambda m, v, n: FLAGS.update(scale=n)),
    "list in a global": Kind(lambda: None, lambda v, x: x * FLAGS["inner"][0],  # type: ignore[index]
                             lambda m, v, n: FLAGS["inner"].__setitem__(0, n)),  # type: ignore[attr-defined]
    "global tensor, in place": Kind(lambda: None, lambda v, x: x * TABLES[0], lambda m, v, n: TABLES[0].mul_(n)),
    "function replaced": Kind(lambda: None, lambda v, x: F.act(x), _function),
    "forward of a block's class": Kind(lambda: None, lambda v, x: x, _block),
    "remembered table": Kind(lambda: None, lambda v, x: x + remembered(x.shape[-1]), lambda m, v, n: _global(n)),
    "context variable": Kind(lambda: None, lambda v, x: x * CONTEXT.get(), lambda m, v, n: CONTEXT.set(n) and None),
    "thread's own": Kind(lambda: None, lambda v, x: x * getattr(LOCAL, "scale", 1.0),
                         lambda m, v, n: setattr(LOCAL, "scale", n)),
    "environment": Kind(lambda: None, lambda v, x: x * float(os.environ.get("EDITS", "1")),
                        lambda m, v, n: os.environ.__setitem__("EDITS", str(n))),
    "default dtype": Kind(lambda: None, lambda v, x: (x * torch.tensor(1 / 3)).float(),
                          lambda m, v, n: torch.set_default_dtype(torch.float64 if n > 1 else torch.float32)),
    "flag of PyTorch": Kind(lambda: None, lambda v, x: x * 2 if torch.backends.cudnn.benchmark else x,
                            lambda m, v, n: setattr(torch.backends.cudnn, "benchmark", n > 1)),
    "tensor attribute, in place": Kind(lambda: torch.ones(8), _same, lambda m, v, n: v.mul_(n)),
    "tensor attribute, by .data": Kind(lambda: torch.ones(8), _same, lambda m, v, n: v.data.mul_(n)),
    "tensor that is read into Python": Kind(lambda: [torch.tensor(1.0)], lambda v, x: x * float(v[0]),
                                            lambda m, v, n: v[0].fill_(n)),
    "tensor in an object": Kind(lambda: types.SimpleNamespace(t=torch.ones(8)), lambda v, x: x * v.t,
                                lambda m, v, n: v.t.mul_(n)),
    "tensor in a dict in a list": Kind(lambda: [{"t": torch.ones(8)}], lambda v, x: x * v[0]["t"],
                                       lambda m, v, n: v[0].update(t=torch.full((8,), n))),
    "module in a list": Kind(lambda: [nn.Linear(8, 8)], lambda v, x: v[0](x),
                             lambda m, v, n: v[0].weight.data.mul_(n)),
    "a parameter": Kind(lambda: None, _nothing, lambda m, v, n: m.text.weight.mul_(n)),
    "a parameter's data": Kind(lambda: None, _nothing, _data),
    "a new parameter": Kind(lambda: None, _nothing, lambda m, v, n: setattr(
        m.text, "weight", nn.Parameter(m.text.weight * n, requires_grad=False))),
    "a hook": Kind(list, _nothing, lambda m, v, n: v.append(m.text.register_forward_hook(
        lambda module, args, out: out * n)) or (v.pop(0).remove() if len(v) > 1 else None)),
}


class Block(nn.Module):
    """Attention over the sample and a text."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(8, 8), nn.Linear(8, 16)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        k, v = self.kv(text).chunk(2, -1)
        return x + nn.functional.scaled_dot_product_attention(self.q(x), k, v)


_FORWARD = Block.forward


class Model(nn.Module):
    """Reads pieces of state, of the text or of the sample."""

    def __init__(self, kinds: list[tuple[str, bool]]) -> None:
        super().__init__()
        self.text, self.blocks = nn.Linear(8, 8), nn.ModuleList(Block() for _ in range(2))
        self.kinds = kinds
        for i, (name, _) in enumerate(kinds):
            setattr(self, f"piece_{i}", KINDS[name].make())

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        text = self.text(text)
        for i, (name, early) in enumerate(self.kinds):
            piece = getattr(self, f"piece_{i}")
            if early:
                text = torch.tanh(KINDS[name].read(piece, text))
            else:
                x = torch.tanh(KINDS[name].read(piece, x))
        for block in self.blocks:
            x = block(x, text)
        return x + timestep[:, None, None]


_CLEAN = (Derived.method,)


def clean() -> None:
    """Everything outside of models as it was at first."""
    global GAIN
    GAIN, F.act, scaled.__defaults__, Derived.factor = 1.0, (lambda x: x.sin()), (1.0,), 1.0
    FLAGS.update(scale=1.0, inner=[1.0])
    TABLES[0] = torch.ones(8)
    CONTEXT.set(1.0)
    vars(LOCAL).clear()
    os.environ.pop("EDITS", None)
    torch.set_default_dtype(torch.float32)
    torch.backends.cudnn.benchmark = False
    (Derived.method,) = _CLEAN  # type: ignore[method-assign]
    Block.forward = _FORWARD  # type: ignore[method-assign, assignment]
    remembered.cache_clear()


def edit(model: Model, place: int, number: float) -> None:
    """Edit one piece."""
    kind = KINDS[model.kinds[place][0]]
    made = kind.edit(model, getattr(model, f"piece_{place}"), number)
    if made is not None and not isinstance(made, Tensor):
        setattr(model, f"piece_{place}", made)


def runs(model: nn.Module, call: tuple[Tensor, ...]) -> bool:
    """Whether the model itself still does, after its edits."""
    try:
        model(*call)
    except Exception:
        return False
    return True


def run_case(seed: int, names: list[str] | None = None) -> list[str]:
    """One model, some loops with edits between calls: what went wrong, each as a line."""
    rng = random.Random(seed)
    clean()
    torch.manual_seed(seed)
    chosen = names or rng.sample(sorted(KINDS), rng.randint(1, 4))
    kinds = [(name, rng.random() < 0.5) for name in chosen]
    model = Model(kinds).eval().requires_grad_(False)
    parallel = xdit_compile.parallelize(model, "ulysses=1")
    text, found, edits = torch.randn(1, 3, 8), list[str](), list[str]()
    with torch.no_grad():
        for _ in range(rng.randint(2, 3)):
            for step in range(rng.randint(1, 4)):
                call = (torch.randn(1, 5, 8, dtype=torch.float32), torch.tensor([0.9 - 0.2 * step]).float(), text)
                try:
                    got = parallel(*call)
                except Exception:
                    if runs(model, call):
                        raise
                    return found
                expected = model(*call)
                if not torch.allclose(got, expected, rtol=1e-4, atol=1e-5):
                    found.append(f"seed {seed}: {kinds}, after {edits}: off by {(got - expected).abs().max():.1e}")
                if rng.random() < 0.5:
                    place = rng.randrange(len(kinds))
                    edit(model, place, rng.choice((0.5, 1.5, 2.0)))
                    edits.append(kinds[place][0])
            if not edits:
                edit(model, 0, 2.0)
                edits.append(kinds[0][0])
    clean()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    failed = list[str]()
    for seed in tqdm(range(given.seed, given.seed + given.count), unit="case", mininterval=5):
        try:
            found = run_case(seed)
        except Exception:
            found = [f"seed {seed}: {traceback.format_exc(limit=-2)}"]
        failed += found
        for line in found:
            print(line, flush=True)
    print(f"{given.count} cases over {len(KINDS)} kinds of state, seeds from {given.seed}: {len(failed)} failures")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
