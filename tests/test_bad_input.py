"""Bad input gets a clear error on every rank, nobody hangs, and what comes next works."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import calls
import pytest
from pool import Pool


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """Workers of its own: what fails here on purpose must not reach other tests."""
    workers = Pool(world=4)
    yield workers
    workers.close()

EXACT = 1e-5
# A rank told of another's failure wakes in milliseconds; the rest is for a busy machine.
SOON = calls.TIMEOUT / 2


def act(pool: Pool, world: int, scene: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
    """What each of ``world`` ranks saw of a scene; all of them came through it."""
    return pool.run(scene, *args, ranks=range(world), timeout=4 * calls.TIMEOUT, **kwargs)


def refused(pool: Pool, world: int, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
    """What each of ``world`` ranks saw of a refusal."""
    return act(pool, world, calls.refused, world, *args, **kwargs)


def assert_refused(seen: list[dict[str, Any]], error: str, *words: str) -> None:
    """Every rank got ``error`` whose text has all words, and another model works afterwards."""
    for one in seen:
        assert one["raised"] == error, one
        assert [w for w in words if not re.search(w, one["text"])] == [], one["text"]
        assert one["next"] <= EXACT


def test_degrees_must_multiply_to_the_processes(pool: Pool) -> None:
    seen = refused(pool, 2, "ulysses=3")
    assert_refused(
        seen, "SpecError", r"3 x 1 = 3", r"\b2 are running", "ulysses=1,ring=2", "ulysses=2,ring=1"
    )


def test_unknown_words(pool: Pool) -> None:
    assert_refused(refused(pool, 2, "ulises=2"), "SpecError", "'ulises'", "ulysses")
    assert_refused(refused(pool, 2, "patches=2"), "SpecError", "num_patches", "belong to pipefusion")


def test_more_ulysses_ranks_than_heads(pool: Pool) -> None:
    seen = refused(pool, 3, "ulysses=3", heads=2)
    assert_refused(seen, "SpecError", "ulysses_degree=3", r"\b2\b", "ulysses=1,ring=3", r"calls\.py:\d+")


def test_batch_of_one_cannot_be_shared(pool: Pool) -> None:
    assert_refused(refused(pool, 2, "data=2", call=calls.inputs(batch=1)), "SpecError", "data=2", "larger batch")


def test_degrees_that_keep_the_batch(pool: Pool) -> None:
    assert_refused(refused(pool, 4, "cfg=2,ulysses=3"), "SpecError", r"2 x 3 x 1 = 6", "cfg=2,ulysses=2,ring=1")


def test_model_without_tokens_runs_whole_and_says_so(pool: Pool) -> None:
    first, second = act(pool, 2, calls.warned, calls.Mlp)
    assert first["error"] == second["error"] == 0.0
    assert "nothing is split" in first["warnings"] and second["warnings"] == ""


def test_fewer_tokens_than_ranks(pool: Pool) -> None:
    seen = refused(pool, 3, "ring=3", call=calls.inputs(tokens=2))
    assert_refused(seen, "SpecError", r"\b3\b", "ring=3")


def test_parallel_twice(pool: Pool) -> None:
    for raised, text in act(pool, 2, calls.refused_twice):
        assert raised == "SpecError"
        assert "already" in text


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("value", ["x"]),
        ("shape", ["x", r"float32\[1,8,6\]", r"float32\[1,7,6\]"]),
        ("dtype", ["step", "float64", "float32"]),
        ("Python", ["scale", r"2\.0"]),
        ("string", ["label", "dog"]),
        ("missing", ["shift"]),
        ("keyword", ["plus", "minus"]),
    ],
)
def test_ranks_that_hold_different_inputs(pool: Pool, what: str, names: list[str]) -> None:
    for seen in act(pool, 3, calls.disagreeing, what):
        for raised, text in (seen["first"], seen["again"]):
            assert raised == "RankMismatch"
            assert re.search(r"ranks 0,2 .*ranks 1 |ranks 1 .*ranks 0,2 ", text), text
            assert [n for n in names if not re.search(rf"(?<!\w){n}(?!\w)", text)] == [], text
        assert seen["then"] <= EXACT


@pytest.mark.parametrize(
    ("how", "words"),
    [("class", "Tiny.*Undecided"), ("spec", "ulysses=2.*ring=2"),
     ("layers", r"weights: blocks\.2\.\S+: ranks 0 have nothing of this name"), ("attribute", "plan")],
)
def test_models_that_differ_between_ranks(pool: Pool, how: str, words: str) -> None:
    for raised, text in act(pool, 2, calls.models_differ, how):
        assert raised == "RankMismatch", (raised, text)
        assert re.search(words, text), text


def test_model_that_changes_on_one_rank_alone(pool: Pool) -> None:
    for seen in act(pool, 2, calls.model_changes_on_one_rank):
        assert seen["raised"] == "RankMismatch", seen
        assert seen["took"] < SOON


def test_rank_that_fails_inside_the_forward(pool: Pool) -> None:
    for rank, seen in enumerate(act(pool, 3, calls.tripping, 1)):
        raised, text = seen["first"]
        if rank == 1:
            assert (raised, text) == ("ValueError", "tripped")
        else:
            assert raised == "RankFailure"
            assert "rank 1" in text and "tripped" in text
        assert seen["took"] < SOON
        assert seen["again"][0] == "RankFailure" and "rank 1" in seen["again"][1]
        assert seen["next"] <= EXACT


def test_rank_whose_capture_alone_fails(pool: Pool) -> None:
    for seen in act(pool, 3, calls.one_refuses):
        raised, text = seen["first"]
        assert raised == "RankMismatch", (raised, text)
        assert re.search("ranks 1 have ValueError: rank 1 refuses", text), text
        assert seen["next"] <= EXACT


def test_rank_whose_call_alone_is_wrong(pool: Pool) -> None:
    stayed, called = reversed(act(pool, 2, calls.one_stays_away, 5.0))
    assert stayed[0] == "TypeError" and "colour" in stayed[1]
    assert called[0] in ("RankFailure", "RankMismatch") and "1" in called[1]


def test_model_that_cannot_be_captured(pool: Pool) -> None:
    with open(calls.__file__) as source:
        line = next(i for i, text in enumerate(source, 1) if "the line that cannot be captured" in text)
    seen = refused(pool, 2, "ulysses=2", calls.Undecided)
    assert_refused(seen, "CaptureError", "Undecided", rf"calls\.py:{line}\b", r"mean\(\)\.item\(\)")


def test_model_that_cannot_be_captured_is_unharmed(pool: Pool) -> None:
    for seen in act(pool, 2, calls.uncaptured_is_unharmed):
        assert seen == {"raised": "CaptureError", "same": True, "error": 0.0}


def test_forward_that_writes_a_buffer(pool: Pool) -> None:
    seen = refused(pool, 2, "ulysses=2", calls.Counting)
    assert_refused(seen, "CaptureError", "calls", "writes")


def test_dropout_in_training_mode(pool: Pool) -> None:
    seen = refused(pool, 2, "ulysses=2", training=True, dropout=0.1)
    assert_refused(seen, "CaptureError", r"eval\(\)", r"calls\.py:\d+")


def test_input_of_a_wrong_shape(pool: Pool) -> None:
    call = calls.inputs()
    seen = refused(pool, 2, "ulysses=2", call=call | {"x": call["x"][..., :5]})
    for one in seen:
        assert one["raised"] in ("CaptureError", "RuntimeError")
        assert re.search(r"calls\.py:\d+.*self\.enter\(x\)", one["text"]), one["text"]
        assert re.search(r"\b5\b.*\b6\b|7x5", one["text"]), one["text"]
        assert ".item()" not in one["text"], "advice about another error"
        assert one["next"] <= EXACT
