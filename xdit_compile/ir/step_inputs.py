"""Which arguments of a denoiser change from step to step: its sample, and the time."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from xdit_compile.ir.call_arguments import bind_call, named_leaves

TIMES = frozenset({"timestep", "timesteps", "time_step", "t", "sigma", "sigmas", "noise_level", "noise_labels"})
"""Names that the time of a diffusion process goes by among the arguments of a forward."""


def timestep_inputs(named: Mapping[str, torch.Tensor]) -> Collection[str]:
    """By their names, as labels are numbers too; where there is none of these names, all that is no feature."""
    return TIMES & named.keys() or {n for n, t in named.items() if t.ndim < 2}


def condition_among(named: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
    """Which tensors a call is made with beside its times and its sample, by identity."""
    return tuple(id(t) for t in condition(named).values())


def condition(named: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a call is made with beside its times and its sample."""
    times = timestep_inputs(named)
    sample = next((_head(n) for n, t in named.items() if t.ndim > 2 and n not in times), None)
    return {n: t for n, t in named.items() if n not in times and _head(n) != sample}


PROBE = "probe_before"
"""The input of a part of a step that the features come as by which it is compared with a step before."""


def step_inputs(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[int, str]:
    """The names of what changes, by its place among the tensors of the call: the times, and the first feature with all
    that comes in the same list or dictionary. Nothing where there is no time: such a call is no step of a loop."""
    named, _ = named_leaves(bind_call(model, args, kwargs))
    times = timestep_inputs(named)
    sample = next((_head(n) for n, t in named.items() if t.ndim > 2 and n not in times), None)
    if not times or sample is None:
        return {}
    return {i: n for i, n in enumerate(named) if n in times or _head(n) == sample}


def _head(name: str) -> str:
    """The argument that a tensor is, or is in: ``rotary`` of ``rotary[0]``."""
    return re.split(r"[\[.]", name)[0]
