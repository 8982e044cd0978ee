"""The calls that a pipeline makes of one of its models, as inputs to export it with."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from xdit_compile.cli.run import Request, agreed, call
from xdit_compile.errors import XditError
from xdit_compile.ir.call_arguments import Inputs, bind_call
from xdit_compile.ir.pytree import flatten
from xdit_compile.pipelines.components import Role, role_of
from xdit_compile.pipelines.loading import load, pictures

PROMPT = "a photo of a red fox in the snow"
"""What is recorded with where no prompt is given."""

SHORT: Mapping[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
"""Arguments with which a pipeline makes each kind of call it makes, and little else."""


class _Enough(Exception):
    """The first call was seen."""


def record(request: Request, component: str | None, first: bool = False) -> tuple[nn.Module, list[Inputs]]:
    """A model of the pipeline that a request names, and the arguments of each kind of call that the pipeline makes of
    it, found by running it for two steps. A prompt or labels that the pipeline needs and the request lacks are made up.

    Args:
        component: which; by default its only denoiser, or the one named transformer or unet.
        first: whether the first call is enough. The model itself does not run then.

    Raises:
        XditError: the pipeline has no such component, or does not call it.
    """
    dtype = torch.float32 if request.dtype == "auto" else getattr(torch, request.dtype)
    pipe = load(request.source, dtype)
    model = _component(pipe, component)
    request = replace(request, arguments=_made_up(type(pipe), request) | dict(request.arguments))
    arguments = agreed(type(pipe), request) | {n: pictures(f) for n, f in request.pictures.items()}
    arguments |= {n: v for n, v in SHORT.items() if n not in request.arguments}
    seen: dict[Any, Inputs] = {}

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        bound = bind_call(module, args, kwargs)
        tensors, structure = flatten((bound.args, bound.kwargs))
        seen.setdefault((structure.key(), tuple((t.shape, t.dtype) for t in tensors)), dict(bound.arguments))
        if first:
            raise _Enough

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad(), suppress(_Enough):
            call(pipe, arguments, request.seed)
    finally:
        handle.remove()
    if not seen:
        raise XditError(f"{type(pipe).__name__} does not call its {type(model).__name__} with these arguments")
    return model, list(seen.values())


def _made_up(pipeline: type, request: Request) -> dict[str, Any]:
    """A prompt, or labels, for a pipeline that takes such and was given none: what shapes a call is their number."""
    taken = inspect.signature(pipeline.__call__).parameters
    made: dict[str, Any] = {}
    if "prompt" in taken and not {n for n in request.arguments if n.startswith("prompt")}:
        made["prompt"] = PROMPT
    for name, parameter in taken.items():
        if parameter.default is parameter.empty and name not in request.arguments and re.search(
                r"\blist\[int\]", str(parameter.annotation), re.IGNORECASE):
            made[name] = [0]
    return made


def _component(pipe: Any, name: str | None) -> nn.Module:
    denoisers = {n: m for n, m in pipe.components.items() if isinstance(m, nn.Module) and role_of(m) is Role.DENOISER}
    if name is None:
        name = next((n for n in ("transformer", "unet") if n in denoisers), None)
        name = next(iter(denoisers)) if name is None and len(denoisers) == 1 else name
    found = pipe.components.get(name)
    if not isinstance(found, nn.Module):
        raise XditError(f"{type(pipe).__name__} has no model {name!r} to export; name one with --component: "
                        f"{', '.join(denoisers) or 'it has none that runs at each step'}")
    return found
