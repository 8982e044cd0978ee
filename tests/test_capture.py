"""Capture: values that are read, arguments that are changed, functions given to attention, state that stays."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils._pytree import _dict_flatten, register_pytree_node

from xdit_compile.errors import CaptureError
from xdit_compile.frontend.capture import capture
from xdit_compile.ir.program import Program, module_of, source_of
from xdit_compile.ir.pytree import flatten


class Function(nn.Module):
    """A module that is one function of its arguments."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.arange(1.0, 5.0))

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


def run(program: Program, model: nn.Module, *args: Any) -> Any:
    """The captured graph on these arguments."""
    tensors, _ = flatten((args, {}))
    state = dict([*model.named_parameters(), *model.named_buffers()])
    given = iter(tensors)
    inputs = [next(given) if i.kind == "argument" else (program.constants if i.kind == "constant" else state)[i.name]
              for i in program.inputs]
    with torch.no_grad():
        return program.output_spec.finish((args, {}), tensors, program.main(*inputs))


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([True, False, True])

READS: dict[str, tuple[Any, Tensor, Tensor, Tensor]] = {
    # function of (model, x, small), a value, one that reads alike, one that does not
    "item": (lambda m, x, n: x[: int(n.sum().item())], MASK, MASK.roll(1), ~MASK),
    "boolean index": (lambda m, x, n: x[n] * m.weight, MASK, MASK.clone(), ~MASK),
    "slice": (lambda m, x, n: x[: n.long().sum()] + 1, MASK, MASK.flip(0), ~MASK),
    "write": (lambda m, x, n: _filled(x, n), MASK, MASK.flip(0), ~MASK),
    "branch": (lambda m, x, n: x + 1 if torch.all(n == 0) else x - 1, torch.zeros(9), torch.zeros(9), torch.ones(9)),
    "repeat": (lambda m, x, n: torch.repeat_interleave(x, n, dim=0), torch.tensor([1, 2, 0]), torch.tensor([1, 2, 0]),
               torch.tensor([2, 2, 0])),
    "list": (lambda m, x, n: sum((x[i] for i in n.tolist()), start=m.weight), torch.tensor([0, 2]),
             torch.tensor([0, 2]), torch.tensor([1, 2])),
    "select": (lambda m, x, n: torch.masked_select(x, n[:, None].expand(3, 4)), MASK, MASK.clone(), ~MASK),
    "shape": (lambda m, x, n: x.reshape(n[0], n[1]), torch.tensor([3, 4]), torch.tensor([3, 4]), torch.tensor([4, 3])),
    "unpack": (lambda m, x, n: x.reshape(*list(n), 1), torch.tensor([3, 4]), torch.tensor([3, 4]),
               torch.tensor([2, 6])),
    "factory": (lambda m, x, n: x.sum() + torch.arange(n.max()), torch.tensor([1, 3]), torch.tensor([3, 2]),
                torch.tensor([1, 4])),
}  # fmt: skip


def _filled(x: Tensor, mask: Tensor) -> Tensor:
    """Into a table made here, up to a place that is read; and read again after the write."""
    table = torch.zeros(len(mask), dtype=torch.bool)
    row = table[:]
    row[: mask.sum()] = True
    return x[table] * 2


@pytest.mark.parametrize("name", READS)
def test_values_that_are_read_are_guarded(name: str) -> None:
    function, value, alike, other = READS[name]
    model = Function(function)
    program = capture(model, (X, value))
    with torch.no_grad():
        assert torch.equal(run(program, model, X, value), model(X, value))
    assert program.guards.hold([X, value]) and not program.guards.hold([X, other])
    assert program.guards.hold([X + 1, alike]), "other values of what is not read"
    with torch.no_grad():
        assert torch.equal(run(program, model, X + 1, alike), model(X + 1, alike))


def test_what_a_program_is_made_of_does_not_change() -> None:
    """All values in it are immutable."""
    found: dict[int, Any] = {}

    def walk(value: Any) -> None:
        if id(value) in found or isinstance(value, (type, Tensor, torch.fx.GraphModule)):
            return
        found[id(value)] = value
        if is_dataclass(value):
            with pytest.raises(FrozenInstanceError):
                setattr(value, fields(value)[0].name, None)
            for f in fields(value):
                walk(getattr(value, f.name))
        elif isinstance(value, dict):
            walk([*value, *value.values()])
        elif isinstance(value, (list, tuple, set, frozenset)):
            for v in value:
                walk(v)

    walk(capture(Function(READS["boolean index"][0]), (X, MASK)))
    assert len({type(v) for v in found.values() if is_dataclass(v)}) > 6


