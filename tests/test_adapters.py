"""Adapters on parallel pipelines: whatever is loaded, switched, scaled, fused or taken off between calls, the numbers
are those of one process, and what was captured before is used again."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pipelines
import pytest
from adapter_runs import Seen, Step, drive, drive_model
from marks import whole
from pool import Pool

EXACT = 1e-5  # of the output's scale, in float32
MOVED = 1e-3  # what a step changes is larger; also of the output's scale

USED = ("sd3", "flux_true", "sd3_control", "sdxl")
ENCODED = ("transformer", "text_encoder")


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Pipelines, written here: of ranks, the first alone would write text encoders."""
    path = tmp_path_factory.mktemp("adapted")
    for name in USED:
        pipelines.folder(name, path)
    return str(path)


def driven(pool: Pool, scene: Any, *args: Any, **kwargs: Any) -> list[Seen]:
    """What both of two ranks saw, which is alike but for the last digits."""
    first, second = pool.run(scene, *args, ranks=range(2), timeout=200, **kwargs)
    assert [s.captures for s in first] == [s.captures for s in second]
    return [a if a.error > b.error else b for a, b in zip(first, second, strict=True)]


def assert_exact(seen: Sequence[Seen]) -> None:
    assert [(s.step, s.error) for s in seen if not s.error <= EXACT] == []


def follow(pool: Pool, scene: Any, name: str, root: str, spec: str, steps: Sequence[tuple[Step, int]],
           still: Sequence[Step] = (), **how: Any) -> None:
    """Each step is exact and takes as many captures as it says; a program of the step before would be wrong, except
    after those that stand ``still``."""
    seen = driven(pool, scene, name, root, spec, [step for step, _ in steps], **how)
    assert_exact(seen)
    assert [(s.step, s.moved) for s in seen[1:] if (s.moved > MOVED) is (s.step in still)] == []
    assert [(s.step, s.captures) for s in seen] == list(steps[how.get("before", 0):])


@pytest.mark.whole
def test_pipeline_with_its_batch_shared_out(pool: Pool, root: str) -> None:
    """Of the denoiser and a text encoder; loaded, combined, switched, scaled for a call, and coming back."""
    follow(pool, drive, "sd3", root, "cfg=2", [
        (("start",), 1),
        (("load", "a", 1), 1),
        (("file", "b", 2), 1),  # the newest alone is active
        (("set", "ab", [0.7, 0.3]), 1),
        (("with", {"joint_attention_kwargs": {"scale": 0.5}}), 1),
        (("with", {"joint_attention_kwargs": None}), 0),
        (("disable",), 1),
        (("enable",), 0),
        (("unload",), 0),
    ], parts=ENCODED)  # fmt: skip


@pytest.mark.whole
def test_pipeline_in_turns_with_adapters_from_before(pool: Pool, root: str) -> None:
    """Two were loaded before the pipeline was made parallel, and encoders live on one rank each."""
    follow(pool, drive, "flux_true", root, "cfg=2,encoders=spread", [
        (("load", "a", 1), 0),
        (("load", "b", 2), 0),
        (("set", "ab", [0.7, 0.3]), 1),
        (("edit", "a"), 0),
        (("fuse", 0.5), 1),
        (("unload",), 1),
    ], parts=ENCODED, before=2, still=[("unload",)])  # fmt: skip


def test_adapters_of_an_encoder_that_is_cut(pool: Pool, root: str) -> None:
    """They come after the first call, when ranks have but a share of it."""
    follow(pool, drive, "sd3", root, "ulysses=2,encoders=shard", [
        (("start",), 1), (("load", "a", 1), 0), (("set", "a", [0.5]), 0), (("unload",), 0),
    ], parts=("text_encoder",))  # fmt: skip


def test_model_by_itself(pool: Pool, root: str) -> None:
    follow(pool, drive_model, "sd3", root, "ulysses=2", [
        (("start",), 1),
        (("load", "a", 1), 1),
        (("set", "a", [0.5]), 1),
        (("set", "a", [1.0]), 0),
        (("unload",), 0),
        (("load", "a", 2), 0),  # other weights where there were some before
        (("edit", "a"), 0),
        (("hotswap", "a", 3), 0),
        (("fuse", 0.5), 1),
    ])  # fmt: skip


SOME: list[Step] = [("start",), ("load", "a", 1), ("edit", "a"), ("hotswap", "a", 3), ("fuse", 0.5)]
ALL: list[Step] = [*SOME[:2], ("set", "a", [0.5]), ("load", "b", 2), ("set", "ab", [0.7, 0.3]), *SOME[2:4],
                   ("delete", "b"), SOME[4], ("unfuse",), ("unload",)]


@pytest.mark.parametrize(("spec", "steps"), [
    ("tensor=2", SOME), ("pipefusion=2,warmup=all", SOME), *(whole(spec, ALL) for spec in (
        "tensor=2", "pipefusion=2,warmup=all", "ulysses=2,shard=2", "ulysses=2,shard=2,offload=block"))])
