"""Steps that leave blocks out: which, and what comes out, against a loop on one device that is written by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import displaced
import pipelines
import pytest
import step_cache_runs
import torch
import zoo
from cases import basic, made
from emulation import difference
from marks import whole
from plain_step_cache import BLOCKS, FirstBlockCache, Interval, PlainCache, Taylor, TeaCache, thresholds
from pool import Pool
from step_cache_runs import STEPS, loop
from stepwise import Ranks
from torch import Tensor, nn

from xdit_compile import export, parallelize, verify_approximate
from xdit_compile.errors import ArtifactError, CaptureError, SpecError
from xdit_compile.frontend.program_cache import captured, changes_of, find
from xdit_compile.ir.call_arguments import call_arguments
from xdit_compile.ir.pytree import flatten
from xdit_compile.spec import ShardingSpec

EXACT = 1e-5
SPECS = ["cfg=2", "ulysses=2", "ring=2", "tensor=2", "cfg=2,ulysses=2", "ulysses=2,shard=2"]


def plain(entry: displaced.Displaced, model: Any, inputs: dict[str, Any], cache: PlainCache) -> list[Tensor]:
    with torch.no_grad(), cache.on(model):
        return loop(entry, inputs, lambda given: model(**given))


def by_hand(entry: displaced.Displaced, name: str, model: Any, inputs: dict[str, Any],
            kind: type[PlainCache] = FirstBlockCache) -> tuple[PlainCache, list[Tensor]]:
    """A loop on one device that leaves blocks out of some steps but not of all, at no close decision."""
    measured = kind(BLOCKS[name], 0.0)
    plain(entry, model, inputs, measured)
    for threshold in thresholds(measured.changes):
        cache = kind(BLOCKS[name], threshold)
        found = plain(entry, model, inputs, cache)
        if cache.parts_the_steps(STEPS):
            return cache, found
    raise AssertionError("no threshold parts the steps")


@pytest.mark.parametrize("name", [
    whole(n) if n in ("hunyuan_video", "cogvideox", "hunyuan_dit", "ltx") else n for n in BLOCKS])
def test_first_block(name: str) -> None:
    """The same steps leave blocks out on all ranks as on one device, with the same results."""
    spec = SPECS[list(BLOCKS).index(name) % len(SPECS)]
    entry = displaced.MODELS[name]
    model, inputs = made(entry.case), entry.case.inputs(2, False)
    cache, expected = by_hand(entry, name, model, inputs)
    same_as(cache, expected, entry, model, inputs, f"{spec},cache=first_block,threshold={cache.threshold}")


WORDS = ("cache=teacache", "cache=teacache,coefficients=[2, 0.5, 0.01]", "cache=taylor,every=3",
         "cache=interval,every=2")
QUICK = {("dit", WORDS[1]), ("flux", WORDS[2]), ("wan", WORDS[0])}


@pytest.mark.parametrize(("name", "spec", "words"), [
    pytest.param(name, spec, words, marks=[] if (name, words) in QUICK else pytest.mark.whole)
    for name, spec in (("dit", "ulysses=2"), ("flux", "ring=2"), ("wan", "cfg=2,ulysses=2")) for words in WORDS])
def test_other_caches(name: str, spec: str, words: str) -> None:
    """As the papers have them."""
    entry = displaced.MODELS[name]
    model, inputs = made(entry.case), entry.case.inputs(2, False)
    if "teacache" in words:
        kind = type("Rescaled", (TeaCache,), {"polynomial": (2, 0.5, 0.01)}) if "coefficients" in words else TeaCache
        cache, expected = by_hand(entry, name, model, inputs, kind)
        words = f"{words},threshold={cache.threshold}"
    else:
        cache = (Taylor if "taylor" in words else Interval)(BLOCKS[name], every=int(words[-1]))
        expected = plain(entry, model, inputs, cache)
        assert 0 < sum(cache.skipped) < STEPS - 1
    same_as(cache, expected, entry, model, inputs, f"{spec},{words}")


def same_as(cache: PlainCache, expected: list[Tensor], entry: displaced.Displaced, model: Any, inputs: dict[str, Any],
            spec: str) -> None:
    """Ranks in lock-step, against a loop on one device."""
    ranks = Ranks(model, inputs | {"return_dict": False}, spec)
    actual = loop(entry, inputs, lambda given: _same(ranks(given)))
    assert ranks.skipped == [cache.skipped] * ranks.spec.world_size
    assert max(map(difference, actual, expected)) <= EXACT


def _same(results: list[Any]) -> Any:
    assert all(torch.equal(a, b) for r in results for a, b in zip(r, results[0], strict=True))
    return results[0]


GUIDED = {"ulysses=2": ["first_block"], "ring=2,keep=off": ["teacache"]}
COMPILED = {f"{ranks}=2,backend=inductor": list(step_cache_runs.CACHES) for ranks in ("ulysses", "ring")}


@pytest.mark.parametrize("specs", [GUIDED, whole(COMPILED)], ids=["as they are", "compiled"])
def test_conditions_have_their_own(pool: Pool, specs: dict[str, list[str]]) -> None:
    """Real ranks, a model that is called twice in each step, loops that follow each other. Compilers are at work while
    the first step is under way, and Python imports."""
    for found in pool.run(step_cache_runs.guided, specs, ranks=range(2), timeout=300):
        for words, one in found.items():
            assert all(0 < sum(s) < STEPS - 1 for s in one["plain"])
            assert one["error"] <= EXACT, words
            assert (one["skipped"], one["decided"]) == (2 * sum(map(sum, one["plain"])), 4 * STEPS)


def test_what_ends_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that a package has got another name, as an import in the middle of a loop gives it; a new parameter does."""
    case = zoo.CASES["dit"]
    model = made(case)
    arguments = call_arguments(model, case.inputs(1, False))
    program = captured(model, *arguments)
    monkeypatch.setattr(torch, "imported_meanwhile", object(), raising=False)
    assert find(model, *arguments) is program and changes_of(model) == 0
    model.proj_out_1.weight = torch.nn.Parameter(model.proj_out_1.weight.detach().clone())
    assert find(model, *arguments) is program and changes_of(model) == 1


