"""What of a model a captured program depends on, in one value that is cheap to compute at every call."""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from xdit_compile.ir.pytree import CONSTANTS
from xdit_compile.ir.released_parameters import device_of

_INTERNAL = frozenset(vars(nn.Module())) - {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_ITSELF = (nn.Module, torch.Tensor, type, BuiltinFunctionType, ModuleType)
_DEPTH = 16
"""How deep plain objects are looked into: a processor, its settings, their lists."""
_SWITCHES = frozenset({"_hf_peft_config_loaded"})
"""Attributes that are only asked whether they are true: unloading adapters leaves None where there was nothing."""


def state_token(model: nn.Module, held: dict[int, Any] | None = None) -> Hashable:
    """Changes when modules are added, removed or exchanged for others, when a parameter changes shape, dtype or
    device, when a hook or a Python attribute that forward may read changes (an adapter's scale, a processor), and
    under autocast. Values of parameters do not count: programs read them at each call.

    Modules, objects and functions count by what they hold, so that a hook that is taken off and put on again, or an
    adapter that is loaded where one like it was, changes nothing.

    Args:
        held: given, it receives the objects that count by identity, by that. Whoever keeps the token keeps them too:
            once freed, another object could have the same identity.
    """
    autocast = tuple((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda"))
    modules = list(model.modules())
    # Modules of the model go by their place in it, which children and references name.
    seen = {id(m): i for i, m in enumerate(modules)}
    return tuple(_of_module(m, held, seen) for m in modules), autocast


def _of_module(module: nn.Module, held: dict[int, Any] | None, seen: dict[int, int]) -> Hashable:
    state, groups = vars(module), (module._parameters, module._buffers, module._modules)
    tensors = [(name, type(t), t.shape, t.dtype, device_of(t)) for group in groups[:2]
               for name, t in group.items() if t is not None]
    children = [(name, seen[id(m)]) for name, m in module._modules.items() if m is not None]
    # None reads the same wherever it is kept, and what is set anew comes last: order means nothing.
    plain = {k: None for group in groups if group for k, v in group.items() if v is None}
    plain |= {k: state[k] for k in state.keys() - _INTERNAL if k not in _SWITCHES or state[k]}
    rest = [(k, _of_value(plain[k], held, seen, _DEPTH)) for k in sorted(plain)]
    hooks = [_of_value(h, held, seen, _DEPTH) for group in _HOOKS if state[group] for h in state[group].values()]
    return type(module), tuple(tensors), tuple(children), tuple(rest), tuple(hooks)


def _identity(value: Any, held: dict[int, Any] | None) -> int:
    if held is not None:
        held[id(value)] = value
    return id(value)


def _of_value(value: Any, held: dict[int, Any] | None, seen: dict[int, int], depth: int) -> Hashable:
    """``seen`` numbers what was described before: objects may refer to one another in circles."""
    if isinstance(value, (int, float, complex)):
        return type(value), value  # 1, 1.0 and True are equal, but do not compute alike
    if isinstance(value, CONSTANTS):
        return value

    def of(part: Any) -> Hashable:
        return _of_value(part, held, seen, depth - 1)

    if isinstance(value, nn.Module) and id(value) in seen:
        return nn.Module, seen[id(value)]
    if not depth or isinstance(value, _ITSELF):
        return _identity(value, held)
    if isinstance(value, partial):
        return tuple(map(of, (value.func, value.args, value.keywords)))
    if isinstance(value, MethodType):
        return of(value.__func__), of(value.__self__)
    if isinstance(value, tuple):
        return tuple(map(of, value))
    if isinstance(value, frozenset):
        return frozenset(map(of, value))
    if id(value) in seen:
        return "seen", seen[id(value)]
    seen[id(value)] = len(seen)
    if isinstance(value, dict):
        return tuple((str(k), of(v)) for k, v in value.items())
    if isinstance(value, list):
        return tuple(map(of, value))
    if isinstance(value, set):
        # Its order is another on each rank, and may be another for the same elements.
        return frozenset(map(of, value))
    if isinstance(value, FunctionType):
        # A hook that is taken off and put on again is another function of the same code around the same things.
        return (_identity(value.__code__, held), _identity(value.__globals__, held), of(value.__defaults__),
                of(value.__kwdefaults__), *(of(_content(cell)) for cell in value.__closure__ or ()),
                *((k, of(v)) for k, v in vars(value).items()))
    if hasattr(value, "__dict__"):
        # An object that is more than its attributes counts as itself.
        same = type(value) if type(value).__basicsize__ == _Plain.__basicsize__ else value
        return _identity(same, held), *((k, of(v)) for k, v in vars(value).items())
    return _identity(value, held)


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing was assigned yet
        return None


class _Plain:
    """An object that is its attributes and no more, as those of most classes are; others take more room."""
