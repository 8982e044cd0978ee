"""When a denoising loop begins: what was kept in the one before is of another picture, or of other weights."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from xdit_compile.ir import host_values
from xdit_compile.runtime.pipefusion.denoising_loops import DenoisingLoops, Step
from xdit_compile.runtime.pipefusion.loop_boundaries import LoopBoundaries

CALLS: dict[str, tuple[list[tuple[float, str]], list[int]]] = {
    "one way": ([(t, "a") for t in (9.0, 6.0, 3.0)], [0]),
    "upwards": ([(t, "a") for t in (0.1, 0.5, 0.9)], [0]),
    "two loops": ([(t, "a") for t in (9.0, 6.0, 9.0, 6.0, 3.0)], [0, 2]),
    "a loop that begins later": ([(t, "a") for t in (9.0, 3.0, 6.0, 3.0)], [0, 2]),
    "guidance": ([(t, c) for t in (9.0, 6.0, 3.0) for c in "ab"], [0]),
    "guidance, two loops": ([(t, c) for t in (9.0, 6.0, 9.0) for c in "ab"], [0, 4]),
    "one step": ([(9.0, "a")] * 3, [0, 1, 2]),
    "one step, guidance": ([(9.0, c) for c in "abab"], [0, 2]),
}


def at(time: float) -> dict[str, Tensor]:
    return {"sample": torch.zeros(1, 4, 4), "timestep": torch.full((2,), time)}


@pytest.fixture
def on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every tensor lay on an accelerator, whose values nobody may wait for."""
    monkeypatch.setattr(host_values, "on_host", lambda tensor: False)


@pytest.mark.parametrize("name", CALLS)
def test_first_steps(name: str) -> None:
    calls, first = CALLS[name]
    loops = LoopBoundaries()
    begun = [loops.begins(None, at(t), c) for t, c in calls]
    assert [i for i, b in enumerate(begun) if b.here] == first and not any(b.before for b in begun)


@pytest.mark.parametrize("name", CALLS)
def test_on_a_device_they_are_known_one_call_later(name: str, on_a_device: None) -> None:
    calls, first = CALLS[name]
    loops = LoopBoundaries()
    begun = [loops.begins(None, at(t), c) for t, c in [*calls, (0.0, "z")]]
    assert [i for i, b in enumerate(begun) if b.here] == [0]
    assert [i for i, b in enumerate(begun) if b.before] == [i + 1 for i in first if i]


def test_without_times_each_call_is_by_itself() -> None:
    loops = LoopBoundaries()
    assert all(loops.begins(None, {"sample": torch.zeros(1, 4, 4)}, c).here for c in "aab")


def test_a_pipeline_tells_its_loops() -> None:
    loops = LoopBoundaries()
    told = [loops.begins(epoch, at(1.0), "a").here for epoch in (1, 1, 1, 2, 2)]
    assert told == [True, False, False, True, False]
    assert loops.begins(None, at(3.0), "a").here, "outside of it"
    assert loops.begins(3, at(3.0), "a").here


@pytest.mark.parametrize("seed", range(60))
def test_no_sample_goes_on_from_another(seed: int) -> None:
    """Outside of pipelines: loops of one or more samples, some with equal conditions, some broken off."""
    rng, boundaries, loops, last = random.Random(seed), LoopBoundaries(), DenoisingLoops(), dict[int, tuple[int, int]]()
    kept = 0
    for run in range(rng.randint(2, 5)):
        conditions = [rng.choice("abc") for _ in range(rng.randint(1, 3))]
        calls = [(t, i, c) for t in (9.0, 6.0, 3.0, 1.0) for i, c in enumerate(conditions)]
        for t, i, c in calls[:rng.choice((1, 2, 3, len(calls)))]:
            # The same tensors as before, or new ones of the same values.
            if boundaries.begins(None, at(t), rng.choice((c, rng.random()))).here:
                loops.end()
            loop = loops.next(Step("program", [], lambda c=c: c, lambda t=t: (t,), 0, list, apart=True))
            if loop.steps == 1:
                loop.caches = []
            else:
                assert last[id(loop.caches)] == (run, i)
            kept, last[id(loop.caches)] = kept + (loop.steps > 1), (run, i)
    assert kept or seed


def test_a_step_that_is_interrupted_by_an_edit_mixes_no_conditions() -> None:
    """Of a pipeline's step, whose calls are told by their order: the model is edited between two of them."""
    loops, last = DenoisingLoops(), dict[int, str]()
    for t in (9.0, 6.0, 3.0):
        for condition in "ab":
            if (t, condition) == (6.0, "b"):
                loops.end()
            branch = loops.branch("program", (t,), 1)
            loop = loops.next(Step(("program", branch), [], tuple, lambda t=t: (t,), 1, list))
            if loop.steps == 1:
                loop.caches = []
            assert last.setdefault(id(loop.caches), condition) == condition