def test_ranks_end_loops_together(pool: Pool) -> None:
    """One that has changed its model is told, and none waits for it."""
    for found in pool.run(step_cache_runs.changed_on_one, ranks=range(2), timeout=100):
        assert "RankMismatch" in found and "other than at the last call" in found


def test_pictures(pool: Pool) -> None:
    """Of the trained example: like those of one device, and the more alike, the fewer steps leave blocks out."""
    specs = [f"cfg=2,cache={c}" for c in ("first_block,threshold=0.05", "first_block,threshold=0.3", "taylor,every=2",
                                          "interval,every=4", "teacache,threshold=0.5")]
    first, second = pool.run(step_cache_runs.images, specs, 20, ranks=range(2), timeout=300)
    for spec in specs:
        assert first[spec]["skipped"] == second[spec]["skipped"] and first[spec]["decided"] == 20
        assert first[spec]["psnr"] > 18, (spec, first[spec]["psnr"])
    little, much, taylor, interval, tea = (first[s] for s in specs)
    assert little["skipped"] < much["skipped"] and little["psnr"] > much["psnr"]
    assert taylor["skipped"] == 10 and interval["skipped"] == 15 and 0 < tea["skipped"] < 19
    text = " ".join(much["report"].split())
    assert f"{much['skipped']} of 20 steps left blocks out" in text and "approximate by cache=first_block" in text