def test_what_is_not_read_is_not_guarded() -> None:
    model = Function(lambda m, x, n: torch.where(n[:, None], x, 0) + torch.arange(4) * m.weight)
    assert capture(model, (X, MASK)).guards.steps == ()


def test_a_read_of_what_weights_make_is_refused_with_its_line() -> None:
    model = Function(lambda m, x: x[: int((m.weight.sum() > 3).item())])
    with pytest.raises(CaptureError, match=r"test_capture\.py:\d+"):
        capture(model, (X,))


class Cache:
    """Keys by name, and how often they were stored."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}
        self.order: list[Tensor] = []
        self.count = 0

    def store(self, name: str, x: Tensor) -> None:
        self.kept[name] = x
        self.order.append(x + 1)
        self.count += 1


def test_a_cache_among_the_arguments_is_filled() -> None:
    def forward(model: nn.Module, x: Tensor, cache: Cache) -> Tensor:
        if "k" in cache.kept:
            return x + cache.kept["k"]
        cache.store("k", x * model.weight)
        return x

    model, cache = Function(forward), Cache()
    program = capture(model, (X, cache))
    assert (cache.kept, cache.order, cache.count) == ({}, [], 0), "capture stores nothing"
    order = cache.order
    assert torch.equal(run(program, model, X, cache), X)
    assert torch.equal(cache.kept["k"], X * model.weight) and torch.equal(order[0], X * model.weight + 1)
    assert cache.order is order and cache.count == 1
    again = capture(model, (X, cache))
    assert torch.equal(run(again, model, X, cache), X + X * model.weight) and cache.count == 1


def test_arguments_that_forward_writes_into_are_written() -> None:
    def forward(model: nn.Module, x: Tensor, table: Tensor) -> Tensor:
        table[1:] = x[1:] * model.weight
        return table.sum()

    model = Function(forward)
    program = capture(model, (X, torch.zeros(3, 4)))
    mine, theirs = torch.zeros(3, 4), torch.zeros(3, 4)
    with torch.no_grad():
        assert torch.equal(run(program, model, X, mine), model(X, theirs))
    assert torch.equal(mine, theirs) and mine.any()


def test_tables_made_at_the_first_call_do_not_stay_fake() -> None:
    class Lazy:
        table = None

        def __call__(self, x: Tensor) -> Tensor:
            if self.table is None:
                self.table = [torch.arange(4.0)]
            return x * self.table[0]

    model = Function(lambda m, x: m.lazy(x) + m.weight)
    model.lazy = Lazy()
    program = capture(model, (X,))
    assert torch.equal(model.lazy.table[0], torch.arange(4.0)), "filled as a call would have done"
    with torch.no_grad():
        assert torch.equal(model(X), run(program, model, X))
        assert torch.equal(run(capture(model, (X,)), model, X), model(X))


def test_module_names_that_are_no_identifiers() -> None:
    model = Function(lambda m, x: m.parts["2-1"](x) + m.parts["2_1"](x))
    model.parts = nn.ModuleDict({"2-1": nn.Linear(4, 4), "2_1": nn.Linear(4, 4)})
    with torch.no_grad():
        torch.testing.assert_close(run(capture(model, (X,)), model, X), model(X))


def _within(width: int) -> Any:
    return lambda b, h, q, k: q // width >= k // width


FLEX = {
    "closed over": (None, _within(3)),
    "plain": (None, None),
    "causal": (None, lambda b, h, q, k: q >= k),
    "per batch": (None, lambda b, h, q, k: (k < 5 - b) & (q - k < 3 + h)),
    "modified": (lambda score, b, h, q, k: score - 0.1 * (q - k).abs() * (h + 1), None),
    "both": (lambda score, b, h, q, k: torch.tanh(score), lambda b, h, q, k: (q - k).abs() < 4),
}


@pytest.mark.parametrize("name", FLEX)
def test_flex_attention_is_what_it_means(name: str) -> None:
    score_mod, mask_mod = FLEX[name]
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 4, 7, 16, generator=generator)
    k, v = torch.randn(2, 2, 2, 7, 16, generator=generator)
    blocks = mask_mod and create_block_mask(mask_mod, 2, 4, 7, 7, device="cpu")

    def forward(model: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, score_mod=score_mod, block_mask=blocks, enable_gqa=True)  # type: ignore[return-value]

    model = Function(forward)
    program = capture(model, (q, k, v))
    # Against the definition, in float64: softmax over what may be seen.
    scores = q.double() @ k.double().repeat_interleave(2, 1).transpose(-1, -2) / 4
    b, h, m, n = torch.meshgrid(*map(torch.arange, (2, 4, 7, 7)), indexing="ij")
    scores = score_mod(scores, b, h, m, n) if score_mod else scores
    scores = scores.masked_fill(~mask_mod(b, h, m, n), -torch.inf) if mask_mod else scores
    # A row that may see nothing gives zeros.
    expected = scores.softmax(-1).nan_to_num() @ v.double().repeat_interleave(2, 1)
    torch.testing.assert_close(run(program, model, q, k, v).double(), expected, rtol=1e-5, atol=1e-5)
    targets = {str(n.target) for n in program.main.graph.nodes}
    assert ("aten.scaled_dot_product_attention.default" in targets) == (score_mod is None)


def _of_pairs(table: Tensor) -> Any:
    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score + table[q, k]

    return score_mod


def _frames(table: Tensor) -> Any:
    frame = torch.cat([torch.zeros(3), torch.ones(4)]) + table[0, 0] * 0

    def allowed(q: Tensor, k: Tensor) -> Tensor:
        return frame[q] >= frame[k]

    return lambda b, h, q, k: allowed(q, k)


CLOSED_OVER: dict[str, Callable[[Tensor], tuple[Any, Any]]] = {
    "an argument": lambda table: (_of_pairs(table), None),
    "made in forward, through another function": lambda table: (None, _frames(table)),
    "through a partial": lambda table: (None, partial(lambda near, b, h, q, k: near(b, h, q, k), _frames(table))),
    "both, one of them twice": lambda table: (
        _of_pairs(table), lambda b, h, q, k: (table[q, k] > -1) & (table[k, q] > -1) | (q == k)),
}
"""Score and mask functions, and what they close over, of a tensor that the model is called with."""


@pytest.mark.parametrize("name", CLOSED_OVER)
def test_flex_attention_closes_over_tensors(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, 2, 4, 7, 16, generator=generator)

    def forward(model: nn.Module, q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        score_mod, mask_mod = CLOSED_OVER[name](table)
        blocks = mask_mod and create_block_mask(mask_mod, None, None, 7, 7, device="cpu", _compile=False)
        return flex_attention(q, k, v, score_mod=score_mod, block_mask=blocks)  # type: ignore[return-value]

    model = Function(forward)
    program = capture(model, (q, k, v, torch.randn(7, 7, generator=generator)))
    for _ in range(2):
        table = torch.randn(7, 7, generator=generator)
        score_mod, mask_mod = CLOSED_OVER[name](table)
        scores = q.double() @ k.double().transpose(-1, -2) / 4
        b, h, m, n = torch.meshgrid(*map(torch.arange, (2, 4, 7, 7)), indexing="ij")
        scores = score_mod(scores, b, h, m, n) if score_mod else scores
        scores = scores.masked_fill(~mask_mod(b, h, m, n), -torch.inf) if mask_mod else scores
        torch.testing.assert_close(run(program, model, q, k, v, table).double(), scores.softmax(-1) @ v.double(),
                                   rtol=1e-5, atol=1e-5)


class Experts(nn.Module):
    """Counts in numpy how many rows each expert gets, as no graph can."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 2)
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, 4)
        chosen = self.gate(rows).argmax(-1)
        out = torch.zeros_like(rows)
        for i, n in enumerate(chosen.bincount(minlength=2).cpu().numpy()):
            if n:
                out[chosen == i] = self.experts[i](rows[chosen == i])
        return out.view(x.shape)


