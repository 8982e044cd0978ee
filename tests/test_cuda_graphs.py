"""Whole forwards as CUDA graphs: what they copy, what they own, and what they cannot hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.distributed as dist
from compiled_runs import deep, difference_of_outputs
from torch import Tensor

import xdit_compile
from xdit_compile.errors import XditError
from xdit_compile.runtime.compilation import cuda_graphs
from xdit_compile.runtime.compilation.cuda_graphs import WARM_UP, GraphedFunction

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Tape:
    """Replays into the same memory, as a CUDA graph does, from the memory that it was recorded with."""

    made = 0

    def __init__(self, function: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor]) -> None:
        Tape.made += 1
        self._function, self._tensors = function, list(tensors)
        self.results = [t.clone() for t in function(*tensors)]

    def replay(self) -> None:
        for result, made in zip(self.results, self._function(*self._tensors), strict=True):
            result.copy_(made)


def graphed(function: Callable[..., Sequence[Tensor]], *fixed: bool) -> GraphedFunction:
    Tape.made = 0
    return GraphedFunction(function, fixed, Tape)


def test_results_of_a_call_outlive_the_next() -> None:
    call, weight = graphed(lambda w, x: (w * x, x + 1), True, False), torch.full((3,), 2.0)
    seen = [call(weight, torch.full((3,), float(i))) for i in range(6)]
    for i, (scaled, more) in enumerate(seen):
        assert scaled.tolist() == 3 * [2.0 * i] and more.tolist() == 3 * [i + 1.0]
    assert Tape.made == 1
    # Whoever writes into a result changes no later one.
    seen[-1][0].zero_()
    assert call(weight, torch.ones(3))[0].tolist() == 3 * [2.0]


def test_arguments_may_lie_anywhere_and_go_away() -> None:
    call, weight = graphed(lambda w, x: (w @ x,), True, False), torch.eye(4)
    for i in range(5):
        x = torch.arange(16.0).reshape(4, 4) + i
        assert torch.equal(call(weight, x.T)[0], x.T)  # strides are kept: they were compiled for
        del x
    assert Tape.made == 1


@pytest.mark.parametrize("moves", [False, True])
def test_weights_are_read_where_they_are(moves: bool) -> None:
    call, weight, x = graphed(lambda w, x: (w * x,), True, False), torch.ones(2), torch.ones(2)
    for _ in range(WARM_UP + 1):
        call(weight, x)
    if moves:
        weight = torch.full((2,), 5.0)
    else:
        weight.fill_(5.0)
    assert call(weight, x)[0].tolist() == [5.0, 5.0] and Tape.made == 1 + moves


def test_host_collectives_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_backend", lambda group: "gloo")
    with pytest.raises(XditError, match=r"cannot hold collectives of gloo.*nccl"):
        cuda_graphs.check_groups([dist.ProcessGroup(0, 2)])


@on_gpu
def test_a_forward_is_one_graph_and_owns_what_it_returns() -> None:
    model = deep(4).cuda()
    parallel = xdit_compile.parallelize(model, "backend=inductor,mode=reduce-overhead")
    for step in range(6):
        assert difference_of_outputs(parallel, model, step) <= 1e-5
