"""State that forward writes is refused by its name; tables that it makes once are tables, and never stay fake."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import xdit_compile
from xdit_compile import CaptureError

COUNT, TABLES, LAST, BY_TYPE = 0, {}, [None], {}  # type: ignore[var-annotated]


class Inner(nn.Module):
    """A block that does something more than its layer."""

    def __init__(self, act: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.act, self.layer, self.cache, self.last, self.held = act, nn.Linear(4, 4), {}, None, Plain()
        self.register_buffer("table", torch.zeros(8, 4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self, self.layer(x))


class Plain:
    """No module."""

    count = 0

    def __init__(self) -> None:
        self.rope, self.numbers, self.steps = Table(), np.zeros(2), itertools.count(1)


class Table(nn.Module):
    """A module that only a plain object leads to, with a table by length."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[int, Tensor] = {}

    def forward(self, n: int) -> Tensor:
        if n not in self.cache:
            self.cache[n] = torch.linspace(0, 1, n)[:, None]
        return self.cache[n]


class Outer(nn.Module):
    """Two of these blocks."""

    def __init__(self, act: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Inner(act) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def made(act: Callable[[Any, Tensor], Tensor]) -> Outer:
    torch.manual_seed(0)
    return Outer(act).eval().requires_grad_(False)


X = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))


# What goes from call to call


def counter(m: Any, x: Tensor) -> Tensor:
    m.count = getattr(m, "count", 0) + 1
    return x * m.count


def counter_of_an_object(m: Any, x: Tensor) -> Tensor:
    m.held.count += 1
    return x * m.held.count


def counter_of_the_class(m: Any, x: Tensor) -> Tensor:
    Plain.count += 1
    return x * Plain.count


def counter_of_the_module(m: Any, x: Tensor) -> Tensor:
    global COUNT
    COUNT += 1
    return x * COUNT


def counter_in_numpy(m: Any, x: Tensor) -> Tensor:
    m.held.numbers[0] += 1
    return x * float(m.held.numbers[0])


def residual(m: Any, x: Tensor) -> Tensor:
    out = x if m.last is None else x + m.last
    m.last = x
    return out


def residual_that_is_returned(m: Any, x: Tensor) -> Tensor:
    out, LAST[0] = LAST[0], x
    return x if out is None else out


def first_call_kept(m: Any, x: Tensor) -> Tensor:
    if "first" not in m.cache:
        m.cache["first"] = x
    return x + m.cache["first"]


def history(m: Any, x: Tensor) -> Tensor:
    m.cache.setdefault("all", []).append(x)
    return x * len(m.cache["all"])


def first_call_otherwise(m: Any, x: Tensor) -> Tensor:
    first, m.begun = not getattr(m, "begun", False), True
    return x * 2 if first else x.sin()


def buffer_in_place(m: Any, x: Tensor) -> Tensor:
    m.table[:6] = m.table[:6] + x[0]
    return x + m.table[:6]


def buffer_filled_from_the_call(m: Any, x: Tensor) -> Tensor:
    if m.last is None:
        m.table[:6], m.last = x[0], 1
    return x + m.table[:6]


def tensor_of_an_object(m: Any, x: Tensor) -> Tensor:
    m.held.rope.cache.setdefault(0, torch.zeros(())).add_(1)
    return x * m.held.rope.cache[0]


def python_random(m: Any, x: Tensor) -> Tensor:
    return x * random.random()


def numpy_random(m: Any, x: Tensor) -> Tensor:
    return x * float(np.random.rand())


def counter_by_type(m: Any, x: Tensor) -> Tensor:
    BY_TYPE[type(x)] = BY_TYPE.get(type(x), 0) + 1
    return x * BY_TYPE[type(x)]


def first_of_its_type(m: Any, x: Tensor) -> Tensor:
    first = type(x) not in BY_TYPE
    BY_TYPE[type(x)] = m.held
    return x * 2 if first else x.sin()


def iterator(m: Any, x: Tensor) -> Tensor:
    return x * next(m.held.steps)


STATE: dict[Callable[..., Tensor], str] = {
    counter: r"blocks\.\d\.count.*test_writes\.py:\d+", counter_of_an_object: r"blocks\.\d\.held\.count",
    counter_of_the_class: r"Plain\.count", counter_of_the_module: "COUNT", counter_in_numpy: r"held\.numbers",
    residual: r"blocks\.\d\.last.*test_writes\.py:\d+", residual_that_is_returned: "LAST",
    first_call_kept: r"cache\['first'\]", history: r"cache\['all'\]", first_call_otherwise: r"begun",
    buffer_in_place: r"blocks\.\d\.table", buffer_filled_from_the_call: r"blocks\.\d\.table",
    tensor_of_an_object: r"cache\[0\]", counter_by_type: "BY_TYPE", first_of_its_type: "BY_TYPE",
    python_random: "random", numpy_random: "random", iterator: r"held\.steps",
}


