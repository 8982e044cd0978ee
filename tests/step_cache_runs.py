"""What ranks do with models and pipelines whose steps may leave blocks out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import displaced
import pipelines
import torch
from cases import made, randn
from emulation import difference
from plain_step_cache import BLOCKS, FirstBlockCache
from torch import Tensor

import xdit_compile

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


def guided(name: str, specs: list[str]) -> dict[str, Any]:
    """A loop that calls its model with a prompt and without, twice over: by spec, the largest difference to the loop
    by hand, and which steps left blocks out."""
    entry = displaced.MODELS[name]
    model, inputs = made(entry.case), entry.case.inputs(2, False)
    without = inputs | {"encoder_hidden_states": 0.3 * inputs["encoder_hidden_states"]}
    def plain(cache: FirstBlockCache, more: dict[str, Any]) -> Any:
        def call(given: dict[str, Any]) -> Any:
            with torch.no_grad(), cache.on(model):
                return model(**given | {n: more[n] for n in ("encoder_hidden_states",)})

        return call

    def by_hand(threshold: float) -> tuple[list[FirstBlockCache], list[Tensor]]:
        caches = [FirstBlockCache(BLOCKS[name], threshold) for _ in range(2)]
        return caches, loop(entry, inputs, plain(caches[0], inputs), plain(caches[1], without))

    low, *_, high = sorted(c for cache in by_hand(0.0)[0] for c in cache.changes)
    for part in (0.5, 0.7, 0.3, 0.85, 0.15, 1.2):
        threshold = low + (high - low) * part
        caches, expected = by_hand(threshold)
        if all(0 < sum(c.skipped) < STEPS - 1 for c in caches) and all(
                abs(x / threshold - 1) > 1e-3 for c in caches for x in c.changes):
            break
    found: dict[str, Any] = {"plain": [c.skipped for c in caches]}
    for spec in specs:
        world = xdit_compile.ShardingSpec.parse(spec).world_size
        if torch.distributed.get_rank() >= world:
            continue
        parallel = xdit_compile.parallelize(model, f"{spec},cache=first_block,threshold={threshold}",
                                            ranks=range(world), timeout=100)

        def call(more: dict[str, Any], parallel: Any = parallel) -> Any:
            def run(given: dict[str, Any]) -> Any:
                with torch.no_grad():
                    return parallel(**given | {"encoder_hidden_states": more["encoder_hidden_states"]})

            return run

        error = 0.0
        for _ in range(2):  # nothing of one loop is met by the next
            actual = loop(entry, inputs, call(inputs), call(without))
            error = max(error, *map(difference, actual, expected))
        counts = parallel.runners["forward"].group.counts
        found[spec] = {"error": error, "skipped": counts["skipped"], "decided": counts["decided"]}
    return found


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
