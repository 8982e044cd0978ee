"""What calls are given and give back, in containers of any kind: each call against plain PyTorch."""

from __future__ import annotations

import collections
import dataclasses
import enum
import fractions
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import xdit_compile
from xdit_compile.errors import CaptureError, XditError

Call = Callable[..., Any]


class Plain(nn.Module):
    """Attention, and a use of it."""

    def __init__(self, use: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.use = nn.Linear(8, 24), use
        self.register_buffer("gain", torch.ones(8))
        self.held = [1.0]

    def forward(self, x: Tensor, a: Any = None, b: Any = None) -> Any:
        q, k, v = self.qkv(x).chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.use(self, y, a) if b is None else self.use(self, y, a, b)


def noise(i: int) -> Tensor:
    return torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(i))


def outcome(call: Call, model: Plain, steps: Callable[[Call, Plain], Iterator[Any]]) -> list[Any]:
    with torch.no_grad():
        return [flat(x) for x in steps(call, model)]


def flat(x: Any) -> Any:
    """Tensors and numbers with the names of what they are in."""
    if isinstance(x, Tensor):
        assert type(x) in (Tensor, nn.Parameter)
        return x.clone()
    if isinstance(x, (dict, collections.UserDict, collections.ChainMap)):
        return [type(x), *((k, flat(v)) for k, v in x.items()), *map(flat, getattr(x, "__dict__", {}).keys())]
    if isinstance(x, (list, tuple, collections.deque)):
        return [type(x), *map(flat, x)]
    if isinstance(x, np.ndarray):
        return x.copy()
    named = [*getattr(type(x), "__slots__", ()), *getattr(x, "__dict__", ())]
    return [type(x), *((n, flat(getattr(x, n))) for n in named if hasattr(x, n))] if named else x


class Entries(dict[str, Any]):
    __getattr__ = dict.__getitem__


class Items(list[Any]):
    pass


class Pair(tuple[Any, ...]):
    pass


class Slots:
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class Settings:
    scale = 2.0


class Scaling:
    def __init__(self) -> None:
        self.by = 1.0

    def __call__(self, y: Tensor) -> Tensor:
        return y * self.by


class Mode(enum.Enum):
    A = types.SimpleNamespace(scale=1.0)


ONE, OTHER = types.SimpleNamespace(name="a"), types.SimpleNamespace(name="a")


def settings(scale: float) -> Any:
    """Each time another class of the same name."""

    @dataclasses.dataclass
    class Named:
        unused: int = 0

        def factor(self) -> float:
            return scale

    return Named()


def given(*values: Callable[[], Any]) -> Callable[[Call, Plain], Iterator[Any]]:
    """One call with each."""

    def steps(call: Call, model: Plain) -> Iterator[Any]:
        for i, value in enumerate(values):
            yield call(noise(i), value())

    return steps


def changed(make: Callable[[], Any], change: Callable[[Any, int], Any]) -> Callable[[Call, Plain], Iterator[Any]]:
    """Calls with one object, which changes between them."""

    def steps(call: Call, model: Plain) -> Iterator[Any]:
        value = make()
        for i in range(3):
            change(value, i)
            yield call(noise(i), value)

    return steps


def edited(call: Call, model: Plain) -> Iterator[Any]:
    """The caller writes into what it got."""
    for i in range(3):
        first, second = call(noise(i), torch.tensor([1, 0, 1]))
        yield first, second
        second += 5


def appended(call: Call, model: Plain) -> Iterator[Any]:
    for i in range(3):
        y, second = call(noise(i), torch.tensor([1, 0, 1]))
        yield y
        second.append(2.0)


def repeated(make: Callable[[], Any]) -> Callable[[Call, Plain], Iterator[Any]]:
    """Forward writes into the argument."""

    def steps(call: Call, model: Plain) -> Iterator[Any]:
        value = make()
        for i in range(3):
            yield call(noise(i), value)
            yield value

    return steps


def same_list(call: Call, model: Plain) -> Iterator[Any]:
    one = [1.0]
    yield call(noise(0), one, one)
    yield call(noise(1), one, [1.0])


def once(call: Call, model: Plain) -> Iterator[Any]:
    for i in range(2):
        yield call(noise(i), torch.ones(1, 4, 8))


def counted(m: Plain, y: Tensor, a: dict[str, Any]) -> Tensor:
    a["n"] = a.get("n", 0) + 1
    a["y"] = y
    return y * float(a["n"])


def queued(m: Plain, y: Tensor, a: collections.deque[Tensor]) -> Tensor:
    a.append(y)
    return torch.stack(list(a)).sum(0)


def stored(m: Plain, y: Tensor, a: Slots) -> Tensor:
    a.value = y + a.value
    return y


def doubled(m: Plain, y: Tensor, a: Tensor) -> Tensor:
    a.mul_(2)
    return y + a


