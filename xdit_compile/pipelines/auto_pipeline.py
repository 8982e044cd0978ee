"""A pipeline whose spec is chosen at its first call, from the calls that it makes of its denoiser."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.utils import _pytree as pytree

from xdit_compile.driver.parallel_model import instance_of_subclass
from xdit_compile.errors import XditError
from xdit_compile.frontend.method_module import as_module
from xdit_compile.ir.beside import ALONE, Beside
from xdit_compile.ir.call_arguments import Call, bind_call, named_leaves
from xdit_compile.ir.step_inputs import timestep_inputs
from xdit_compile.pipelines.beside import EncoderCalls, beside
from xdit_compile.pipelines.components import Role, role_of
from xdit_compile.pipelines.parallel_pipeline import CALLBACKS
from xdit_compile.spec import ShardingSpec

log = logging.getLogger(__name__)

TERMS = 4
"""Calls of one step at most: the terms of guidance."""
_COMPILED = "_compiled_call_impl"
"""Where ``nn.Module.compile`` puts what is called in the place of ``forward``."""


@dataclass(frozen=True)
class Observed:
    """The first call that a pipeline makes of the model that runs at each step.

    Attributes:
        calls: how often in a step; steps: how many there are; 0 where that is not known.
        decoding: what it gives its autoencoder in the end; None if it has none, or does not come to it.
        beside: what other components keep on the device.
    """

    call: Call
    calls: int
    steps: int
    decoding: Call | None
    beside: Beside = ALONE


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
    """What ``pipe``, called like this, calls its denoiser with, and its autoencoder. One step is run; in all later ones
    a model gives what it gave for arguments of such shapes. Where weights are not there yet, none is. Random numbers
    are as before.

    Raises:
        XditError: it does not call a denoiser.
    """
    bound = inspect.signature(type(pipe).__call__).bind(pipe, *args, **kwargs)
    bound.apply_defaults()
    steps = bound.arguments.get("num_inference_steps")
    for name in CALLBACKS:
        if name in bound.arguments:
            bound.arguments[name] = None
    first, encoders = _FirstStep(), EncoderCalls()
    with ExitStack() as stack:
        stack.enter_context(encoders.watched(m for m in pipe.components.values() if isinstance(m, nn.Module)))
        for module in pipe.components.values():
            if isinstance(module, nn.Module) and role_of(module) is Role.DENOISER:
                stack.enter_context(_instead(module, "forward", first.call(module)))
            elif isinstance(module, nn.Module) and role_of(module) is Role.AUTOENCODER:
                stack.enter_context(_instead(module, "decode", first.decode(module)))
        stack.enter_context(_random_as_before(bound.arguments))
        stack.enter_context(_no_bar(pipe))
        stack.enter_context(torch.no_grad())
        try:
            type(pipe).__call__(*bound.args, **bound.kwargs)
        except _SeenEnough:
            pass
        except Exception as error:
            if not first.ended:
                raise
            # Of later steps, whose values mean nothing. What it gives its autoencoder is not known then.
            log.info("%s did not come to its autoencoder by results of one step: %s", type(pipe).__name__, error)
    if not first.calls:
        raise XditError(f"{type(pipe).__name__} makes no call of a model that runs at each step, so that auto has "
                        "nothing to plan; write the spec yourself")
    return Observed(first.calls[0], len(first.calls), steps if isinstance(steps, int) else 0, first.decoding,
                    beside(pipe, first.calls[0], encoders))


class _FirstStep:
    """Calls that models get in the first step of a loop, and what they give, which they give again in later ones.

    Attributes:
        calls: of the model that is called first; ended: whether there is a second step.
        decoding: what comes after the loop.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.ended = False
        self.decoding: Call | None = None
        self._time = ""

    def call(self, module: nn.Module) -> Callable[..., Any]:
        """In the place of the module's forward."""
        forward, results = module.forward, dict[Hashable, Any]()

        @functools.wraps(forward)  # signature and all
        def called(*args: Any, **kwargs: Any) -> Any:
            self._note(module, args, kwargs)
            looks = tuple((a.shape, a.dtype) for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor))
            if not self.ended or looks not in results:
                results[looks] = forward(*args, **kwargs)
            return results[looks]

        return called

    def decode(self, module: nn.Module) -> Callable[..., Any]:
        """In the place of an autoencoder's."""
        @functools.wraps(cast(Callable[..., Any], module.decode))
        def decoded(*args: Any, **kwargs: Any) -> Any:
            self.decoding = Call(as_module(module, "decode"), args, kwargs)
            raise _SeenEnough

        return decoded

    def _note(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.ended or (self.calls and module is not self.calls[0].module):
            return
        named, _ = named_leaves(bind_call(module, args, kwargs))
        time = str([t.flatten()[:1].tolist() for n, t in named.items() if n in timestep_inputs(named)])
        if self.calls and (time != self._time or len(self.calls) == TERMS):
            self.ended = True
            return
        self._time = time
        self.calls.append(Call(module, args, dict(kwargs)))
        if any(p.is_meta for p in module.parameters()):
            raise _SeenEnough


@contextmanager
def _instead(module: nn.Module, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """A module with another method for a while, which ``torch.compile`` does not hide."""
    state, before = vars(module), {n: vars(module)[n] for n in (name, _COMPILED) if n in vars(module)}
    state[name] = method
    state.pop(_COMPILED, None)
    try:
        yield
    finally:
        state.pop(name)
        state.update(before)


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
