"""What of a model a captured program depends on: its structure and what it reads, not which objects these are."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

from xdit_compile.driver.compile_call import compile_program
from xdit_compile.frontend.model_state import describe
from xdit_compile.frontend.program_cache import captured
from xdit_compile.runtime.execution.executor import Executor
from xdit_compile.spec import ShardingSpec


def model() -> nn.Sequential:
    """Three layers, two of one shape."""
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 8)).eval().requires_grad_(False)


def put_again(m: nn.Sequential) -> None:
    m[0] = copy.deepcopy(m[0])


def attribute_to_the_end(m: nn.Sequential) -> None:
    size = m[0].in_features
    del m[0].in_features
    m[0].in_features = size


def none_elsewhere(m: nn.Sequential) -> None:
    del m.extra
    m.register_module("extra", None)


def sets_in_another_order(m: nn.Sequential) -> None:
    m.names = {8, 0}


@pytest.mark.parametrize("change", [put_again, attribute_to_the_end, none_elsewhere, sets_in_another_order])
def test_same(change: Callable[[nn.Sequential], None]) -> None:
    m = model()
    m.extra, m.names = None, {0, 8}
    before = describe(m).value
    change(m)
    assert describe(m).value == before


def shared(m: nn.Sequential) -> None:
    m[1] = m[0]


def another_number(m: nn.Sequential) -> None:
    m.factor = 1.0


def truth(m: nn.Sequential) -> None:
    m.factor = True


def without_bias(m: nn.Sequential) -> None:
    m[0].bias = None


def exchanged(m: nn.Sequential) -> None:
    """The same modules, in other places."""
    m[1], m[2] = m[2], m[1]


@pytest.mark.parametrize("change", [shared, another_number, truth, without_bias, exchanged])
def test_different(change: Callable[[nn.Sequential], None]) -> None:
    m = model()
    m.factor = 1
    before = describe(m).value
    change(m)
    assert describe(m).value != before


def test_program_reads_the_layers_that_are_there_and_keeps_none() -> None:
    m, x = model(), torch.randn(2, 4)
    program = captured(m, (x,), {})
    run = Executor(compile_program(program, ShardingSpec(), 0).local, m)
    torch.testing.assert_close(run([x])[0], m(x))
    old = weakref.ref(m[0].weight)
    m[0] = nn.Linear(4, 4).eval().requires_grad_(False)
    assert captured(m, (x,), {}) is program
    torch.testing.assert_close(run([x])[0], m(x))
    gc.collect()
    assert old() is None
