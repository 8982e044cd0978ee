"""Encoders that live on one rank each: a text encoder runs once per prompt and need not fill every device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from xdit_compile.driver.parallel_model import Method, Parallel, instance_of_subclass
from xdit_compile.errors import XditError
from xdit_compile.ir.call_arguments import bind_call, named_leaves
from xdit_compile.runtime.control.tensor_digest import digests
from xdit_compile.runtime.deferred.deferred_tensor import materialize
from xdit_compile.runtime.parallel_group import ParallelGroup

SPREAD = "_xdit_compile_spread"
"""The attribute of an encoder, the original's too, by which it is known to live on one rank."""

RESIZE = "resize_token_embeddings"
"""How new words are made room for, by the mean of the known ones."""


def spread(encoder: nn.Module, group: ParallelGroup, owner: int) -> Any:
    """``encoder`` on rank ``owner`` of the group alone. The others give up their weights, which are put on the meta
    device, and receive what its forward returns.

    Raises:
        XditError: on every rank, if it lives on one already.
    """
    if SPREAD in vars(encoder):
        raise XditError(f"this {type(encoder).__name__} lives on one rank already, for another parallel pipeline, and "
                        "other ranks have no weights of it: give this pipeline that one's encoder, or one that was "
                        "loaded anew")
    vars(encoder)[SPREAD] = True
    device, dtype = _home(encoder)
    members: dict[str, Any] = {"forward": Method("forward", encoder.forward, _forward(type(encoder), group, owner)),
                              "runners": {}}
    if group.rank != owner:
        _release(encoder)
        members |= {"_apply": _apply, "device": property(lambda self: self.home.device),
                    "dtype": property(lambda self: self.home.dtype), "home": torch.empty(0, device=device, dtype=dtype)}
    if hasattr(encoder, RESIZE):
        members[RESIZE] = _resized(type(encoder), group, owner)
    return instance_of_subclass(encoder, Parallel, members, vars(encoder))


def _release(encoder: nn.Module) -> None:
    """Put its weights on the meta device, those of adapters and new words too that were loaded since."""
    for module in encoder.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)


def _home(encoder: nn.Module) -> tuple[torch.device, torch.dtype]:
    first = next(encoder.parameters())
    return first.device, first.dtype


def _forward(cls: Any, group: ParallelGroup, owner: int) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = materialize((args, kwargs))
        named, others = named_leaves(bind_call(self, args, kwargs))
        group.counts["calls"] += 1
        group.control.agree(f"the inputs of {cls.__name__}", digests(named) | others)
        with group.control.guard(cls.__name__, (group.everyone,)):
            if group.rank != owner:
                _release(self)
            # Its own forward, or one that was put on the encoder before.
            own = vars(self).get("forward") or functools.partial(cls.forward, self)
            result = own(*args, **kwargs) if group.rank == owner else None
            return group.broadcast(result, owner, self.device)

    return forward


def _resized(cls: Any, group: ParallelGroup, owner: int) -> Callable[..., Any]:
    @functools.wraps(getattr(cls, RESIZE))
    def resize(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Without weights there is no mean.
        how = kwargs if group.rank == owner else kwargs | {"mean_resizing": False}
        with group.control.guard(f"{cls.__name__}.{RESIZE}", (group.everyone,)):
            result = getattr(cls, RESIZE)(self, *args, **how)
            if group.rank != owner:
                # Until forward is called: whoever asks for room writes words into it.
                result.weight = nn.Parameter(torch.zeros_like(result.weight, device=self.device), requires_grad=False)
            # The owner drew random numbers for the new words; all go on from where it is. Sent as an object: NCCL takes
            # no tensors on the CPU.
            state = group.broadcast(torch.get_rng_state().numpy().tobytes(), owner, self.device)
            torch.set_rng_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
        return result

    return resize


def _apply(self: Any, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
    """Moving or casting a module without weights: it remembers where it would be."""
    type.__setattr__(type(self), "home", fn(self.home))
    return self