class Mixture(nn.Module):
    """Two layers of experts, of one class with other weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Experts(), Experts()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x.transpose(0, 1).contiguous()).transpose(0, 1)
        return x


def test_modules_that_no_graph_can_hold_are_left_in_python() -> None:
    torch.manual_seed(0)
    model = Mixture()
    x = torch.randn(3, 5, 4)
    program = capture(model, (x,))
    assert Experts.forward.__qualname__ == "Experts.forward"
    with torch.no_grad():
        for values in (x, torch.randn(3, 5, 4)):
            torch.testing.assert_close(run(program, model, values), model(values))
        model.layers[1].experts[0].weight.mul_(2)
        torch.testing.assert_close(run(program, model, x), model(x))
    used = {n.target for _, m in program.functions() for n in m.graph.nodes if n.op == "call_function"}
    assert torch.ops.xdit_compile.python.default in used


def test_what_cannot_be_run_cannot_be_left_in_python() -> None:
    with torch.device("meta"):
        model = Mixture()
    with pytest.raises(CaptureError, match="meta"):
        capture(model, (torch.randn(3, 5, 4, device="meta"),))


class Pair(nn.Module):
    """A layer over two tensors that asks whether they are one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.first(a) * 2 if a is b else self.first(a) + self.second(b)


class Pairs(nn.Module):
    """Alike layers, of which some get one tensor twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Pair() for _ in range(4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x, x if i % 2 else y)
        return x


@pytest.mark.parametrize("same", [False, True])
def test_one_tensor_given_twice_is_not_two_tensors(same: bool) -> None:
    torch.manual_seed(0)
    model, x, y = Pairs(), torch.randn(3, 4), torch.randn(3, 4)
    program = capture(model, (x, x if same else y))
    kinds = [name for name, _ in program.functions() if name != "main"]
    assert len(kinds) == 2
    with torch.no_grad():
        for values in (x, torch.randn(3, 4)):
            call = (values, values if same else y)
            torch.testing.assert_close(run(program, model, *call), model(*call))


class Stateful(nn.Module):
    """A buffer and what forward does to it."""

    def __init__(self, act: Any) -> None:
        super().__init__()
        self.act = act
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.act(self, x)
        return x * self.seen


def test_state_that_a_later_call_would_read_is_refused() -> None:
    def counted(m: Any, x: Tensor) -> None:
        m.seen = m.seen + 1

    for act in (counted, lambda m, x: m.seen.add_(1)):
        with pytest.raises(CaptureError, match="writes into seen"):
            capture(Stateful(act), (X,))


def test_what_every_call_makes_anew_is_no_state() -> None:
    def made(m: Any, x: Tensor) -> None:
        m.seen = torch.arange(4) / x.shape[0]

    model = Stateful(made)
    program = capture(model, (X,))
    assert torch.equal(model.seen, torch.zeros(4))
    torch.testing.assert_close(run(program, model, X), model(X))


def test_nodes_say_which_module_and_which_line_made_them() -> None:
    program = capture(nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 2))), (X,))
    made = [(str(n.target), module_of(n)) for n in program.main.graph.nodes if n.op == "call_function"]
    assert made == [("aten.linear.default", "0"), ("aten.tanh.default", "1.0"), ("aten.linear.default", "1.1")]
    program = capture(Function(lambda m, x: x.sin()), (X,))
    (node,) = (n for n in program.main.graph.nodes if n.op == "call_function")
    assert source_of(node).startswith("test_capture.py:")


@dataclass
class Outputs(OrderedDict):  # type: ignore[type-arg]
    """As diffusers' outputs: a dictionary of the fields that are not None, which pytree knows as one."""

    samples: list[Tensor]
    others: list[Tensor] | None

    def __post_init__(self) -> None:
        self.update((f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) is not None)


