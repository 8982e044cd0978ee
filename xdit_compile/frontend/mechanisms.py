"""Mechanisms of others that change what a call of a model does, and that no captured program can take over.

What can be taken over needs no mention: a forward on the object, parametrizations, hooks that change values are run
when the model is captured, and are part of the graph. Here is the rest, told from what a module or a tensor is and
does, not from which library put it there.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

from xdit_compile.errors import CaptureError
from xdit_compile.frontend.offload_hooks import is_offloading
from xdit_compile.ir.containers import CONSTANTS
from xdit_compile.ir.given_up import kind_of
from xdit_compile.ir.packed_tensors import is_packed, parts

PLAIN = (torch.Tensor, nn.Parameter, FakeTensor)
"""Types of tensors that hold what operators compute with, and do nothing of their own."""

CALLS = ("__call__", "_call_impl", "_wrapped_call_impl", "_slow_forward")
"""How PyTorch comes from a call of a module to its forward."""

COMPILED = "has no effect in a parallel model, which compiles its own programs: give backend=inductor in the spec"
"""What is said of torch.compile."""


def check(model: nn.Module, offloaded: bool = False) -> None:
    """Refuse what a program of ``model`` would pass over in silence; ``offloaded`` is told by `obstacle`.

    Raises:
        CaptureError: naming the mechanism, the module it is on, and what to do.
    """
    if found := obstacle(model, offloaded):
        raise CaptureError(f"{type(model).__name__} cannot run in parallel as it is: {found}")


def obstacle(model: nn.Module, offloaded: bool = False) -> str | None:
    """What is in the way, if anything.

    Args:
        offloaded: whether offloading may be there, because it will be taken off before a program is made.
    """
    # Of a method other than forward, the model's own forward is no part.
    uncalled = getattr(model, "uncalled", ())
    hooks: list[_Look] = [partial(look, offloaded=offloaded) for look in (_device_hooks, _registered_hooks)]
    looks = ((look, path, module) for path, module in model.named_modules()
             for look in [*_LOOKS, *([] if path in uncalled else hooks)])
    return next((found for look, path, module in looks if (found := look(module, path))), None)


def unwrapped(model: Any) -> Any:
    """The model inside of a wrapper of ``torch.compile``, which is said to have no effect; anything else as it is."""
    while _compiled(model):
        model = model._orig_mod
        warnings.warn(f"torch.compile around {type(model).__name__} {COMPILED}", stacklevel=3)
    return model


def compiled_inside(model: nn.Module) -> list[str]:
    """The paths of modules that ``torch.compile`` or ``Module.compile`` was put around."""
    return [path for path, module in model.named_modules()
            if _compiled(module) or vars(module).get("_compiled_call_impl") is not None]


def _wrapper(module: nn.Module, path: str) -> str | None:
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or _instance(
            module, "torch.distributed.fsdp", "FullyShardedDataParallel"):
        return (f"{_at(path)} is wrapped in {_name(type(module))}, which shares calls out by itself; give parallelize "
                "the model inside (its .module). shard or pipefusion in the spec spread weights over devices")
    if isinstance(module, torch.jit.ScriptModule):
        return f"{_at(path)} is a module of torch.jit, which cannot be captured; use the model that it was made from"
    return None


def _call(module: nn.Module, path: str) -> str | None:
    if hidden := sorted(set(CALLS) & vars(module).keys()):
        return (f"{hidden[0]} of {_at(path)} was replaced on the object, and would not be part of the program; replace "
                "its forward, which is")
    return None


def _tensors(module: nn.Module, path: str) -> str | None:
    state = vars(module)
    for group in (state["_parameters"], state["_buffers"], state):
        for name, tensor in group.items():
            if isinstance(tensor, torch.Tensor) and kind_of(tensor) not in PLAIN and (
                    why := _unreadable(tensor, group is not state)):
                where = f"{path}.{name}".lstrip(".")
                return f"{where} is a {_name(type(tensor))}, {why}"
    return None


def _unreadable(tensor: torch.Tensor, is_state: bool) -> str | None:
    """Why a program cannot take a tensor apart into plain ones that it reads at each call."""
    if _instance(tensor, "torch.distributed.tensor", "DTensor"):
        return ("of which this rank has a part, as under fully_shard: its own hooks would gather it around modules, "
                "and inside of a program no module is called. Give parallelize the model as it was before; to spread "
                "weights over devices give shard=N, or pipefusion=N, in the spec")
    if is_lazy(tensor):
        return "which is not made yet: call the model once as it is first"
    if not is_state:
        return ("a kind of tensor with operators of its own, as an attribute: make it a parameter or a buffer, of "
                "which programs read the parts")
    if not is_packed(tensor):
        return ("a kind of tensor with operators of its own, which does not say what it consists of "
                "(__tensor_flatten__), so that programs would pass over them. Use weights of another kind, or plain "
                "ones")
    if tensor.layout is not torch.strided or any(p.layout is not torch.strided for p in parts(tensor).values()):
        return f"of the layout {tensor.layout}, which no program reads. Use weights of another kind, or plain ones"
    return None


def _device_hooks(module: nn.Module, path: str, offloaded: bool) -> str | None:
    """Accelerate's, around a forward on the object: they move weights when the module is called. Those put around the
    parallel forward itself run at each call."""
    hook = vars(module).get("_hf_hook")
    if hook is None or "forward" not in vars(module) or (offloaded and is_offloading(hook)):
        return None
    return (f"the hook {_name(type(hook))} around the forward of {_at(path)} moves or casts weights when the module is "
            "called, as device maps do; inside of a program no module is. Remove the hook "
            "first (accelerate.hooks.remove_hook_from_module(model, recurse=True)). Then offload the parallel model or "
            "pipeline as a whole (enable_model_cpu_offload), give offload=block in the spec, which brings weights to "
            "the device block by block, or shard=N or pipefusion=N, which spread them over devices")


def _registered_hooks(module: nn.Module, path: str, offloaded: bool) -> str | None:
    """Diffusers' registry. A hook that replaces what forward computes, and keeps nothing, is captured with it."""
    registry = vars(module).get("_diffusers_hook")
    if registry is None or (not path and "forward" not in vars(module)):
        return None
    for name, hook in getattr(registry, "hooks", {}).items():
        if offloaded and is_offloading(hook):
            continue
        if getattr(hook, "_is_stateful", False):
            return (f"the hook {name!r} ({_name(type(hook))}) on {_at(path)} keeps values from step to step, as caches "
                    "of steps do; a program would repeat its first step. Take it off (model.disable_cache()); in its "
                    "place give cache=first_block (or teacache, taylor, interval) in the spec")
        # One that only casts weights, or changes arguments, is captured with the module.
        if _overrides(hook, "pre_forward") and (held := _held_beside_constants(hook)):
            return (f"the hook {name!r} ({_name(type(hook))}) on {_at(path)} acts before the module is called, and "
                    f"holds {held}, as diffusers' own context parallelism and offloading do: they move weights "
                    "or shares of tensors between devices when a module is called, and inside of a program none is. "
                    "Leave it out. In its place give offload=block in the spec, which keeps weights on the CPU and "
                    "brings them to the device block by block; shard=N or pipefusion=N, which spread them over "
                    "devices; ulysses=N or ring=N for context parallelism")
    return None


def _held_beside_constants(hook: Any) -> str | None:
    """The attribute of a hook that is no constant, if there is one: what it leads to may be devices, groups of weights
    or of ranks, also those that are made later."""
    return next((f"{name}, a {_name(type(held))}" for name, held in vars(hook).items()
                 if name != "fn_ref" and not isinstance(held, CONSTANTS)), None)


def _overrides(hook: Any, name: str) -> bool:
    """Whether its class has another ``name`` than the root of its classes that has one."""
    defined = [vars(c)[name] for c in type(hook).__mro__ if name in vars(c)]
    return len(defined) > 0 and defined[0] is not defined[-1]


_Look = Callable[[nn.Module, str], str | None]
"""Says of a module and its path what is in the way."""

_LOOKS: tuple[_Look, ...] = (_wrapper, _call, _tensors)


def _instance(value: Any, module: str, name: str) -> bool:
    """Whether a value is of a class of a part of PyTorch that is slow to import: without it, there are none."""
    return module in sys.modules and isinstance(value, getattr(sys.modules[module], name))


def _compiled(module: Any) -> bool:
    return _instance(module, "torch._dynamo.eval_frame", "OptimizedModule")


def _at(path: str) -> str:
    return path or "the model"


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"

