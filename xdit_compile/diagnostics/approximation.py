"""How far a model under a spec that approximates is from itself on one device, over a denoising loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import RenderableType
from rich.text import Text
from torch import nn
from torch.utils import _pytree as pytree

from xdit_compile.api import parallelize
from xdit_compile.errors import XditError
from xdit_compile.ir.call_arguments import Inputs, bind_call, call_arguments, named_leaves
from xdit_compile.ir.pytree import flatten
from xdit_compile.ir.step_inputs import step_inputs, timestep_inputs
from xdit_compile.report.tables import sections, table
from xdit_compile.report.text import jsonable, plain
from xdit_compile.report.units import plural
from xdit_compile.runtime.deferred.deferred_tensor import materialize
from xdit_compile.spec import ShardingSpec


@dataclass(frozen=True)
class StepDifference:
    """One step of the loop: how far the model's result is from that of one device, relative to its norm, and whether
    the step left blocks out."""

    relative: float
    skipped: bool


@dataclass(frozen=True)
class Approximation:
    """What an approximate loop gives; the same on every rank.

    Attributes:
        steps: one by one. Each loop goes its own way: a difference at one step is met by the next.
        psnr: of the sample after the last step against that of one device, in dB, over the range of its values;
            ``relative``: the norm of their difference over its norm.
        skipped: steps that left blocks out; late: steps in which ranks had of others what these had a step before.
    """

    model: str
    spec: ShardingSpec
    steps: tuple[StepDifference, ...]
    psnr: float
    relative: float
    skipped: int = 0
    late: int = 0

    @property
    def ok(self) -> bool:
        """Whether there is something to be compared at all: numbers on both sides."""
        return math.isfinite(self.relative)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as what JSON can say."""
        return jsonable(self) | {"spec": str(self.spec), "approximate": self.spec.approximate, "ok": self.ok}

    def summary(self) -> str:
        """One line."""
        how = self.spec.approximate or "nothing, all steps are exact"
        done = [f"{plural(n, 'step')} {what}" for n, what in (
            (self.skipped, "left blocks out"), (self.late, "read values of the step before")) if n]
        return (f"{self.model} under {self.spec}, approximate by {how}: after {plural(len(self.steps), 'step')} the "
                f"sample is {self.psnr:.1f} dB (PSNR), {self.relative:.2g} relative, from one device's"
                + (f"; {' and '.join(done)}" if done else ""))

    def __rich__(self) -> RenderableType:
        rows = table("Steps", ">step", ">relative difference", "")
        for i, step in enumerate(self.steps, 1):
            rows.add_row(str(i), f"{step.relative:.3g}", "blocks left out" if step.skipped else "")
        return sections(Text(self.summary()), rows)

    def __str__(self) -> str:
        return plain(self)


def verify_approximate(model: nn.Module, spec: str | Mapping[str, object] | ShardingSpec, inputs: Inputs, *,
                       steps: int = 20, ranks: Sequence[int] | None = None) -> Approximation:
    """Run a denoising loop of ``model`` on one device and in parallel, from the same inputs, and say how far apart
    they end. Every rank calls this alike.

    From step to step times fall evenly from those in ``inputs``, and a part of the result is taken off the sample
    (Euler's method), where it is shaped like the sample.

    Raises:
        XditError: the call has no time and no sample, or one of what ``parallelize`` and its calls raise.
    """
    bound = bind_call(model, *call_arguments(model, inputs))
    args, kwargs = bound.args, bound.kwargs
    named, _ = named_leaves(bound)
    tensors, _ = flatten((args, kwargs))
    changing = step_inputs(model, args, kwargs)
    times = {i for i, name in changing.items() if name in timestep_inputs(named)}
    samples = [i for i in changing if i not in times]
    if not times or not samples:
        raise XditError(f"a call of {type(model).__name__} with {', '.join(named)} is no step of a denoising loop: "
                        "it needs a sample and a time")

    def loop(call: Any) -> tuple[list[torch.Tensor], torch.Tensor, list[bool]]:
        own, outs, skipped = [t.clone() for t in tensors], list[torch.Tensor](), list[bool]()
        counts = call.runners["forward"].group.counts if hasattr(call, "runners") else {"skipped": 0}
        for step in range(steps):
            for i in times:
                left = tensors[i] * (1 - step / steps)
                own[i] = left if left.is_floating_point() else left.round()
                own[i] = own[i].to(tensors[i].dtype)
            before = counts["skipped"]
            given = pytree.tree_map_only(torch.Tensor, _following(own), (args, kwargs))
            out = flatten(materialize(call(*given[0], **given[1])))[0][0]
            outs.append(out.float())
            skipped.append(counts["skipped"] > before)
            if out.ndim == own[samples[0]].ndim and all(n >= m for n, m in zip(out.shape, own[samples[0]].shape,
                                                                              strict=True)):
                whole = own[samples[0]]
                own[samples[0]] = whole - out[tuple(slice(0, n) for n in whole.shape)].to(whole.dtype) / steps
        return outs, own[samples[0]].float(), skipped

    parallel = parallelize(model, ShardingSpec.parse(spec), ranks=ranks)
    with torch.no_grad():
        expected, end, _ = loop(model)
        actual, other, skipped = loop(parallel)
    group = parallel.runners["forward"].group
    found = group.gather("differences", [_relative(a, b) for a, b in zip(actual, expected, strict=True)])
    error, span = (other - end).square().mean().item(), (end.max() - end.min()).item()
    psnr = 10 * math.log10(max(span, 1e-30) ** 2 / max(error, 1e-30))
    return Approximation(
        type(model).__name__, group.spec,
        tuple(StepDifference(max(each), left) for each, left in zip(zip(*found, strict=True), skipped, strict=True)),
        min(group.gather("likeness", psnr)), max(group.gather("differences", _relative(other, end))), sum(skipped),
        group.counts["displaced"])


def _following(tensors: Sequence[torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """One after the other, in place of what it is given."""
    left = iter(tensors)
    return lambda _: next(left)


def _relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()