def test_model_whose_ranks_gave_up_its_weights(pool: Pool, root: str, spec: str, steps: list[Step]) -> None:
    """Weights that are added are on every rank; those that there were are edited block by block."""
    seen = driven(pool, drive_model, "sd3", root, spec, steps)
    assert_exact(seen)
    assert [s.step for s in seen[1:] if s.moved <= MOVED] == [s for s in steps if s in (("delete", "b"), ("unfuse",))]
    # Weights that are edited need no new program.
    assert next(s.captures for s in seen if s.step == ("edit", "a")) == 0


@pytest.mark.whole
def test_model_by_itself_with_two(pool: Pool, root: str) -> None:
    follow(pool, drive_model, "sd3", root, "ulysses=2", [
        (("load", "a", 3), 1),
        (("load", "b", 4), 1),
        (("set", "a", [1.0]), 1),
        (("set", "b", [1.0]), 0),
        (("set", "a", [1.0]), 0),
        (("delete", "b"), 0),
        (("fuse", 0.5), 1),
    ], still=[("delete", "b")])  # fmt: skip


def test_swapped_in_place_with_room_for_more(pool: Pool, root: str) -> None:
    """Prepared so, adapters of other ranks fit one program, and scales are tensors, whose values it reads."""
    follow(pool, drive_model, "sd3", root, "ulysses=2", [
        (("prepare", 4), 0),
        (("load", "a", 1), 0),
        (("hotswap", "a", 2, 3), 1),
        (("scale", "a", 0.4), 0),
    ], before=2)  # fmt: skip


@pytest.mark.whole
def test_program_of_another_state_would_be_wrong(pool: Pool, root: str) -> None:
    """The same kind of steps with what the model has changed left out of the key: errors are as large as changes."""
    steps: list[Step] = [("load", "a", 1), ("set", "a", [0.5]), ("disable",), ("enable",)]
    assert_exact(driven(pool, drive_model, "sd3", root, "ulysses=2", steps))
    first, *others = driven(pool, drive_model, "sd3", root, "ulysses=2", steps, blind=True)
    assert first.error <= EXACT
    assert all(s.error > MOVED and s.captures == 0 for s in others)


def steps_of(seed: int, count: int = 7) -> list[Step]:
    """A random sequence of what may follow what."""
    draw = random.Random(seed)
    steps: list[Step] = [("start",)]
    loaded: list[str] = []
    fused = False
    while len(steps) < count:
        free = [n for n in "ab" if n not in loaded]
        options: list[Step] = [("unfuse",)] if fused else [("load", n, draw.randrange(9)) for n in free]
        if loaded and not fused:
            name = draw.choice(loaded)
            options += [("set", name, [draw.choice([0.5, 1.0])]), ("disable",), ("enable",), ("edit", name),
                        ("hotswap", name, draw.randrange(9)), ("fuse", draw.choice([0.5, 1.0])), ("delete", name),
                        ("unload",), ("set", "".join(loaded), [0.7, 0.3][: len(loaded)])]
        step = draw.choice(options)
        loaded = [] if step[0] == "unload" else [n for n in loaded if step != ("delete", n)]
        loaded += [step[1]] if step[0] == "load" else []
        fused = step[0] == "fuse"
        steps.append(step)
    return steps


@pytest.mark.whole
@pytest.mark.parametrize("seed", [1, 2])
def test_random_sequence(pool: Pool, root: str, seed: int) -> None:
    assert_exact(driven(pool, drive_model, "sd3", root, "ulysses=2", steps_of(seed)))


@pytest.mark.whole
def test_strength_of_a_controlnet(pool: Pool, root: str) -> None:
    """Two programs for each strength: the ControlNet's own, and, at the end, with strength zero."""
    follow(pool, drive, "sd3_control", root, "cfg=2", [
        (("start",), 3),
        (("with", {"controlnet_conditioning_scale": 0.9}), 1),
        (("with", {"controlnet_conditioning_scale": 0.5}), 0),
    ])  # fmt: skip


@pytest.mark.whole
def test_picture_as_a_prompt(pool: Pool, root: str) -> None:
    follow(pool, drive, "sdxl", root, "cfg=2", [
        (("start",), 1),
        (("show", 1), 1),
        (("picture", 0.4), 1),
        (("picture", 1.0), 0),
        (("hide",), 0),
        (("show", 2), 0),
    ])  # fmt: skip


@pytest.mark.parametrize(("encoders", "before"), [
    whole("everywhere", 0), whole("spread", 0), ("spread", 1)])
def test_word_by_textual_inversion(pool: Pool, root: str, encoders: str, before: int) -> None:
    """Encoders are not captured, and what they return keeps its shape. A rank that has given up an encoder's weights
    cannot take words off again."""
    off = [(("uninvert", "<thing>"), 0)] if encoders == "everywhere" else []
    follow(pool, drive, "flux_true", root, f"cfg=2,encoders={encoders}", [
        (("invert", "<thing>", 1), 0 if before else 1),
        (("with", {"prompt": "a red <thing> runs"}), int(bool(before))),
        (("invert", "<other>", 2), 0),
        (("with", {"prompt": "two <other> under a dark <thing>"}), 0),
        *off,
    ], before=before, still=[("invert", "<other>", 2)])  # fmt: skip
