"""Blocks that look alike and are not: each model must compute what it does on its own."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_capture import run
from torch import Tensor, nn
from torch.nn import functional as F

from xdit_compile.frontend.block_fingerprint import fingerprint, telling_apart
from xdit_compile.frontend.capture import capture

HERE = SimpleNamespace(layer=0, features=[], last=None, calls=0)
PLACE: ContextVar[int] = ContextVar("place", default=0)
REGISTRY: dict[int, int] = {}
NUMBER = 0
KEPT = [torch.zeros(2, 4)]


class Block(nn.Module):
    gain = 1.0

    def __init__(self, i: int, use: Callable[[Any, Tensor], Tensor], hold: Callable[[Any, int], None]) -> None:
        super().__init__()
        self.first, self.second, self.use, self.scale, self.held = nn.Linear(4, 4), nn.Linear(4, 4), use, 1.0, None
        hold(self, i)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.use(self, self.second(self.first(x).tanh()))


class Stack(nn.Module):
    def __init__(self, use: Callable[[Any, Tensor], Tensor], hold: Callable[[Any, int], None],
                 around: Callable[[Any, int], Any] | None, after: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(i, use, hold) for i in range(3))
        self.around, self.after = around, after

    def forward(self, x: Tensor) -> Tensor:
        HERE.features, HERE.last, HERE.layer, HERE.calls = [], None, 0, 0
        for i, block in enumerate(self.blocks):
            if self.around is None:
                x = block(x)
            else:
                with self.around(block, i):
                    x = block(x)
        x = self.after(self, x)
        HERE.features, HERE.last, HERE.layer, HERE.calls = [], None, 0, 0
        return x


@contextmanager
def attribute(block: Any, i: int) -> Iterator[None]:
    block.scale = 1.0 + i
    yield
    block.scale = 1.0


@contextmanager
def the_class(block: Any, i: int) -> Iterator[None]:
    type(block).gain = 1.0 + i
    yield
    type(block).gain = 1.0


@contextmanager
def namespace(block: Any, i: int) -> Iterator[None]:
    HERE.layer = i
    yield
    HERE.layer = 0


@contextmanager
def variable(block: Any, i: int) -> Iterator[None]:
    global NUMBER
    NUMBER = i
    yield
    NUMBER = 0


@contextmanager
def context(block: Any, i: int) -> Iterator[None]:
    token = PLACE.set(i)
    yield
    PLACE.reset(token)


@contextmanager
def environment(block: Any, i: int) -> Iterator[None]:
    os.environ["XDIT_TEST_PLACE"] = str(i)
    yield
    del os.environ["XDIT_TEST_PLACE"]


@contextmanager
def training(block: Any, i: int) -> Iterator[None]:
    block.train(i == 1)
    yield
    block.eval()


@contextmanager
def default_dtype(block: Any, i: int) -> Iterator[None]:
    torch.set_default_dtype(torch.float64 if i == 1 else torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def counts(block: Any, x: Tensor) -> Tensor:
    HERE.layer += 1
    return x * HERE.layer


def keeps(block: Any, x: Tensor) -> Tensor:
    HERE.features.append(x)
    return x


def passes_on(block: Any, x: Tensor) -> Tensor:
    x = x if HERE.last is None else x + HERE.last
    HERE.last = x
    return x


def is_called(block: Any, x: Tensor) -> Tensor:
    HERE.calls += 1
    return x


class List(list):  # type: ignore[type-arg]
    scale = 0


class Slotted:
    __slots__ = ("i",)

    def __init__(self, i: int) -> None:
        self.i = i


def listed(block: Any, i: int) -> None:
    block.held = List([1])
    block.held.scale = i


def registered(block: Any, i: int) -> None:
    REGISTRY[id(block)] = i


def wanting(block: Any, i: int) -> None:
    block.second.weight.requires_grad_(i == 1)


def holding(make: Callable[[int], Any]) -> Callable[[Any, int], None]:
    return lambda block, i: setattr(block, "held", make(i))


def plain(block: Any, x: Tensor) -> Tensor:
    return x


def nothing(block: Any, i: int) -> None:
    pass


def at_the_end(model: Any, x: Tensor) -> Tensor:
    return x


def same(x: Tensor) -> Tensor:
    third = torch.full((4,), 1 / 3)
    return x + (third.double() - 1 / 3).to(x.dtype) * 1e9


class Scale(float):
    """A number of a class of its own."""


@torch.library.custom_op("xdit_tests::scale_in_place", mutates_args=("x",))
def scale_in_place(x: Tensor, by: float) -> None:
    x.mul_(by)


def takes_the_first(block: Any, x: Tensor) -> Tensor:
    """As later blocks mix in the values of the first."""
    values = block.first(x)
    HERE.last = values if HERE.last is None else HERE.last
    return x + HERE.last


def second_is_kept(block: Any, x: Tensor) -> Tensor:
    if vars(block)["held"] == 1:
        HERE.features.append(x)
    return x


def second_keeps(block: Any, x: Tensor) -> Tensor:
    if vars(block)["held"] == 1:
        block.scale = x
    return x


def with_the_kept(model: Any, x: Tensor) -> Tensor:
    x, KEPT[0] = x + KEPT[0], torch.zeros(2, 4)
    return x


def second_replaces(block: Any, x: Tensor) -> Tensor:
    if vars(block)["held"] == 1:
        KEPT[0] = x
    return x


def kept_by_the_second(model: Any, x: Tensor) -> Tensor:
    x, model.blocks[1].scale = x + model.blocks[1].scale, 1.0
    return x


def catches_all(block: Any, x: Tensor) -> Tensor:
    try:
        return x * vars(block)["held"]
    except BaseException:
        return x * 0


def toggles(block: Any, x: Tensor) -> Tensor:
    HERE.calls ^= 1
    return x * (1 + HERE.calls)


def scales(block: Any, x: Tensor) -> Tensor:
    x = x.clone()
    scale_in_place(x, 1.0 + vars(block)["held"])
    return x


def with_factor(block: Any, i: int) -> None:
    block.held = i
    block.register_buffer("factor", torch.tensor(2.0 + i))


def absent_in_the_first(block: Any, i: int) -> None:
    if i == 0:
        block.register_parameter("gate", None)


def gated(block: Any, i: int) -> None:
    block.gate = nn.Parameter(torch.full((4,), float(i)))


ROWS: dict[str, tuple[Any, Any, Any, Any]] = {
    "an attribute set around each": (lambda b, x: x * b.scale, nothing, attribute, at_the_end),
    "a class attribute": (lambda b, x: x * b.gain, nothing, the_class, at_the_end),
    "a namespace": (lambda b, x: x * (1 + HERE.layer), nothing, namespace, at_the_end),
    "a global": (lambda b, x: x * (1 + NUMBER), nothing, variable, at_the_end),
    "a context variable": (lambda b, x: x * (1 + PLACE.get()), nothing, context, at_the_end),
    "the environment": (lambda b, x: x * (1 + int(os.environ.get("XDIT_TEST_PLACE", 9))), nothing, environment,
                        at_the_end),
    "train and eval": (lambda b, x: x * (2 if b.training else 1), nothing, training, at_the_end),
    "the default type": (lambda b, x: same(x), nothing, default_dtype, at_the_end),
    "a counter": (counts, nothing, None, at_the_end),
    "a list of features": (keeps, nothing, None, lambda m, x: x + sum(HERE.features)),
    "one passes on to the next": (passes_on, nothing, None, at_the_end),
    "calls that the model counts": (is_called, nothing, None, lambda m, x: x * HERE.calls),
    "an attribute of a list": (lambda b, x: x * b.held.scale, listed, None, at_the_end),
    "a slot": (lambda b, x: x * b.held.i, holding(Slotted), None, at_the_end),
    "vars": (lambda b, x: x * vars(b)["held"], holding(int), None, at_the_end),
    "a keyword of an operator": (lambda b, x: torch.clamp(x, max=0.1 * vars(b)["held"]), holding(int), None,
                                 at_the_end),
    "by get": (lambda b, x: x * vars(b).get("held", 7), holding(int), None, at_the_end),
    "the length of a deque": (lambda b, x: x * (b.held.maxlen or 9), holding(lambda i: deque([1], i + 1)), None,
                              at_the_end),
    "by identity": (lambda b, x: x * (REGISTRY[id(b)] + 1), registered, None, at_the_end),
    "another layer": (lambda b, x: (b.second if b.held == 1 else b.first)(x), holding(int), None, at_the_end),
    "asks for gradients": (lambda b, x: x * (2 if b.second.weight.requires_grad else 1), wanting, None, at_the_end),
    "the number of parameters": (plain, nothing, None, lambda m, x: x / sum(p.numel() for p in m.parameters())),
    "the length of the state": (plain, nothing, None, lambda m, x: x * len(m.state_dict())),
    "has a weight": (plain, nothing, None,
                     lambda m, x: x * (2 if hasattr(m.blocks[2].first, "weight") else 1)),
    "norms of weights": (plain, nothing, None,
                         lambda m, x: x * sum(b.first.weight.norm() for b in m.blocks)),
    "values of the first": (takes_the_first, nothing, None, at_the_end),
    "the second is kept": (second_is_kept, holding(int), None, lambda m, x: x + HERE.features[0]),
    "the second replaces": (second_replaces, holding(int), None, with_the_kept),
    "the second keeps": (second_keeps, holding(int), None, kept_by_the_second),
    "later ones read a buffer": (lambda b, x: x * (b.factor.item() if b.held else 2.0), with_factor, None, at_the_end),
    "later ones ask for gradients": (lambda b, x: x * (2 if b.held and b.second.weight.requires_grad else 1),
                                     holding(int), None, at_the_end),
    "a number of its own class": (lambda b, x: x * b.held, holding(Scale), None, at_the_end),
    "a number of numpy": (lambda b, x: x * b.held, holding(np.float32), None, at_the_end),
    "catches all": (catches_all, holding(int), None, at_the_end),
    "toggles": (toggles, nothing, None, at_the_end),
    "an operator that returns nothing": (scales, holding(int), None, at_the_end),
    "a parameter that is None": (lambda b, x: x * (2 if hasattr(b, "gate") else 1), absent_in_the_first, None,
                                 at_the_end),
    "a parameter or another": (plain, gated, None, lambda m, x: x * getattr(m.blocks[2], "gate", torch.ones(4))),
    "the last of all parameters": (plain, gated, None, lambda m, x: x * list(m.blocks.parameters())[-1]),
    "set before them all": (lambda b, x: x * (1 + HERE.layer), nothing, lambda b, i: namespace(b, 3), at_the_end),
}


@pytest.mark.parametrize("name", ROWS)
def test_blocks_that_differ_are_not_taken_for_alike(name: str) -> None:
    torch.manual_seed(0)
    model, x = Stack(*ROWS[name]).requires_grad_(False).eval(), torch.randn(2, 4)
    if name.endswith("for gradients"):
        model.blocks[1].second.weight.requires_grad_(True)
    with torch.no_grad():
        program = capture(model, (x,))
        for given in (x, torch.randn(2, 4)):
            torch.testing.assert_close(run(program, model, given), model(given))


def test_numbers_that_make_two_kinds() -> None:
    """What differs in what it does is of another kind; the others stay one."""
    torch.manual_seed(0)
    model, x = Stack(lambda b, x: -x if vars(b)["held"] == 1 else x, holding(int), None, at_the_end), torch.randn(2, 4)
    program = capture(model, (x,))
    assert program.calls() == {"main": 1, "blocks": 2, "blocks_1": 1}
    torch.testing.assert_close(run(program, model, x), model(x))


class Pair(nn.Module):
    """A block with two results."""

    def __init__(self, results: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.inner, self.results = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), results

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.results(self.inner(x))


class Two(nn.Module):
    """Blocks with two results, into the first of which the model writes."""

    def __init__(self, results: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Pair(results) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            first, second = block(x)
            first += 1
            x = second * (2 if first is second else 1)
        return x


@pytest.mark.parametrize("results", [lambda h: (h, h), lambda h: (h, h.view(h.shape)), lambda h: (h[:, :2], h),
                                     lambda h: tuple(h.chunk(2, 1)) and (h[:, 2:], h), lambda h: (h.clone(), h)])
def test_results_that_share_memory(results: Any) -> None:
    torch.manual_seed(0)
    model, x = Two(results).requires_grad_(False).eval(), torch.randn(2, 4)
    with torch.no_grad():
        program = capture(model, (x,))
        torch.testing.assert_close(run(program, model, x), model(x))


ALIKE: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[Any, Tensor], Tensor]]] = {
    "getters that give tensors": (lambda b, x: x.mT.mT.real + x.T.T.data.detach(), at_the_end),
    "keywords": (lambda b, x: torch.clamp(x, min=-3.0, max=2.5), at_the_end),
    "conversions to what it is": (lambda b, x: x.to(x.dtype).float(), at_the_end),
    "conversions around them": (plain, lambda m, x: x.to(x.dtype).float().contiguous() * 2),
    "conversions by keyword": (lambda b, x: x.to(dtype=x.dtype), lambda m, x: x.to(dtype=x.dtype) + 1),
    "conversions and back": (lambda b, x: x.double().float(), lambda m, x: x.half().float()),
    "what is given back": (lambda b, x: torch.dropout(x.type_as(x).resolve_conj(), 0.5, False),
                           lambda m, x: torch.dropout(x.type_as(x).resolve_conj(), 0.5, False).expand_as(x) + 1),
    "shapes": (lambda b, x: x.view(x.shape[0], -1) * x.size(-1), lambda m, x: x.reshape(x.shape) / len(x)),
    "splits": (lambda b, x: torch.cat(x.chunk(2, -1)[::-1], -1), lambda m, x: torch.stack(x.unbind(0))),
    "a dictionary": (lambda b, x: {"a": x, "b": [x]}["b"][0], at_the_end),
    "factories": (lambda b, x: x + torch.arange(4, dtype=x.dtype, device=x.device), lambda m, x: x + torch.ones(4)),
    "in place": (lambda b, x: x.clone().mul_(2).add_(1, alpha=2), lambda m, x: x.clone().add_(1)),
    "numbers and texts": (lambda b, x: torch.einsum("ab,ab->ab", x, x) * 0.5 * 3, at_the_end)}


@pytest.mark.parametrize("name", ALIKE)
def test_what_blocks_ask_alike_stays_one_kind(name: str) -> None:
    torch.manual_seed(0)
    use, after = ALIKE[name]
    model, x = Stack(use, nothing, None, after).requires_grad_(False).eval(), torch.randn(2, 4)
    with torch.no_grad():
        program = capture(model, (x,))
        assert program.calls() == {"main": 1, "blocks": 3}
        torch.testing.assert_close(run(program, model, x), model(x))


class Asks(Two):
    """Asks what the first result of a block is, beside its values."""

    def __init__(self, results: Callable[[Tensor], tuple[Tensor, Tensor]], ask: Callable[[Tensor], Any]) -> None:
        super().__init__(results)
        self.ask = ask

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            first, x = block(x)
            x = x * (2 if self.ask(first) else 1)
        return x


@pytest.mark.parametrize("ask", [lambda t: t._is_view(), lambda t: t._base is None, lambda t: t._version,
                                 lambda t: t.requires_grad, lambda t: t.is_leaf])
@pytest.mark.parametrize("results", [lambda h: (h.view(h.shape), h), lambda h: (h[:, :2], h), lambda h: (h + 1, h),
                                     lambda h: ((h * 2).add_(1), h)])
def test_what_a_result_is(ask: Any, results: Any) -> None:
    torch.manual_seed(0)
    model, x = Asks(results, ask).requires_grad_(False).eval(), torch.randn(2, 4)
    with torch.no_grad():
        program = capture(model, (x,))
        torch.testing.assert_close(run(program, model, x), model(x))


def test_what_is_common_stays_one_kind() -> None:
    """Numbers of numpy, and whether weights are frozen, make no two kinds of what is one."""
    model = Stack(lambda b, x: x / np.sqrt(x.shape[-1]) * np.float32(2), nothing, None, at_the_end).eval()
    model.blocks[1].requires_grad_(False)
    with torch.no_grad():
        assert capture(model, (torch.randn(2, 4),)).calls() == {"main": 1, "blocks": 3}


def test_an_error_of_the_model_is_raised_at_once(caplog: pytest.LogCaptureFixture) -> None:
    """It is not traced once more without looking for blocks, which would take as long again."""
    def fails(model: Any, x: Tensor) -> Tensor:
        raise ValueError("mine")

    caplog.set_level(logging.INFO, "xdit_compile")
    with torch.no_grad(), pytest.raises(ValueError, match="mine"):
        capture(Stack(plain, nothing, None, fails).eval(), (torch.randn(2, 4),))
    assert "again" not in caplog.text
    with torch.no_grad():
        capture(Stack(*ROWS["a counter"]).eval(), (torch.randn(2, 4),))
    assert "again" in caplog.text


@pytest.mark.parametrize("inside", range(3))
@pytest.mark.parametrize("around", range(6))
def test_what_was_made_inside_is_taken_for_nothing_around(inside: int, around: int) -> None:
    """The model takes what the first block has left, if it has run, or else one of its own."""
    def leaves(block: Any, x: Tensor) -> Tensor:
        for i in range(3):
            x = x + 0.5 * i
            if vars(block)["held"] == 0:
                HERE.features.append(x)
        return x

    def takes(model: Any, x: Tensor) -> Tensor:
        made = [x * (2.0 + i) for i in range(6)]
        return x + (HERE.features[inside] if HERE.features else made[around])

    torch.manual_seed(0)
    model, x = Stack(leaves, holding(int), None, takes).requires_grad_(False).eval(), torch.randn(2, 4)
    with torch.no_grad():
        torch.testing.assert_close(run(capture(model, (x,)), model, x), model(x))


def test_what_tells_neighbours_apart() -> None:
    """Constants that they hold, each by itself; not so what else they hold."""
    def held(block: Any, i: int) -> None:
        block.index, block.held = i, "the same"

    blocks = Stack(same, held, None, at_the_end).blocks
    found = telling_apart(nn.Sequential(blocks))
    assert found == {(Block, "index")}
    assert len({fingerprint(b) for b in blocks}) == 3 and len({fingerprint(b, found) for b in blocks}) == 1
    blocks[1].held = ["another"]
    assert len({fingerprint(b, found) for b in blocks}) == 2


def mixes(block: Any, x: Tensor) -> Tensor:
    """Hands PyTorch a function, which reads a global."""
    far = F.triplet_margin_with_distance_loss(x, x.flip(0), x.flip(1), margin=9.0, reduction="none",
                                              distance_function=lambda a, b: (a - b).abs().sum(-1) * NUMBER)
    return x * far[:, None]


class Far:
    """A function of distance with nothing that can be looked into."""

    __slots__ = ("gain",)

    def __init__(self, gain: float) -> None:
        self.gain = gain

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs().sum(-1) * self.gain


FAR = [Far(1.0), Far(2.0), Far(3.0)]


def mixes_by(block: Any, x: Tensor) -> Tensor:
    """Hands PyTorch an object."""
    far = F.triplet_margin_with_distance_loss(x, x.flip(0), x.flip(1), margin=9.0, reduction="none",
                                              distance_function=FAR[max(NUMBER - 1, 0)])
    return x * far[:, None]


def takes_a_part(block: Any, x: Tensor) -> Tensor:
    """Attributes of a tensor that are tensors, which another block takes another of."""
    both = torch.complex(x, 2 * x)
    return both.imag if NUMBER == 2 else both.real


@contextmanager
def numbered(block: Any, i: int) -> Iterator[None]:
    global NUMBER
    NUMBER = 1 + i
    yield
    NUMBER = 0


@pytest.mark.parametrize("around", [None, numbered])
@pytest.mark.parametrize("use", [mixes, mixes_by, takes_a_part])
def test_what_blocks_hand_to_pytorch_and_ask_it_for(use: Any, around: Any) -> None:
    torch.manual_seed(0)
    model, x = Stack(use, nothing, around, at_the_end).requires_grad_(False).eval(), torch.randn(2, 4)
    with torch.no_grad():
        program = capture(model, (x,))
        assert (program.calls() == {"main": 1, "blocks": 3}) is (around is None)
        torch.testing.assert_close(run(program, model, x), model(x))


class Given(nn.Module):
    """Blocks that are given numbers in a tensor, which the model makes for each of them."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor], numbers: tuple[int, ...]) -> None:
        super().__init__()
        self.numbers = numbers
        self.blocks = nn.ModuleList(GivenOne(use) for _ in numbers)

    def forward(self, x: Tensor) -> Tensor:
        for number, block in zip(self.numbers, self.blocks, strict=True):
            x = block(x, torch.tensor([1, number]))
        return x


class GivenOne(nn.Module):
    def __init__(self, use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.use = nn.Linear(4, 4), nn.Linear(4, 4), use

    def forward(self, x: Tensor, numbers: Tensor) -> Tensor:
        return x + self.use(self.second(self.first(x).tanh()), numbers)


@pytest.mark.parametrize("numbers", [(2, 2, 2), (2, 3, 2), (2, 3, 1)])
@pytest.mark.parametrize(("use", "reads"), [(lambda x, n: x * n.max(), False),
                                            (lambda x, n: x.roll(int(n.max()), -1), True)])
def test_values_that_blocks_do_not_read_make_no_two_kinds(use: Any, reads: bool, numbers: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = Given(use, numbers).requires_grad_(False).eval(), torch.randn(2, 4)
    with torch.no_grad():
        program = capture(model, (x,))
        assert reads or program.calls() == {"main": 1, "blocks": 3}
        torch.testing.assert_close(run(program, model, x), model(x))
