"""The calls that a pipeline makes of one of its models, as inputs to export it with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from xdit_compile.cli.run import Request, agreed, call
from xdit_compile.errors import XditError
from xdit_compile.ir.call_arguments import Inputs, bind_call
from xdit_compile.ir.pytree import flatten
from xdit_compile.pipelines.components import Role, role_of
from xdit_compile.pipelines.loading import load

SHORT: Mapping[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
"""Arguments with which a pipeline makes each kind of call it makes, and little else."""


def record(request: Request, component: str | None) -> tuple[nn.Module, list[Inputs]]:
    """A model of the pipeline that a request names, and the arguments of each kind of call that the pipeline makes of
    it, found by running it for two steps.

    Args:
        component: which; by default its only denoiser, or the one named transformer or unet.

    Raises:
        XditError: the pipeline has no such component, or does not call it.
    """
    dtype = torch.float32 if request.dtype == "auto" else getattr(torch, request.dtype)
    pipe = load(request.source, dtype)
    model = _component(pipe, component)
    arguments = agreed(type(pipe), request)
    arguments |= {n: v for n, v in SHORT.items() if n not in request.arguments}
    seen: dict[Any, Inputs] = {}

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        bound = bind_call(module, args, kwargs)
        tensors, structure = flatten((bound.args, bound.kwargs))
        seen.setdefault((structure.key(), tuple((t.shape, t.dtype) for t in tensors)), dict(bound.arguments))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            call(pipe, arguments, request.seed)
    finally:
        handle.remove()
    if not seen:
        raise XditError(f"{type(pipe).__name__} does not call its {type(model).__name__} with these arguments")
    return model, list(seen.values())


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