@pytest.mark.parametrize("act", STATE, ids=lambda act: act.__name__)
def test_state_is_refused_by_name(act: Callable[..., Tensor]) -> None:
    global COUNT
    COUNT, LAST[0], Plain.count = 0, None, 0
    model = made(act)
    if act is tensor_of_an_object:
        model.blocks[0].held.rope.cache[0] = torch.zeros(())
    with pytest.raises(CaptureError, match=STATE[act]):
        xdit_compile.capture(model, (X,))
    assert (COUNT, LAST[0], Plain.count) == (0, None, 0)
    block = model.blocks[0]
    assert block.last is None and "first" not in block.cache and not hasattr(block, "count")
    with torch.no_grad():
        assert type(model(X)) is Tensor


# Tables


@functools.lru_cache
def remembered(n: int) -> Tensor:
    return torch.linspace(0, 1, n)[:, None]


def memo(function: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    found: dict[int, Tensor] = {}

    def call(n: int) -> Tensor:
        if n not in found:
            found[n] = function(n)
        return found[n]

    return call


by_hand = memo(lambda n: torch.linspace(0, 1, n)[:, None])


def of_the_module(n: int) -> Tensor:
    if n not in TABLES:
        TABLES[n] = torch.linspace(0, 1, n)[:, None]
    return TABLES[n]


class Backend:
    """How tensors of one type are multiplied, as libraries for several frameworks have it."""

    def __init__(self) -> None:
        self.library = torch

    def times(self, x: Tensor, n: int) -> Tensor:
        return x * n


def backend_of_its_type(m: Any, x: Tensor) -> Tensor:
    if type(x) not in TABLES:
        TABLES[type(x)] = TABLES.setdefault("torch", Backend())
    return TABLES[type(x)].times(x, 3)


def scratch(m: Any, x: Tensor) -> Tensor:
    m.last, m.length = x.detach(), x.shape[1]
    return x * m.length


def like_the_sample(m: Any, x: Tensor) -> Tensor:
    if m.last is None:
        m.last = torch.arange(4.0).to(x)
    return x * m.last


MADE_ONCE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "lru_cache": lambda m, x: x * remembered(x.shape[1]), "decorator": lambda m, x: x * by_hand(x.shape[1]),
    "global": lambda m, x: x * of_the_module(x.shape[1]),
    "backend of its type": backend_of_its_type,
    "module of a plain object": lambda m, x: x * m.held.rope(x.shape[1]),
    "scratch": scratch, "like the sample": like_the_sample,
}  # fmt: skip


@pytest.mark.filterwarnings("error:.*was called once as it is")
@pytest.mark.parametrize("name", MADE_ONCE)
def test_tables_are_made_and_never_stay_fake(name: str) -> None:
    TABLES.clear()
    model = made(MADE_ONCE[name])
    xdit_compile.explain(model, "ulysses=1", (X,))
    parallel = xdit_compile.parallelize(model, "ulysses=1")
    with torch.no_grad():
        for i in range(3):
            got, expected = parallel(X * i), model(X * i)
            assert type(got) is type(expected) is Tensor
            torch.testing.assert_close(got, expected)


def filled(m: Any, x: Tensor) -> Tensor:
    if m.last is None:
        m.table[: x.shape[1]], m.last = torch.linspace(0, 1, x.shape[1])[:, None], x.shape[1]
    return x * m.table[: x.shape[1]]


def test_a_buffer_that_the_first_call_fills_is_filled_and_said() -> None:
    model, alone = made(filled), made(filled)
    with pytest.warns(UserWarning, match=r"fills blocks\.0\.table.*first call"):
        parallel = xdit_compile.parallelize(model, "ulysses=1")
        with torch.no_grad():
            assert torch.equal(parallel(X), alone(X))
    with torch.no_grad():
        assert torch.equal(parallel(X + 1), alone(X + 1)) and torch.equal(model.blocks[1].table, alone.blocks[1].table)
    with torch.device("meta"):
        empty = made(filled)
    with pytest.raises(CaptureError, match="once as it is"):
        xdit_compile.capture(empty, (X.to("meta"),))
