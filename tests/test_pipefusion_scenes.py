"""Stages on real ranks: schedulers, loops one after the other, guidance, pipelines, bad input and mishaps."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pipefusion_scenes as scenes
import pipelines
import pytest
from marks import whole
from pool import Pool, RemoteError
from test_pipelines import folders  # noqa: F401  a fixture

EXACT = 1e-5


@pytest.fixture(scope="module")
def troubled() -> Iterator[Pool]:
    """Ranks for what fails on purpose, from which no other test shall suffer."""
    workers = Pool(world=4)
    yield workers
    workers.close()



def act(pool: Pool, world: int, scene: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
    return pool.run(scene, *args, ranks=range(world), timeout=240, **kwargs)


# --------------------------------------------------------------------------------------------------
# Schedulers


@pytest.mark.parametrize(
    ("name", "chosen", "options"),
    [whole("sd3", "FlowMatchEulerDiscreteScheduler", {}), ("dit", "DDIMScheduler", {"eta": 1.0}),
     whole("pixart_sigma_nomask", "DPMSolverMultistepScheduler", {}),
     whole("wan", "UniPCMultistepScheduler", {}),
     whole("pixart_sigma_nomask", "EulerAncestralDiscreteScheduler", {})],
)  # fmt: skip
def test_schedulers_follow_in_patches(pool: Pool, name: str, chosen: str, options: dict[str, Any]) -> None:
    """No step waits for all of the one before."""
    for seen in act(pool, 2, scenes.scheduled, name, chosen, **options):
        assert seen["error"] <= EXACT and seen["exact"] > EXACT and seen["drained"] == 0, seen
        assert seen["waited"], "even the last result is still to come"


def test_a_scheduler_that_looks_at_all_of_the_sample(pool: Pool) -> None:
    """It takes a quantile, for which all patches have to be there."""
    for seen in act(pool, 2, scenes.scheduled, "pixart_sigma_nomask", "thresholding"):
        assert seen["error"] <= EXACT and seen["exact"] > EXACT
        assert not seen["waited"], "the last result is here"


def test_steps_that_waited_are_counted(pool: Pool) -> None:
    for seen in act(pool, 2, scenes.scheduled, "pixart_sigma_nomask", "thresholding", steps=4):
        assert seen["drained"] > 0


# --------------------------------------------------------------------------------------------------
# Loops that follow each other


@pytest.mark.parametrize("name", [whole("sd3"), "wan", "dit"])
def test_interrupted_loops_leave_nothing(pool: Pool, name: str) -> None:
    for errors in act(pool, 2, scenes.interrupted, name):
        assert max(errors) <= EXACT, errors


def test_loops_whose_result_nobody_uses(pool: Pool) -> None:
    for errors in act(pool, 2, scenes.left_alone, "sd3"):
        assert max(errors) <= EXACT, errors


def test_samples_in_turns(pool: Pool) -> None:
    for errors in act(pool, 2, scenes.in_turns, "dit"):
        assert max(errors) <= EXACT, errors


@pytest.mark.parametrize("name", [whole("sd3"), "dit"])
def test_one_step_and_then_another_prompt(pool: Pool, name: str) -> None:
    assert max(act(pool, 2, scenes.one_step_then_another, name)) <= EXACT


@pytest.mark.parametrize(("name", "what"), [
    ("dit", "size"), whole("sana", "batch"), whole("sd3", "size"), whole("flux", "batch")])
def test_another_size_in_between(pool: Pool, name: str, what: str) -> None:
    for errors in act(pool, 2, scenes.another_size, name, what):
        assert max(errors) <= EXACT, errors


@pytest.mark.parametrize("name", ["sd3", whole("wan"), "dit"])
def test_both_conditions_in_turn(pool: Pool, name: str) -> None:
    for seen in act(pool, 2, scenes.guided, name, scenes.TWO):
        assert seen["error"] <= EXACT < seen["exact"] and seen["drained"] == 0, seen


@pytest.mark.parametrize("name", [whole("sd3"), whole("wan")])
def test_groups_of_stages_take_turns(pool: Pool, name: str) -> None:
    for seen in act(pool, 4, scenes.guided, name, f"cfg=2,{scenes.TWO}"):
        assert seen["error"] <= EXACT < seen["exact"] and seen["drained"] == 0, seen


def test_one_condition_where_groups_take_turns(pool: Pool) -> None:
    assert max(act(pool, 4, scenes.alone_in_turns, "wan", f"cfg=2,{scenes.TWO}")) < 0.1


@pytest.mark.parametrize(
    ("name", "layers", "second"),
    [("dit", 4, None), whole("sd3", 5, None),
     ("sd3", 4, {"skip_layers": [1]}),
     whole("sd3", 4, {"skip_layers": [2]})],
)  # fmt: skip
def test_two_kinds_of_calls(pool: Pool, name: str, layers: int, second: dict[str, Any] | None) -> None:
    """Another size, or without a block, as skip-layer guidance has it."""
    for errors in act(pool, 2, scenes.two_kinds, name, layers, second):
        assert max(errors) <= EXACT, errors



def test_a_stage_is_where_it_was(pool: Pool) -> None:
    """Pipelines ask their models on which device to make tensors."""
    for seen in act(pool, 2, scenes.placed, "dit"):
        assert seen == [("cpu", True)] * 2


def test_two_denoisers(pool: Pool) -> None:
    for errors in act(pool, 2, scenes.shared_between):
        assert max(errors) <= EXACT, errors


# --------------------------------------------------------------------------------------------------
# Pipelines


PIPELINES = ["dit", *(whole(name) for name in (
    "sd3", "wan", "sd3_skip", "qwen_image", "flux", "flux_true", "pixart_sigma", "ltx", "wan_two"))]


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_again(pool: Pool, name: str, folders: str) -> None:  # noqa: F811
    pipelines.folder(name, Path(folders))
    for seen in act(pool, 2, scenes.pipelines_again, name, folders):
        assert seen["again"] == 0 == seen["first"], seen
        assert EXACT < seen["exact"] < 0.5 and seen["apart"] > 1e-3 and seen["type"], seen
        assert not seen["watched"] or seen["steps"] == 6
        # A callback is given real latents, so that its loop waits at each step, the second one to follow patches.
        assert name not in ("sd3", "dit", "wan") or seen["drained"] == (4 if seen["watched"] else 0)


# --------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("spec", "world", "options", "words"),
    [
        ("pipefusion=3", 3, {}, [r"3 stages", r"\b2 blocks", "blocks.0", "pipefusion=2"]),
        ("pipefusion=2,patches=8", 2, {}, [r"\b8 patches", r"\b7 rows", "fewer patches"]),
        ("pipefusion=2,ulysses=2,patches=5", 4, {}, [r"\b5 patches", "fewer patches"]),
        ("pipefusion=2,ring=2", 2, {}, ["pipefusion=2", "ring=2", "ulysses"]),
        ("patches=4,ulysses=2", 2, {}, ["num_patches", "pipefusion=2"]),
        ("warmup=2,ulysses=2", 2, {}, ["warmup_steps", "pipefusion=2"]),
        ("pipefusion=2,warmup=0", 2, {}, ["warmup_steps", "at least 1", "all", r"\b0\b"]),
        ("pipefusion=2,patches=0.5", 2, {}, ["patches", "0.5"]),
        ("pipefusion=2,stage_blocks=2+1", 2, {}, [r"\b3 blocks", r"has 2\b"]),
        ("pipefusion=2,stage_blocks=1+1+1", 2, {}, ["stage_blocks", "2 stages", r"'1\+1\+1'"]),
        ("pipefusion=2,stage_blocks=2+0", 2, {}, ["stage_blocks", r"'2\+0'"]),
        ("pipefusion=2", 2, {"writing": True}, ["writes into its arguments", "ulysses"]),
        ("pipefusion=2", 3, {}, [r"\b2\b", "3 are running", "pipefusion=|ulysses="]),
    ],
)
def test_specs_that_do_not_fit(
    troubled: Pool, spec: str, world: int, options: dict[str, Any], words: list[str]
) -> None:
    for seen in act(troubled, world, scenes.refused, spec, world, **options):
        assert seen["raised"] == "SpecError", seen
        assert [w for w in words if not re.search(w, seen["text"])] == [], seen["text"]
        assert seen["next"] <= EXACT


def test_a_call_with_too_few_tokens_and_one_with_enough(troubled: Pool) -> None:
    for few, enough, again, more in act(troubled, 2, scenes.refused_call, 8, (7, 12, 7, 17)):
        assert "8 patches" in few and "8 patches" in again
        assert enough <= EXACT and more <= EXACT


# --------------------------------------------------------------------------------------------------
# Mishaps


EACH = [whole(0), 1, whole(2)]


@pytest.mark.parametrize("rank", EACH)
def test_a_stage_that_raises(troubled: Pool, rank: int) -> None:
    for at, seen in enumerate(act(troubled, 3, scenes.mishap, "raises", rank, "pipefusion=3")):
        if at == rank:
            assert (seen["raised"], seen["text"]) == ("ValueError", "out of ideas")
        else:
            assert seen["raised"] == "RankFailure" and f"rank {rank}" in seen["text"], seen
            assert "out of ideas" in seen["text"]
        assert seen["took"] < 10 and seen["again"][0] == "RankFailure"
        assert seen["next"] <= EXACT


@pytest.mark.parametrize("rank", EACH)
@pytest.mark.parametrize("how", ["dies", whole("leaves")])
def test_a_stage_that_dies(troubled: Pool, how: str, rank: int, tmp_path: Path) -> None:
    """In the middle of its step, or between two."""
    with pytest.raises(RemoteError, match=r"the worker died \(exit code 7\)"):
        act(troubled, 3, scenes.mishap, how, rank, "pipefusion=3", str(tmp_path))
    for at in {0, 1, 2} - {rank}:
        raised, seconds, text = (tmp_path / str(at)).read_text().split("|", 2)
        assert raised == "RankFailure" and f"rank {rank}" in text, text
        assert float(seconds) < 14


@pytest.mark.parametrize("rank", [whole(0), 1])
def test_ranks_that_call_with_different_inputs_in_a_patched_step(troubled: Pool, rank: int) -> None:
    seen = act(troubled, 2, scenes.mishap, "differs", rank, "pipefusion=2")
    for s in seen:
        assert s["raised"] == "RankMismatch" and "  step: ranks " in s["text"], s
        assert s["took"] < 10 and s["next"] <= EXACT


@pytest.mark.parametrize("spec", ["pipefusion=2,patches=4", "pipefusion=2,patches=1"])
def test_one_rank_may_look_at_results(pool: Pool, spec: str) -> None:
    for seen in act(pool, 2, scenes.looked_at, spec):
        assert seen["error"] <= EXACT
