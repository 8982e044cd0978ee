"""What of a model a captured program depends on, in one value that is cheap to compute at every call."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from torch import nn

from xdit_compile.structure import CONSTANTS

_INTERNAL = frozenset(vars(nn.Module())) - {"training"}


def state_token(model: nn.Module) -> Hashable:
    """Changes when modules are added, removed or exchanged, when a parameter changes shape, dtype or device, and
    when a Python attribute that forward may read changes (an adapter's scale, a processor). Values of parameters
    do not count: programs read them at each call."""
    return hash(tuple(_of_module(m) for m in model.modules())), torch.is_autocast_enabled()


def device_of(tensor: torch.Tensor) -> torch.device:
    """Models on the meta device are captured as CPU models, so their programs serve once the weights are there."""
    return torch.device("cpu") if tensor.is_meta else tensor.device


def _of_module(module: nn.Module) -> Hashable:
    tensors = [(name, t.shape, t.dtype, device_of(t)) for group in (module._parameters, module._buffers)
               for name, t in group.items() if t is not None]
    rest = [(k, _of_value(v)) for k, v in vars(module).items() if k not in _INTERNAL]
    return id(module), type(module), tuple(tensors), tuple(rest)


def _of_value(value: object) -> Hashable:
    if isinstance(value, CONSTANTS):
        return value
    if isinstance(value, Mapping):
        return tuple((str(k), _of_value(v)) for k, v in value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return tuple(_of_value(v) for v in value)
    return id(value)
