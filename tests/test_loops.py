"""When a denoising loop begins: what was kept in the one before is of another picture, or of other weights."""

from __future__ import annotations

import pytest

from xdit_compile.runtime.pipefusion.denoising_loops import LoopBoundaries

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


@pytest.mark.parametrize("name", CALLS)
def test_first_steps(name: str) -> None:
    calls, first = CALLS[name]
    loops = LoopBoundaries()
    assert [i for i, (t, c) in enumerate(calls) if loops.begins(None, (t, t), c)] == first


def test_without_times_each_call_is_by_itself() -> None:
    loops = LoopBoundaries()
    assert all(loops.begins(None, (), c) for c in "aab")


def test_a_pipeline_tells_its_loops() -> None:
    loops = LoopBoundaries()
    told = [loops.begins(epoch, (), "a") for epoch in (1, 1, 1, 2, 2)]
    assert told == [True, False, False, True, False]
    assert loops.begins(None, (3.0,), "a"), "outside of it"
    assert loops.begins(3, (), "a")
