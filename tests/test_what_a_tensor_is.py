"""What a tensor is, rather than what it holds: models that ask get the answers of one device, or are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import xdit_compile
from xdit_compile.errors import CaptureError

REGISTRY: dict[int, float] = {}


class Asking(nn.Module):
    """Attention, times what is asked of the model and of its input."""

    def __init__(self, ask: Callable[[Any, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.a.weight
        self.weights = [self.a.weight]
        self.register_buffer("table", torch.ones(1, 6, 8))
        self.k, self.ask = 1.0, ask

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = self.a(x)
        y = self.b(scaled_dot_product_attention(y, y, y))
        return self.tied(y * self.k) * (2.0 if self.ask(self, x, t) else 1.0)


def sample(i: int = 0) -> Tensor:
    return torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(i))


def time(i: int = 0) -> Tensor:
    return torch.tensor([0.9 - 0.1 * i])


def turned(i: int) -> Tensor:
    return sample(i).transpose(1, 2).contiguous().transpose(1, 2)


def marked(x: Tensor, value: float) -> Tensor:
    x.gain = value  # type: ignore[attr-defined]
    return x


def swallows(m: Any, x: Tensor, t: Tensor) -> bool:
    try:
        return m.a(x).max().item() > 100
    except Exception:
        return True


def swallows_address(m: Any, x: Tensor, t: Tensor) -> bool:
    try:
        return x.data_ptr() == 0
    except Exception:
        return True


def counts(m: Any, x: Tensor, t: Tensor) -> bool:
    m.a.weight.n = getattr(m.a.weight, "n", 0) + 1
    return bool(m.a.weight.n > 1)


Ask = Callable[[Any, Tensor, Tensor], Any]
Step = Callable[[Any], Any]


def given(*inputs: Callable[[], Tensor]) -> list[Step]:
    """Calls with these samples."""
    return [lambda m, x=x: x() for x in inputs]


def edited(change: Callable[[Any], Any]) -> list[Step]:
    """A call, and one after the model was changed."""
    def second(m: Any) -> Tensor:
        change(m)
        return sample(1)

    return [lambda m: sample(0), second]


TWO = given(sample, lambda: sample(1))
CASES: dict[str, tuple[Ask, list[Step]]] = {
    "a weight is a parameter": (lambda m, x, t: isinstance(m.a.weight, nn.Parameter), TWO),
    "a buffer is none": (lambda m, x, t: isinstance(m.table, nn.Parameter), TWO),
    "an argument is a parameter": (lambda m, x, t: isinstance(x, nn.Parameter),
                                   given(sample, lambda: nn.Parameter(sample(1), requires_grad=False))),
    "weights are tied": (lambda m, x, t: m.a.weight is m.tied.weight, TWO),
    "weights are tied no more": (lambda m, x, t: m.a.weight is m.tied.weight, edited(
        lambda m: setattr(m.tied, "weight", nn.Parameter(m.a.weight.clone())))),
    "a weight in a list": (lambda m, x, t: any(w is m.a.weight for w in m.weights), TWO),
    "an argument is the model's": (lambda m, x, t: x is m.table, [lambda m: sample(), lambda m: m.table]),
    "an argument needs gradients": (lambda m, x, t: x.requires_grad, given(sample, lambda: sample(1).requires_grad_())),
    "a weight needs gradients": (lambda m, x, t: m.a.weight.requires_grad, edited(lambda m: m.requires_grad_(False))),
    "a weight is a leaf": (lambda m, x, t: m.a.weight.is_leaf, TWO),
    "a weight has a gradient": (lambda m, x, t: m.a.weight.grad is None, edited(
        lambda m: setattr(m.a.weight, "grad", torch.ones(8, 8)))),
    "a weight's version": (lambda m, x, t: m.a.weight._version % 2, edited(lambda m: m.a.weight.add_(0.1))),
    "contiguous": (lambda m, x, t: x.is_contiguous(), given(sample, lambda: turned(1), lambda: sample(2))),
    "contiguous, of a view": (lambda m, x, t: x.transpose(1, 2).is_contiguous(), given(sample, lambda: turned(1))),
    "strides": (lambda m, x, t: x.stride(-1) == 0, given(sample, lambda: sample(1)[..., :1].expand(1, 6, 8))),
    "where it begins": (lambda m, x, t: x.storage_offset() > 0, given(
        sample, lambda: torch.cat([sample(1), sample(2)], 1)[:, 6:])),
    "how many bytes": (lambda m, x, t: x.nbytes > 100 and m.a.weight.nbytes > 250, TWO),
    "is a view": (lambda m, x, t: x._is_view(), given(sample, lambda: sample(1)[:])),
    "an attribute of an argument": (lambda m, x, t: getattr(x, "gain", 1.0) > 1, given(
        lambda: marked(sample(), 1.0), lambda: marked(sample(1), 2.0), sample)),
    "an attribute of a weight": (lambda m, x, t: getattr(m.a.weight, "gain", 1.0) > 1, [
        lambda m: marked(m.a.weight, 3.0) is None or sample(), lambda m: marked(m.a.weight, 1.0) is None or sample()]),
    "an attribute of a buffer": (lambda m, x, t: getattr(m.table, "gain", 1.0) > 1,
                                 edited(lambda m: marked(m.table, 3.0))),
    "written down": (lambda m, x, t: "0.9" in str(t) or "0.9" in f"{t}", TWO),
    "exported": (lambda m, x, t: torch.compiler.is_exporting() or torch.compiler.is_compiling(), TWO),
    "libraries": (lambda m, x, t: torch.backends.mkldnn.enabled and torch.backends.cudnn.enabled, TWO),
}
REFUSED: dict[str, tuple[Ask, str]] = {
    "the type of an argument": (lambda m, x, t: type(x) is torch.Tensor, "Ask isinstance instead"),
    "the type of a weight": (lambda m, x, t: type(m.a.weight) in (nn.Parameter, nn.Buffer), "compares the type"),
    "a read that is caught": (swallows, "pass it as a Python number"),
    "an address that is caught": (swallows_address, "cannot be captured as one graph"),
    "a result that is written down": (lambda m, x, t: "0.9" in str(m.a(x)), "pass it as a Python number"),
    "an attribute that is set": (counts, "sets the attribute n of the tensor a.weight"),
    "a registry of identities": (lambda m, x, t: REGISTRY.get(id(m.a.weight)), "holds the id\\(\\) of a tensor"),
}


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def made(ask: Ask = lambda m, x, t: False) -> Asking:
    torch.manual_seed(0)
    return Asking(ask).eval()


def check(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_answers_are_those_of_one_device(name: str) -> None:
    """There and back: an answer may be less than before, or more."""
    ask, steps = CASES[name]
    plain, inside = made(ask), made(ask)
    parallel = xdit_compile.parallelize(inside, "ulysses=1")
    for i, step in enumerate([*steps, *steps[::-1]]):
        check(parallel(step(inside), time(i)), plain(step(plain), time(i)))


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_answer_is_refused(name: str) -> None:
    ask, said = REFUSED[name]
    model = made(ask)
    REGISTRY.clear()
    REGISTRY[id(model.a.weight)] = 1.0
    expected = made().forward(sample(), time())
    with pytest.raises(CaptureError, match=said):
        xdit_compile.parallelize(model, "ulysses=1")(sample(), time())
    model.ask = lambda m, x, t: False
    check(model.forward(sample(), time()), expected)


@pytest.mark.parametrize("ask", [lambda m, x, t: False, lambda m, x, t: x.nbytes * 1000 < 7 + m.table.nbytes,
                                 lambda m, x, t: str(m.a.weight.device) + str(x.dtype) == "",
                                 lambda m, x, t: x.size() == m.table.size() and x.dim() + x.numel() == 0])
def test_what_nobody_asks_makes_no_difference(ask: Ask) -> None:
    """Nor what is answered alike."""
    model = made(ask)
    parallel = xdit_compile.parallelize(model, "ulysses=1")
    for x in (sample(), turned(1), marked(sample(2), 1.0), sample(3).requires_grad_()):
        parallel(x, time())
    found = vars(model)["_xdit_compile_captures"].programs
    assert sum(map(len, found.values())) == 1


def test_a_shallow_copy_has_programs_of_its_own() -> None:
    model = made()
    parallel = xdit_compile.parallelize(model, "ulysses=1")
    parallel(sample(), time())
    other = copy.copy(model)
    other.k = 2.0
    expected = made()
    expected.k = 2.0
    check(xdit_compile.parallelize(other, "ulysses=1")(sample(), time()), expected(sample(), time()))


def test_modes_of_gradients_are_off() -> None:
    """As docs/mechanisms.md says."""
    def ask(m: Any, x: Tensor, t: Tensor) -> bool:
        return torch.is_grad_enabled() or torch.is_inference_mode_enabled()

    expected = made(ask)(sample(), time())
    with torch.enable_grad():
        check(xdit_compile.parallelize(made(ask), "ulysses=1")(sample(), time()), expected)


@pytest.mark.parametrize("rows", [12, 600])
def test_writes_that_nobody_counts_into_what_is_kept(rows: int) -> None:
    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.p = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor, text: Tensor) -> Tensor:
            y = self.a(x)
            return scaled_dot_product_attention(y, y, y) + self.p(text).mean(1, keepdim=True)

    torch.manual_seed(0)
    plain = Kept().eval()
    parallel = xdit_compile.parallelize(copy.deepcopy(plain), "ulysses=1")
    memory = torch.randn(1, rows, 16).numpy()
    text = torch.from_numpy(memory)[:, ::2]
    for i in range(4):
        x = torch.randn(1, 6, 16)
        check(parallel(x, text), plain(x, text))
        if i == 1:
            memory *= 2
