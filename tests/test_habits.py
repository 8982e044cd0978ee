"""What people do with a pipeline beside calling it: it works on several processes as it does on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import habits
import pipelines
import pytest
from marks import whole
from pool import Pool
from test_pipelines import EXACT, folders  # noqa: F401  a fixture


@pytest.fixture(scope="module")
def troubled() -> Any:
    """Ranks for tests that end with a failure, which none after it shall suffer from."""
    workers = Pool(world=2)
    yield workers
    workers.close()


def act(pool: Pool, scene: Any, name: str, root: str, *args: Any, **kwargs: Any) -> list[Any]:
    pipelines.folder(name, Path(root))
    return pool.run(scene, name, root, *args, ranks=range(2), timeout=200, **kwargs)


def test_callbacks_on_every_rank_see_the_latents_of_one_process(pool: Pool, folders: str) -> None:  # noqa: F811
    assert all(error <= EXACT for rank in act(pool, habits.called_back, "qwen_image", folders) for error in rank)


def test_a_callback_may_look_at_latents_on_one_rank_only(pool: Pool, folders: str) -> None:  # noqa: F811
    first, second = act(pool, habits.looked_at_on_one_rank, "qwen_image", folders)
    assert len(first) == 6 and second == []


def test_a_callback_changes_the_latents_and_switches_guidance_off(pool: Pool, folders: str) -> None:  # noqa: F811
    assert max(act(pool, habits.guidance_switched_off, "sd3", folders)) <= EXACT


def test_a_generator_for_each_image(pool: Pool, folders: str) -> None:  # noqa: F811
    assert max(act(pool, habits.generators, "sd3", folders)) <= EXACT


@pytest.mark.parametrize("output_type", ["pil", "latent", whole("np"), whole("pt")])
def test_kinds_of_output(pool: Pool, folders: str, output_type: str) -> None:  # noqa: F811
    assert max(act(pool, habits.output, "sd3", folders, output_type)) <= EXACT


@pytest.mark.parametrize("name", [
    name if i % 3 == 0 else whole(name) for i, name in enumerate(habits.SCHEDULERS)])
def test_schedulers_are_swapped_freely(pool: Pool, folders: str, name: str) -> None:  # noqa: F811
    assert max(act(pool, habits.scheduler, "pixart_sigma", folders, name)) <= EXACT


def test_a_flow_scheduler_of_higher_order(pool: Pool, folders: str) -> None:  # noqa: F811
    assert max(act(pool, habits.scheduler, "wan", folders, "UniPCMultistepScheduler")) <= EXACT


def test_other_sizes_prompts_and_steps_one_after_the_other(pool: Pool, folders: str) -> None:  # noqa: F811
    assert all(error <= EXACT for rank in act(pool, habits.called_again, "qwen_image", folders) for error in rank)


@pytest.mark.parametrize(("ranks", "steps"), [((1,), 4), ((0, 1), 3)])
def test_interrupting_stops_all(pool: Pool, folders: str, ranks: tuple[int, ...], steps: int) -> None:  # noqa: F811
    """At once where all are told, as on one device; where one is, when the others have heard of it."""
    assert act(pool, habits.interrupted, "qwen_image", folders, ranks) == [steps, steps]


def test_different_prompts_are_told_before_anything_runs(pool: Pool, folders: str) -> None:  # noqa: F811
    for text, calls, after in act(pool, habits.told_apart, "sd3", folders, "prompt"):
        assert "RankMismatch" in text and "prompt" in text and calls == 0 and after <= EXACT


def test_different_seeds_are_told_before_anything_runs(pool: Pool, folders: str) -> None:  # noqa: F811
    for text, calls, after in act(pool, habits.told_apart, "sd3", folders, "generator"):
        assert "RankMismatch" in text and "generator" in text and calls == 0 and after <= EXACT
    for text, calls, after in act(pool, habits.told_apart, "sd3", folders, "seed"):
        assert "RankMismatch" in text and "torch.manual_seed" in text and calls == 0 and after <= EXACT


def test_a_refused_argument_is_an_error_and_the_next_call_works(pool: Pool, folders: str) -> None:  # noqa: F811
    for text, after in act(pool, habits.refused, "sd3", folders):
        assert text.startswith("ValueError") and after <= EXACT


@pytest.mark.parametrize("name", [whole("sd3"), "qwen_image"])
def test_an_exception_on_one_rank_ends_all_with_that_error(troubled: Pool, folders: str, name: str) -> None:  # noqa: F811
    first, second = act(troubled, habits.failing, name, folders)
    assert first.startswith("RankFailure") and "rank 1" in first and "out of ideas" in first
    assert second.startswith("LookupError") and "out of ideas" in second


def test_bars_on_one_rank_only(pool: Pool, folders: str) -> None:  # noqa: F811
    first, second = act(pool, habits.bars, "sd3", folders)
    assert "100%" in first and second == ""


@pytest.mark.whole
def test_offloading(pool: Pool, folders: str) -> None:  # noqa: F811
    assert max(act(pool, habits.offloaded, "sd3", folders)) <= EXACT


def test_half_precision_as_it_is_loaded(pool: Pool, folders: str) -> None:  # noqa: F811
    for mine, rounding in act(pool, habits.half, "sd3", folders):
        assert mine <= 1.5 * rounding


def test_decorated_functions_and_calls(pool: Pool, folders: str) -> None:  # noqa: F811
    for rank in act(pool, habits.decorated, "sd3", folders):
        assert rank["function"] <= EXACT and rank["method"] <= EXACT and rank["captures"] == 1


def test_an_exchanged_component_is_parallel_too(pool: Pool, folders: str) -> None:  # noqa: F811
    for error, parallel in act(pool, habits.exchanged, "sd3", folders):
        assert error <= EXACT and parallel


def test_the_pipeline_itself_stays_as_it_was(pool: Pool, folders: str) -> None:  # noqa: F811
    assert act(pool, habits.unchanged, "sd3", folders) == [True, True]


@pytest.mark.parametrize(
    ("name", "spec"), [
        ("sd3", "cfg=2,vae=2"), whole("wan", "ulysses=2,vae=2"),
        whole("sana", "cfg=2,vae=2")])
def test_autoencoders_shared_out(pool: Pool, folders: str, name: str, spec: str) -> None:  # noqa: F811
    assert max(act(pool, habits.decoded, name, folders, spec)) <= EXACT


@pytest.mark.whole
def test_pictures_are_encoded_together(pool: Pool, folders: str) -> None:  # noqa: F811
    assert max(act(pool, habits.decoded, "sd3_image", folders, "cfg=2,vae=2")) <= EXACT


@pytest.mark.parametrize("name", ["sdxl", whole("flux_true"), whole("wan")])
def test_encoders_on_one_rank_each(pool: Pool, folders: str, name: str) -> None:  # noqa: F811
    ranks = act(pool, habits.spread, name, folders)
    assert all(error <= EXACT for error, _ in ranks)
    held = [bytes_held for _, bytes_held in ranks]
    whole = held[0][0] + held[1][0]
    assert held[0][1] == held[1][1] == whole, "each weight is on one rank"


@pytest.mark.parametrize("name", ["flux_true", whole("sdxl"), whole("hunyuan_video"), whole("sana"), whole("wan")])
def test_encoders_cut_over_ranks(pool: Pool, folders: str, name: str) -> None:  # noqa: F811
    for found in act(pool, habits.cut, name, folders):
        assert found["same"], "to the bit"
        # What is smaller than 1 kB outside of blocks is on every rank.
        assert found["held"] <= 0.6 * found["all"] and "parameters cut over 2 ranks" in found["report"]
        state, alone, changed = found["said"]
        assert "the first call" in state and "the first call" in changed and "was called by itself" in alone


@pytest.mark.whole
def test_encoders_on_the_meta_device_read_shares(pool: Pool, folders: str) -> None:  # noqa: F811
    for same, held, whole_of in act(pool, habits.cut_from_files, "flux_true", folders):
        assert same and held <= 0.6 * whole_of


def test_words_that_a_pipeline_has_no_part_for(pool: Pool, folders: str) -> None:  # noqa: F811
    for encoders, model, uneven in act(pool, habits.unfit, "dit", folders):
        assert "encoders=spread is for text and image encoders" in encoders
        assert "give parallelize the pipeline" in model
        assert "groups of 3" in uneven


def test_one_process_needs_no_group(folders: str) -> None:  # noqa: F811
    pipelines.folder("qwen_image", Path(folders))
    assert habits.alone_in_the_world("qwen_image", folders) <= EXACT


def test_pipelines_of_blocks(pool: Pool, folders: str) -> None:  # noqa: F811
    for error, fetched in act(pool, habits.modular, "qwen_image", folders):
        assert error <= EXACT and fetched == {2: 6}
