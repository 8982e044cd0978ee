"""What ranks do with models and pipelines whose steps may leave blocks out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import displaced
import pipelines
import torch
from cases import made, randn
from emulation import difference
from plain_step_cache import BLOCKS, FirstBlockCache, Interval, PlainCache, Taylor, TeaCache, thresholds
from torch import Tensor

import xdit_compile
from xdit_compile.errors import XditError

STEPS = 8


def moved(sample: Tensor, out: Tensor, i: int) -> Tensor:
    """The sample of the next step: a little farther at most of them, and far at every third."""
    noise = randn(100 + i, *sample.shape)
    return displaced.euler(sample, 0.02 * out, i) + (0.5 if i % 3 == 2 else 0.01) * noise


def loop(entry: displaced.Displaced, inputs: dict[str, Any], *calls: Any) -> list[Tensor]:
    """The outputs of each step, of each of the calls that a step makes."""
    sample, found = inputs[entry.layout.sample], []
    for i, time in enumerate(displaced.times(inputs, STEPS)):
        outs = [call(inputs | {entry.layout.sample: sample, "timestep": time, "return_dict": False})[0]
                for call in calls]
        found += outs
        sample = moved(sample, sum(outs) / len(outs), i)
    return found


CACHES: dict[str, Callable[[float], PlainCache]] = {
    "first_block": lambda threshold: FirstBlockCache(BLOCKS["wan"], threshold),
    "teacache": lambda threshold: TeaCache(BLOCKS["wan"], threshold),
    "taylor": lambda _: Taylor(BLOCKS["wan"], every=3),
    "interval": lambda _: Interval(BLOCKS["wan"], every=2),
}


def guided(specs: dict[str, list[str]]) -> dict[str, Any]:
    """A loop that calls its model with a prompt and without, twice over: by spec, to each of which are given some
    caches, the largest difference to the loop by hand, which steps that left out, and how many were left out."""
    entry = displaced.MODELS["wan"]
    model, inputs = made(entry.case), entry.case.inputs(2, False)
    without = inputs | {"encoder_hidden_states": 0.3 * inputs["encoder_hidden_states"]}

    def through(model: Any, more: dict[str, Any], cache: PlainCache | None = None) -> Any:
        def call(given: dict[str, Any]) -> Any:
            with torch.no_grad(), nullcontext() if cache is None else cache.on(model):
                return model(**given | {"encoder_hidden_states": more["encoder_hidden_states"]})

        return call

    def by_hand(cache: str, threshold: float) -> tuple[list[PlainCache], list[Tensor]]:
        caches = [CACHES[cache](threshold) for _ in range(2)]
        return caches, loop(entry, inputs, *(through(model, m, c) for m, c in zip(
            (inputs, without), caches, strict=True)))

    found: dict[str, Any] = {}
    for spec, kinds in specs.items():
        for kind in kinds:
            words = f"{spec},cache={kind}"
            if kind in ("first_block", "teacache"):
                for threshold in thresholds([c for cache in by_hand(kind, 0.0)[0] for c in cache.changes]):
                    caches, expected = by_hand(kind, threshold)
                    if all(c.parts_the_steps(STEPS) for c in caches):
                        break
                words += f",threshold={threshold}"
            else:
                caches, expected = by_hand(kind, 0.0)
                words += f",every={caches[0].every}"
            parallel = xdit_compile.parallelize(model, words, ranks=range(2), timeout=100)
            error = 0.0
            for _ in range(2):  # nothing of one loop is met by the next
                actual = loop(entry, inputs, through(parallel, inputs), through(parallel, without))
                error = max(error, *map(difference, actual, expected))
            counts = parallel.runners["forward"].group.counts
            found[words] = {"error": error, "plain": [c.skipped for c in caches], "skipped": counts["skipped"],
                            "decided": counts["decided"]}
    return found


def changed_on_one() -> str:
    """What a loop ends with in whose middle rank 0 alone gets another parameter, of equal values."""
    entry = displaced.MODELS["dit"]
    model, inputs = made(entry.case), entry.case.inputs(1, False)
    parallel = xdit_compile.parallelize(model, "ulysses=2,cache=interval,every=2", ranks=range(2), timeout=20)
    calls = 0

    def call(given: dict[str, Any]) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 and torch.distributed.get_rank() == 0:
            model.proj_out_1.weight = torch.nn.Parameter(model.proj_out_1.weight.detach().clone())
        with torch.no_grad():
            return parallel(**given)

    try:
        loop(entry, inputs, call)
    except XditError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def images(specs: list[str], steps: int) -> dict[str, Any]:
    """By spec, PSNR in dB of the trained example's images to those of one device, how many steps left blocks out, and
    the report."""
    from diffusers import DiTPipeline

    folder = Path(__file__).parents[1] / "examples" / "shapes" / "model"

    def drawn(pipe: Any) -> Tensor:
        pipe.set_progress_bar_config(disable=True)
        labels = pipe.get_label_ids(["red circle", "blue square", "green star"])
        return torch.from_numpy(pipe(labels, guidance_scale=4.0, num_inference_steps=steps, output_type="np",
                                     generator=torch.Generator().manual_seed(7)).images)

    expected, found = drawn(DiTPipeline.from_pretrained(folder)), {}
    for spec in specs:
        world = xdit_compile.ShardingSpec.parse(spec).world_size
        if torch.distributed.get_rank() < world:
            pipe = xdit_compile.parallelize(DiTPipeline.from_pretrained(folder), spec, ranks=range(world), timeout=100)
            error = (drawn(pipe) - expected).square().mean()
            report = pipe.report()
            found[spec] = {"psnr": -10 * torch.log10(error.clamp_min(1e-20)).item(), "skipped": report.skipped,
                           "decided": report.decided, "report": str(report)}
    return found


def in_turns(root: str, spec: str) -> dict[str, Any]:
    """A pipeline that calls its model twice in each step: what each group left out, and the difference to one rank."""
    case, path = pipelines.PIPELINES["wan"], pipelines.folder("wan", Path(root))
    words = "cache=interval,every=2"
    alone = xdit_compile.parallelize(pipelines.load(path), words, ranks=[torch.distributed.get_rank()], timeout=100)
    expected = pipelines.run(alone, case)
    pipe = xdit_compile.parallelize(pipelines.load(path), f"{spec},{words}", ranks=range(2), timeout=100)
    actual = pipelines.run(pipe, case)
    one, two = alone.report(), pipe.report()
    return {"error": difference(actual, expected), "alone": (one.skipped, one.decided),
            "skipped": (two.skipped, two.decided)}
