"""A pipeline whose spec is chosen at its first call, from the calls that it makes of its denoiser."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from xdit_compile.driver.parallel_model import instance_of_subclass
from xdit_compile.errors import XditError
from xdit_compile.ir.call_arguments import bind_call, named_leaves
from xdit_compile.ir.step_inputs import timestep_inputs
from xdit_compile.pipelines.components import Role, role_of
from xdit_compile.pipelines.parallel_pipeline import CALLBACKS
from xdit_compile.spec import ShardingSpec

TERMS = 4
"""Calls of one step at most: the terms of guidance."""


@dataclass(frozen=True)
class Observed:
    """The first call that a pipeline makes of the model that runs at each step: how often in a step, and how many
    steps there are; 0 where that is not known."""

    model: nn.Module
    args: Any
    kwargs: Mapping[str, Any]
    calls: int
    steps: int


class AutoPipeline:
    """Marks a pipeline whose spec is still to be chosen."""


class _SeenEnough(BaseException):
    """Ends a pipeline's call; no pipeline catches it."""


def auto_pipeline(pipe: Any, choose: Callable[[Callable[[], Observed]], ShardingSpec],
                  make: Callable[[ShardingSpec], Any]) -> Any:
    """``pipe``, which at its first call becomes what ``make`` makes of it under the spec that ``choose`` gives."""
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = make(choose(lambda: observed(pipe, args, kwargs)))
        object.__dict__["__class__"].__set__(self, type(made))
        object.__setattr__(self, "__dict__", vars(made))
        return self(*args, **kwargs)

    return instance_of_subclass(pipe, AutoPipeline, {"__call__": call}, vars(pipe))


def observed(pipe: Any, args: Any, kwargs: Mapping[str, Any]) -> Observed:
    """What ``pipe``, called like this, calls its denoiser with. It is run until its second step begins, or, where
    weights are not there yet, its first; random numbers are as before.

    Raises:
        XditError: it does not call a denoiser.
    """
    bound = inspect.signature(type(pipe).__call__).bind(pipe, *args, **kwargs)
    bound.apply_defaults()
    steps = bound.arguments.get("num_inference_steps")
    for name in CALLBACKS:
        if name in bound.arguments:
            bound.arguments[name] = None
    seen: list[tuple[nn.Module, Any, Any, str]] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        if seen and module is not seen[0][0]:
            return
        named, _ = named_leaves(bind_call(module, args, kwargs))
        time = str([t.flatten()[:1].tolist() for n, t in named.items() if n in timestep_inputs(named)])
        if seen and (time != seen[0][3] or len(seen) == TERMS):
            raise _SeenEnough
        seen.append((module, args, dict(kwargs), time))
        if any(p.is_meta for p in module.parameters()):
            raise _SeenEnough

    denoisers = [m for m in pipe.components.values() if isinstance(m, nn.Module) and role_of(m) is Role.DENOISER]
    hooks = [m.register_forward_pre_hook(note, with_kwargs=True) for m in denoisers]
    try:
        with _random_as_before(bound.arguments), _no_bar(pipe), torch.no_grad():
            type(pipe).__call__(*bound.args, **bound.kwargs)
    except _SeenEnough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        raise XditError(f"{type(pipe).__name__} makes no call of a model that runs at each step, so that auto has "
                        "nothing to plan; write the spec yourself")
    model, given, named_given, _ = seen[0]
    return Observed(model, given, named_given, len(seen), steps if isinstance(steps, int) else 0)


@contextmanager
def _random_as_before(arguments: Mapping[str, Any]) -> Iterator[None]:
    generators = [g for g in pytree.tree_leaves(dict(arguments)) if isinstance(g, torch.Generator)]
    states = [g.get_state() for g in generators]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)


@contextmanager
def _no_bar(pipe: Any) -> Iterator[None]:
    """Without a progress bar, which would break off."""
    before = getattr(pipe, "_progress_bar_config", None)
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(**{**(before or {}), "disable": True})
    try:
        yield
    finally:
        if before is not None:
            pipe._progress_bar_config = before
        elif hasattr(pipe, "_progress_bar_config"):
            del pipe._progress_bar_config
