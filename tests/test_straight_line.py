"""Code that calls a program's functions one after the other."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import compiled_runs
import pytest
import torch
from compiled_runs import deep, inputs
from emulation import held
from torch import Tensor, fx, nn

from xdit_compile.driver.compile_call import compile_program
from xdit_compile.frontend.capture import capture
from xdit_compile.runtime.compilation.straight_line import StraightLine
from xdit_compile.runtime.execution.executor import Executor
from xdit_compile.spec import ShardingSpec


def chain(*functions: Callable[..., Any]) -> fx.GraphModule:
    """Functions of one tensor and a weight, one after the other."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    weights = [graph.placeholder(f"w{i}") for i in range(len(functions))]
    for i, weight in enumerate(weights):
        x = graph.call_module(f"f{i}", (x, weight))
    graph.output((x,))
    return fx.GraphModule({f"f{i}": f for i, f in enumerate(functions)}, graph)


def test_it_computes_what_the_graph_does() -> None:
    model = deep(3)
    program = compile_program(capture(model, *compiled_runs.arguments(model)), ShardingSpec(), 0).local
    given = held(model, program, [*inputs().values()])
    stays = [i.kind != "argument" for i in program.inputs]
    line = StraightLine(program.main, stays)
    expected = program.main(*given)
    for _ in range(2):
        found = line([t for t, s in zip(given, stays, strict=True) if not s], [given[i] for i in line.order])
        assert len(found) == len(expected) and all(map(torch.equal, found, expected))
    assert sorted(set(line.order)) == [i for i, s in enumerate(stays) if s]


def test_inner_functions_are_called_without_what_is_around_them() -> None:
    seen: list[str] = []

    def noting(name: str) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, w: seen.append(name) or x * w  # type: ignore[func-returns-value]

    inner, graph = chain(noting("a"), noting("b")), fx.Graph()
    x, w, v = map(graph.placeholder, "xwv")
    made = graph.call_module("inner", (x, w, v))
    first = graph.call_function(torch.ops.aten.add.Tensor, (made, 1), {"alpha": 0.5})
    made = graph.call_module("inner", (first, v, w))
    graph.output((graph.call_function(torch.cat, ([made, x], 0)), None))
    inner.graph.output_node().args = (inner.graph.output_node().args[0][0],)  # type: ignore[index]
    inner.recompile()
    main = fx.GraphModule({"inner": inner}, graph)
    tensors = torch.randn(3, 2).unbind()
    found = StraightLine(main, [False, True, True])(tensors[:1], [tensors[i] for i in (1, 2, 2, 1)])
    expected = main(*tensors)
    assert torch.equal(found[0], expected[0]) and found[1] is None and seen == ["a", "b", "a", "b"] * 2


def test_values_live_until_their_last_use() -> None:
    made: list[weakref.ref[Tensor]] = []
    alive: list[list[bool]] = []

    def function(x: Tensor, w: Tensor) -> Tensor:
        alive.append([ref() is not None for ref in made])
        made.append(weakref.ref(result := x + w))
        return result

    line = StraightLine(chain(*[function] * 3), [False, True, True, True])
    for _ in range(2):
        made.clear()
        alive.clear()
        line([torch.ones(2)], [torch.ones(2)] * 3)
        assert alive == [[], [True], [False, True]]


class Chooses:
    """A function with other code for tensors that lie otherwise in memory."""

    def __init__(self) -> None:
        self.looked = 0

    def __call__(self, x: Tensor, w: Tensor) -> Tensor:
        return self.chosen([x, w])([x, w])

    def chosen(self, tensors: Sequence[Tensor]) -> Callable[[list[Tensor]], Any]:
        self.looked += 1
        strides = [t.stride() for t in tensors]

        def code(given: list[Tensor]) -> Tensor:
            assert [t.stride() for t in given] == strides
            return given[0] @ given[1]

        return code


@pytest.mark.parametrize("other", ["given", "held"])
def test_what_lies_otherwise_in_memory_is_given_to_other_code(other: str) -> None:
    function = Chooses()
    line = StraightLine(chain(function), [False, True])
    x, w = torch.randn(3, 3), torch.randn(3, 3)
    mark = object()
    for _ in range(3):
        assert torch.equal(line([x], [w], mark)[0], x @ w)
    before, function.looked = function.looked, 0
    assert before == 2, "once when it is first called, and once to know what that has run"
    if other == "given":
        assert torch.allclose(line([x.T], [w], mark)[0], x.T @ w)
    else:
        assert torch.allclose(line([x], [w.T], object())[0], x @ w.T)
    assert function.looked == 2
    for _ in range(2):
        assert torch.equal(line([x], [w])[0], x @ w)
    assert function.looked == (2 if other == "given" else 4)


def test_weights_are_read_where_the_model_has_changed_and_are_not_kept_alive() -> None:
    model, state = deep(2), [object()]
    program = compile_program(capture(model, *compiled_runs.arguments(model)), ShardingSpec(), 0).local
    run, x = Executor(program, model, state=lambda: state[0]), [*inputs().values()]

    def same() -> bool:
        with torch.no_grad():
            return torch.allclose(run(x)[0], model(*x), atol=1e-6)

    assert same() and same()
    with torch.no_grad():
        model.out.weight.mul_(2)  # type: ignore[union-attr, operator]
    assert same(), "values are those of now"
    old = weakref.ref(model.out.weight)  # type: ignore[union-attr]
    model.out = nn.Linear(model.out.in_features, model.out.out_features)  # type: ignore[union-attr, arg-type]
    gc.collect()
    assert old() is None
    state[0] = object()
    assert same()
