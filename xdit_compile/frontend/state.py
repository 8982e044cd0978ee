"""What of a model a captured program depends on, in one value that is cheap to compute at every call."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from xdit_compile.structure import CONSTANTS

_INTERNAL = frozenset(vars(nn.Module())) - {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_DEPTH = 4
"""How deep plain objects are looked into: a processor, its settings, their lists."""


def state_token(model: nn.Module, held: list[Any] | None = None) -> Hashable:
    """Changes when modules are added, removed or exchanged, when a parameter changes shape, dtype or device, when a
    hook or a Python attribute that forward may read changes (an adapter's scale, a processor), and under autocast.
    Values of parameters do not count: programs read them at each call.

    Args:
        held: given, it receives the objects that count by identity. Whoever keeps the token keeps them too: once
            freed, another object could have the same identity.
    """
    autocast = tuple((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda"))
    return tuple(_of_module(m, held) for m in model.modules()), autocast


def device_of(tensor: torch.Tensor) -> torch.device:
    """Models on the meta device are captured as CPU models, so their programs serve once the weights are there."""
    return torch.device("cpu") if tensor.is_meta else tensor.device


def _of_module(module: nn.Module, held: list[Any] | None) -> Hashable:
    state = vars(module)
    tensors = [(name, t.shape, t.dtype, device_of(t)) for group in (module._parameters, module._buffers)
               for name, t in group.items() if t is not None]
    rest = [(k, _of_value(v, held, _DEPTH)) for k, v in state.items() if k not in _INTERNAL]
    hooks = [_identity(h, held) for group in _HOOKS if state[group] for h in state[group].values()]
    return _identity(module, held), type(module), tuple(tensors), tuple(rest), tuple(hooks)


def _identity(value: Any, held: list[Any] | None) -> int:
    if held is not None:
        held.append(value)
    return id(value)


def _of_value(value: Any, held: list[Any] | None, depth: int) -> Hashable:
    if isinstance(value, CONSTANTS):
        return value
    if depth and isinstance(value, Mapping):
        return tuple((str(k), _of_value(v, held, depth - 1)) for k, v in value.items())
    if depth and isinstance(value, (list, tuple, set, frozenset)):
        return tuple(_of_value(v, held, depth - 1) for v in value)
    plain = not isinstance(value, (nn.Module, torch.Tensor, type, FunctionType, BuiltinFunctionType, MethodType))
    if depth and plain and hasattr(value, "__dict__"):
        inside = tuple((k, _of_value(v, held, depth - 1)) for k, v in vars(value).items())
        return _identity(value, held), inside
    return _identity(value, held)
