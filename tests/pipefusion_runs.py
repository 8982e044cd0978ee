"""What the workers of the pool run for PipeFusion: denoising loops, against the plain emulation in ``displaced.py``."""

from __future__ import annotations

import copy
from typing import Any

import cases
import displaced
import torch
from emulation import difference
from torch import Tensor

import xdit_compile
from xdit_compile.runtime.deferred import concrete


def loop(model: Any, entry: displaced.Displaced, inputs: dict[str, Any], steps: int) -> Tensor:
    """The sample after so many steps, as an unmodified pipeline would make it."""
    sample = inputs[entry.layout.sample]
    for i, time in enumerate(displaced.times(inputs, steps)):
        with torch.no_grad():
            out = model(**inputs | {entry.layout.sample: sample, "timestep": time, "return_dict": False})[0]
        sample = displaced.euler(sample, out, i)
    return sample


def displaced_errors(name: str, batch: int, odd: bool, specs: list[str], steps: int = 8) -> dict[str, Any]:
    """By spec: the largest difference of the sample to the emulation's over the largest value, to that of one device,
    and how the sample was cut. Specs of fewer processes than take part are run by the first ranks."""
    entry = displaced.MODELS[name]
    inputs = entry.case.inputs(batch, odd)
    exact: Tensor | None = None
    found: dict[str, Any] = {}
    for text in specs:
        spec = xdit_compile.ShardingSpec.parse(text)
        if torch.distributed.get_rank() >= spec.world_size:
            continue
        model = cases.made(entry.case)
        if exact is None:
            exact = loop(model, entry, inputs, steps)
        parallel = xdit_compile.parallelize(copy.deepcopy(model), text, ranks=range(spec.world_size), timeout=300)
        actual = concrete(loop(parallel, entry, inputs, steps))
        (ready,) = parallel.runners["forward"].programs.values()
        flow = ready.executor
        wanted, cut = exact, None
        if spec.warmup_steps != "all" and spec.patches > 1:
            (cut,) = flow.stage.samples.values()
            wanted, _ = displaced.denoise(
                model, inputs, entry.layout, displaced.times(inputs, steps), displaced.euler,
                offsets=list(cut.borders), dim=actual.ndim + cut.dim, warmup=int(spec.warmup_steps))
        found[text] = {"error": difference(actual, wanted), "exact": difference(actual, exact), "cut": cut,
                       "drained": flow.drained, "sent": flow.stream.sent}
    return found