register_pytree_node(Outputs, _dict_flatten, lambda values, keys: Outputs(**dict(zip(keys, values, strict=True))))


def test_outputs_that_leave_out_what_is_none_are_made_again() -> None:
    model = Function(lambda m, x: Outputs([x * m.weight], None))
    out = run(capture(model, (X,)), model, X)
    assert type(out) is Outputs and out.others is None
    torch.testing.assert_close(out.samples, model(X).samples)


class Borrowing(nn.Module):
    """Uses a part of its first block outside of it, and layers in lists of lists."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 4)))
                                    for _ in range(3))
        self.pairs = nn.ModuleList(nn.ModuleList([nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh())])
                                   for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        for first, second in self.pairs:
            x = x + second(first(x))
        return x * self.blocks[0][1](x)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_blocks_of_which_parts_are_used_outside_are_captured_once(device: str) -> None:
    torch.manual_seed(0)
    model = Borrowing()
    with torch.device(device):
        program = capture(Borrowing(), (X.to(device),))
    assert program.calls() == {"main": 1, "blocks": 3}
    torch.testing.assert_close(run(program, model, X), model(X))


def test_autocast_casts_what_einsum_multiplies() -> None:
    def forward(model: Any, x: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            inside = torch.einsum("ij,kj->ik", x, x), torch.einsum("ij, ij -> ij", x, x), torch.einsum("ij->ji", x)
        return *inside, torch.einsum("ij,kj->ik", [x, x]), torch.einsum("...j,j", x, model.weight)

    model = Function(forward)
    for made, expected in zip(run(capture(model, (X,)), model, X), model(X), strict=True):
        assert made.dtype == expected.dtype
        torch.testing.assert_close(made, expected)


def test_einsum_of_three_under_autocast_is_refused() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.einsum("ij,kj,k->i", x, x, x[:, 0])

    with pytest.raises(CaptureError, match="einsum of 3 tensors"):
        capture(Function(forward), (X,))