def test_guidance_in_turns(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Each group keeps what its own calls have left."""
    root = tmp_path_factory.mktemp("wan")
    pipelines.folder("wan", root)  # before ranks do, of which one writes
    for found in pool.run(step_cache_runs.in_turns, str(root), "cfg=2", ranks=range(2), timeout=300):
        assert found["error"] <= EXACT
        skipped, decided = found["alone"]
        assert skipped > 0 and found["skipped"] == (skipped // 2, decided // 2)


@pytest.mark.parametrize(("words", "complaint"), [
    ("pipefusion=2,cache=first_block", "do not go together"),
    ("cache=second_block", "cache must be one of none, first_block"),
    ("threshold=0.3", "threshold has no effect with cache=none"),
    ("cache=interval,every=1", "every is a whole number of at least 2"),
    ("cache=teacache,coefficients=[1, true]", "coefficients are a list of numbers"),
    ("cache=first_block,threshold=-1", "threshold is a number of at least 0"),
])  # fmt: skip
def test_words_that_do_not_fit(words: str, complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint):
        ShardingSpec.parse(words)


def test_models_without_a_run_of_blocks() -> None:
    """Refused by name."""
    case = zoo.CASES["causal"]
    with pytest.raises(SpecError, match="is no step of a loop"):
        Ranks(made(case), case.inputs(1, False), "cache=first_block")


def _weight(model: Any) -> Tensor:
    return model.transformer_blocks[-1].ff.net[2].weight


EDITS: dict[str, Callable[[Any], Any]] = {
    "a weight": lambda m: _weight(m).mul_(2),
    "a new weight": lambda m: setattr(m.transformer_blocks[-1].ff.net[2], "weight", nn.Parameter(
        2 * _weight(m), requires_grad=False)),
    "all weights of a block": lambda m: m.transformer_blocks[-1].load_state_dict(
        {n: 1.5 * t for n, t in m.transformer_blocks[-1].state_dict().items()}),
    "an attribute": lambda m: setattr(m.transformer_blocks[-1].norm3, "eps", 1.0),
    "a hook": lambda m: m.transformer_blocks[-1].ff.register_forward_hook(lambda module, args, out: 2 * out),
    "a block less": lambda m: m.transformer_blocks.__delitem__(-1),
}


@torch.no_grad()
@pytest.mark.parametrize("words", ["interval,every=9", whole("taylor,every=9"), whole("first_block,threshold=1000"),
                                   whole("teacache,threshold=1000")])
def test_edits_in_the_middle_of_a_loop_are_seen(words: str) -> None:
    """The step after an edit uses nothing of those before, and the next ones use that."""
    entry = displaced.MODELS["dit"]
    inputs = entry.case.inputs(2, False)
    model = parallelize(plain := made(entry.case), f"cache={words}")
    for i, time in enumerate(displaced.times(inputs, 2 * len(EDITS) + 2)):
        if i % 2 == 0 and i:
            [*EDITS.values()][i // 2 - 1](plain)
        given = inputs | {entry.layout.sample: inputs[entry.layout.sample] * (1 - 0.01 * i), "timestep": time}
        error = difference(model(**given, return_dict=False)[0], plain(**given, return_dict=False)[0])
        assert (error < EXACT) == (i % 2 == 0), (["at first", *EDITS][i // 2], i % 2, error)


def test_how_far_a_loop_ends() -> None:
    """``verify --approximate``, against the same loop by hand."""
    entry = displaced.MODELS["dit"]
    model, inputs = made(entry.case), entry.case.inputs(2, False)
    found = verify_approximate(model, "cache=interval,every=2", inputs, steps=4)
    assert [s.skipped for s in found.steps] == [False, True, False, True] and found.skipped == 2
    assert found.steps[0].relative < 1e-5 < 1e-4 < found.steps[1].relative < 1 and 10 < found.psnr < 80 and found.ok
    assert "2 steps left blocks out" in found.summary() and "approximate by cache=interval" in found.summary()
    exact = verify_approximate(model, "cache=interval,every=2,warmup=all", inputs, steps=4)
    assert exact.psnr > 100 and exact.skipped == 0


def test_artifacts_and_hooks_are_refused(tmp_path: Path) -> None:
    """By name: programs that keep values from step to step, and hooks that do."""
    from diffusers import FirstBlockCacheConfig

    entry = displaced.MODELS["flux"]
    model, inputs = made(entry.case), entry.case.inputs(1, False)
    for words in ("cache=first_block", "ulysses=2,displaced=yes"):
        with pytest.raises(ArtifactError, match="leave cache and displaced out"):
            export(model, words, inputs, tmp_path / "made.xdit")
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(CaptureError, match="give cache=first_block"):
        Ranks(model, inputs, "cache=first_block")


REFUSED = {"fused", "reference", "causal", "dual_transformer2d", "dreamlite", "minimax_depth", "temporal", "proteina"}
"""Without two blocks that add to one stream, or without a time."""
CACHED = [n for n in basic(zoo.CASES) if n not in REFUSED]


def chosen() -> list[Any]:
    """All of the zoo, of which a quick run takes every twelfth."""
    return [pytest.param(n, id=n, marks=[] if i % 12 == 5 and n not in BLOCKS else pytest.mark.whole)
            for i, n in enumerate(CACHED)]


def test_most_classes_are_covered() -> None:
    assert len(CACHED) >= 60


@pytest.mark.parametrize("name", chosen())
def test_the_zoo(name: str) -> None:
    """Whatever class: with all steps computed the numbers of one device; a repeated step leaves blocks out on all
    ranks, and comes out the same."""
    case = zoo.CASES[name]
    model, inputs = made(case), case.inputs(2, False)
    with torch.no_grad():
        expected = flatten(model(**inputs))[0]
    ranks = Ranks(model, inputs, "ulysses=2,cache=first_block,threshold=1e-3")
    for skips in (False, True):
        for result in ranks(inputs):
            assert max(map(difference, flatten(result)[0], expected)) <= case.tolerance
        assert [s[-1] for s in ranks.skipped] == [skips] * 2
    assert len(ranks.cut.left_out) >= 1
