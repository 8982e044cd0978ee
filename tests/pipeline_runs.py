"""What ranks do with a test pipeline: run it as it is and in parallel, and compare."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pipelines
import torch
from emulation import difference

import xdit_compile


def differences(name: str, root: str, specs: Sequence[str], copies: int = 1, **overrides: Any) -> dict[str, Any]:
    """By spec, the largest difference to one process over the largest value, and what was said and counted.

    Args:
        copies: how many images or videos of each prompt.
    """
    case, path = pipelines.PIPELINES[name], pipelines.folder(name, Path(root))
    alone = pipelines.load(path)
    overrides |= several(alone, case, copies)
    expected = pipelines.run(alone, case, **overrides)
    found: dict[str, dict[str, Any]] = {}
    for spec in specs:
        world = xdit_compile.ShardingSpec.parse(spec).world_size
        if torch.distributed.get_rank() >= world:
            continue
        pipe = xdit_compile.parallelize(pipelines.load(path), spec, ranks=range(world), timeout=100)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UserWarning)
            actual = pipelines.run(pipe, case, **overrides)
        assert type(actual) is torch.Tensor
        found[spec] = {"error": difference(actual, expected), "warnings": [str(w.message) for w in said],
                       "fetched": dict(robin.fetched) if (robin := pipe.parallel_group.round_robin) else {}}
    return found


def several(pipe: Any, case: pipelines.PipelineCase, copies: int) -> dict[str, Any]:
    """Arguments that ask for so many of each."""
    if copies == 1:
        return {}
    call = case.call()
    if "class_labels" in call:
        return {"class_labels": call["class_labels"] * copies}
    (name,) = (p for p in inspect.signature(type(pipe).__call__).parameters if p.endswith("_per_prompt"))
    return {name: copies}


def shapes(specs: Sequence[str], steps: int) -> dict[str, float]:
    """By spec, the PSNR in dB of the trained example's images against those of one process, and the report's text."""
    from diffusers import DiTPipeline

    folder = Path(__file__).parents[1] / "examples" / "shapes" / "model"

    def images(pipe: Any) -> torch.Tensor:
        labels = pipe.get_label_ids(["red circle", "blue square", "green star"])
        made = pipe(labels, guidance_scale=4.0, num_inference_steps=steps, output_type="np",
                    generator=torch.Generator().manual_seed(7)).images
        return torch.from_numpy(made)

    expected, found = images(DiTPipeline.from_pretrained(folder)), {}
    for spec in specs:
        world = xdit_compile.ShardingSpec.parse(spec).world_size
        if torch.distributed.get_rank() < world:
            pipe = xdit_compile.parallelize(DiTPipeline.from_pretrained(folder), spec, ranks=range(world), timeout=100)
            error = (images(pipe) - expected).square().mean()
            found[spec] = -10 * torch.log10(error.clamp_min(1e-20)).item()
    return found


def reported(name: str, root: str, spec: str) -> dict[str, Any]:
    """What a pipeline says of itself after a call."""
    case, path = pipelines.PIPELINES[name], pipelines.folder(name, Path(root))
    world = xdit_compile.ShardingSpec.parse(spec).world_size
    pipe = xdit_compile.parallelize(pipelines.load(path), spec, ranks=range(world), timeout=100)
    pipelines.run(pipe, case, output_type="pt")
    assert type(pipe).__name__ in str(pipe.report())
    return pipe.report().to_dict()