def older(m: Plain, y: Tensor, a: list[Tensor]) -> tuple[Tensor, Tensor]:
    before = a[0].clone()
    a[0].mul_(2)
    return y, before


def emptied(m: Plain, y: Tensor, a: Any) -> Tensor:
    """Takes the value out, if there is one."""
    if hasattr(a, "value"):
        y = y * a.value
        del a.value
    return y


def swapped(m: Plain, y: Tensor, a: list[Tensor]) -> Tensor:
    before = a[0].clone()
    a[0].copy_(a[1])
    a[1].copy_(before)
    return y


def is_one(m: Plain, y: Tensor, a: Any) -> Tensor:
    return y * (2.0 if a is ONE else 3.0 if a is OTHER else 5.0)


RIGHT: dict[str, tuple[Callable[..., Any], Callable[[Call, Plain], Iterator[Any]]]] = {
    # arguments
    "dict subclass": (lambda m, y, a: y * a.k, changed(Entries, lambda a, i: a.update(k=noise(i + 9)))),
    "list subclass": (lambda m, y, a: y * a[0], changed(Items, lambda a, i: a.insert(0, noise(i + 9)))),
    "slots": (lambda m, y, a: y * a.value, changed(lambda: Slots(0), lambda a, i: setattr(a, "value", noise(i + 9)))),
    "namespace": (lambda m, y, a: y * a.k, given(*(lambda: types.SimpleNamespace(k=noise(9)),) * 2)),
    "set": (lambda m, y, a: y * float(len(a)), changed(set, lambda a, i: a.add(i))),
    "set of tensors": (lambda m, y, a: y * next(iter(a)), given(lambda: {noise(7)}, lambda: {noise(8)})),
    "array": (lambda m, y, a: y * float(a[0]), changed(lambda: np.zeros(2, np.float32), lambda a, i: a.__iadd__(1))),
    "callable": (lambda m, y, a: a(y), changed(Scaling, lambda a, i: setattr(a, "by", 1.0 + i))),
    "functions": (lambda m, y, a: a(y), given(*(functools.partial(lambda k: lambda y: y * k, k) for k in (2., 3.)))),
    "partials": (lambda m, y, a: a(y), given(*(functools.partial(functools.partial, torch.mul, other=k)
                                                for k in (2., 3.)))),
    "module": (lambda m, y, a: a(y), changed(nn.LeakyReLU, lambda a, i: setattr(a, "negative_slope", 0.3 * i))),
    "fractions": (lambda m, y, a: y * float(a), given(*(functools.partial(fractions.Fraction, k, 3) for k in (1, 2)))),
    "zeros": (lambda m, y, a: torch.copysign(y, torch.full((), a[0])), given(lambda: (0.0,), lambda: (-0.0,))),
    "class attribute": (lambda m, y, a: y * a.scale,
                        changed(Settings, lambda a, i: setattr(Settings, "scale", 2.0 + i))),
    "same names": (lambda m, y, a: y * a.factor(), given(lambda: settings(2.0), lambda: settings(3.0))),
    "member": (lambda m, y, a: y * a.value.scale,
               changed(lambda: Mode.A, lambda a, i: setattr(a.value, "scale", 1.0 + i))),
    "sentinels": (is_one, given(lambda: ONE, lambda: OTHER, lambda: types.SimpleNamespace(name="a"))),
    "same list": (lambda m, y, a, b: y * (2.0 if a is b else 3.0), same_list),
    "dict filled": (counted, repeated(dict)),
    "dict subclass filled": (counted, repeated(Entries)),
    "deque filled": (queued, repeated(lambda: collections.deque(maxlen=2))),
    "slots filled": (stored, repeated(lambda: Slots(0.0))),
    "slots emptied": (emptied, repeated(lambda: Slots(2.0))),
    "a namespace emptied": (emptied, repeated(lambda: types.SimpleNamespace(value=2.0))),
    "numbers read": (lambda m, y, a: y * float(m.gain[:3].numpy().sum()) + float(a[:2].numpy().sum()),
                       given(*(lambda: torch.tensor([1., float("nan"), 3.]).nan_to_num(2.),) * 2)),
    "older value": (older, repeated(lambda: [torch.ones(2)])),
    "swapped": (swapped, repeated(lambda: [torch.ones(2), torch.zeros(2)])),
    # results
    "in a dict subclass": (lambda m, y, a: Entries(y=y, n=1), once),
    "in a list subclass": (lambda m, y, a: Items([y]), once),
    "in a tuple subclass": (lambda m, y, a: Pair((y, 1)), once),
    "in slots": (lambda m, y, a: Slots(y), once),
    "in a namespace": (lambda m, y, a: types.SimpleNamespace(y=y), once),
    "in a user's dict": (lambda m, y, a: collections.UserDict(y=y), once),
    "in a chain": (lambda m, y, a: collections.ChainMap({"y": y}), once),
    "positions": (lambda m, y, a: (y, a.nonzero()), edited),
    "numbers": (lambda m, y, a: (y * torch.tensor([1., 2.] * 4), torch.tensor([1., 2.])), edited),
    "array of numbers": (lambda m, y, a: (y * float(a.numpy()[0]), a.numpy()), edited),
    "copy of an argument": (lambda m, y, a: (y * a.sum(), a.clone()), edited),
    "copy of a buffer": (lambda m, y, a: (y * m.gain, m.gain.clone()), edited),
    "copy of a result": (lambda m, y, a: (y, y.clone()), edited),
    "the buffer itself": (lambda m, y, a: (y * m.gain, m.gain), edited),
    "the model's list": (lambda m, y, a: (y * float(len(m.held)), m.held), appended),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right(name: str) -> None:
    use, steps = RIGHT[name]
    model, twin = Plain(use).eval(), Plain(use).eval()
    expected, found = outcome(model, model, steps), outcome(xdit_compile.parallelize(twin, "ulysses=1"), twin, steps)
    torch.testing.assert_close(_numbers(found), _numbers(expected), rtol=1e-4, atol=1e-5)
    assert _others(found) == _others(expected)


def _numbers(x: Any) -> list[Any]:
    if isinstance(x, (list, tuple)):
        return [n for part in x for n in _numbers(part)]
    return [torch.as_tensor(x)] if isinstance(x, (Tensor, np.ndarray)) else []


def _others(x: Any) -> Any:
    if isinstance(x, (list, tuple)):
        return [_others(part) for part in x]
    return "tensor" if isinstance(x, (Tensor, np.ndarray)) else x


def with_attribute(m: Plain, y: Tensor, a: Any) -> Tensor:
    y.gain = 3.0  # type: ignore[attr-defined]
    return y


def assigned(m: Plain, y: Tensor, a: Tensor) -> Tensor:
    a.data = a.data * 2
    return y + a


def itself() -> Any:
    made = types.SimpleNamespace()
    made.me = made
    return made


REFUSED: dict[str, tuple[str, Callable[..., Any]]] = {
    "set": ("builtins.set", lambda m, y, a: {y}),
    "function": ("builtins.function", lambda m, y, a: lambda: y),
    "partial": ("functools.partial", lambda m, y, a: functools.partial(torch.mul, y)),
    "generator": ("builtins.generator", lambda m, y, a: (p for p in (y,))),
    "map": ("builtins.map", lambda m, y, a: map(torch.neg, [y])),
    "view": ("mappingproxy", lambda m, y, a: types.MappingProxyType({"y": y})),
    "attribute": ("the attribute gain", with_attribute),
    "gradients": ("requires gradients", lambda m, y, a: y.detach().requires_grad_()),
    "memory": ("other memory", assigned),
    "size": ("resizes", lambda m, y, a: a.resize_(3)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    says, use = REFUSED[name]
    parallel = xdit_compile.parallelize(Plain(use).eval(), "ulysses=1")
    with torch.no_grad(), pytest.raises(CaptureError, match=says):
        parallel(noise(0), torch.ones(1, 4, 8))


def test_what_holds_itself_is_refused() -> None:
    parallel = xdit_compile.parallelize(Plain(lambda m, y, a: y).eval(), "ulysses=1")
    with torch.no_grad(), pytest.raises(XditError, match="holds itself"):
        parallel(noise(0), itself())


@pytest.mark.parametrize("shared", ["view", "overlap", "data", "buffer", "the buffer", "parameter"])
def test_writes_into_shared_memory_are_refused(shared: str) -> None:
    model = Plain(lambda m, y, a, b: doubled(m, y, a) + b.sum()).eval()
    parallel, rows = xdit_compile.parallelize(model, "ulysses=1"), torch.ones(5, 8)
    a, b = {"view": (rows[:4], rows[:4]), "overlap": (rows[:4], rows[1:]), "data": (rows[1:], rows[1:].data),
            "buffer": (model.gain.data, rows), "the buffer": (model.gain, rows),
            "parameter": (model.qkv.weight.data[:1, :8], rows)}[shared]
    with torch.no_grad():
        parallel(noise(0), torch.ones_like(a), torch.ones_like(b))
        before = a.clone()
        with pytest.raises(XditError, match=r"memory|writes into"):
            parallel(noise(0), a, b)
    assert torch.equal(a, before)


def test_parts_of_one_memory_that_do_not_overlap() -> None:
    model = Plain(lambda m, y, a, b: doubled(m, y, a) + b.sum()).eval()
    rows, same = torch.ones(4, 8), torch.ones(4, 8)
    with torch.no_grad():
        found = xdit_compile.parallelize(model, "ulysses=1")(noise(0), rows[:1], rows[1:])
        torch.testing.assert_close(found, model(noise(0), same[:1], same[1:]))
    assert torch.equal(rows, same)
