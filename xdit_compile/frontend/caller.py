"""What surrounds a call of a model: modes and switches of its thread, which change what PyTorch's functions do."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.nn.modules import module as calls
from torch.nn.utils import parametrize
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from xdit_compile.errors import XditError

TRACING = (FakeTensorMode, FunctionalTensorMode, ProxyTorchDispatchMode)


def surroundings() -> Hashable:
    """What of the caller's thread is part of a captured program, beside autocast: where and in which type tensors are
    made."""
    # A default device is a mode of functions.
    return torch.get_default_dtype(), torch.get_default_device() if torch._C._len_torch_function_stack() else None


Autocast = tuple[tuple[str, bool, torch.dtype], ...]
"""Of each kind of device, whether autocast is on, and its type."""


def autocast_now() -> Autocast:
    """How it is here: a model may switch it on or off around a part of itself."""
    return tuple((d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda"))


@contextmanager
def autocast_as(was: Autocast) -> Iterator[None]:
    """Within, autocast is as it was somewhere else."""
    with ExitStack() as stack:
        for (device, enabled, dtype), now in zip(was, autocast_now(), strict=True):
            if now != (device, enabled, dtype):
                stack.enter_context(torch.autocast(device, dtype, enabled))
        yield


def unwatched() -> AbstractContextManager[Any]:
    """Within, the caller's modes that watch operators see none: they are not the model's."""
    return _disable_current_modes() if torch._C._len_torch_dispatch_stack() else nullcontext()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Within, a model may be captured: modes that watch operators see none of it, functions that ``torch.compile`` was
    put around are run as they were written, and nothing fake is kept for a later call."""
    with unwatched(), torch.compiler.set_stance("force_eager"), torch._dynamo.config.patch(
            error_on_nested_fx_trace=False):
        caching, parametrize._cache_enabled = parametrize._cache_enabled, 0
        try:
            yield
        finally:
            parametrize._cache_enabled = caching


def check_call(tensors: Sequence[torch.Tensor], plain: Collection[type]) -> None:
    """Refuse a call of a parallel model that the caller has wrapped in what its program would pass over.

    Args:
        tensors: of the call; plain: types that they may be of.

    Raises:
        XditError: naming what surrounds the call, or which of its tensors are of another kind.
    """
    for tensor in tensors:
        if type(tensor) not in plain or tensor.layout is not torch.strided:
            cls = type(tensor)
            raise XditError(f"a parallel model takes plain tensors, not a {cls.__module__}.{cls.__qualname__} with the "
                            f"layout {tensor.layout}; convert its arguments before the call")
    around = None
    if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
        around = _mode()
    if torch._C._functorch.peek_interpreter_stack() is not None:
        around = "a transform of torch.func (vmap, grad, jvp)"
    elif torch._C._is_tracing():  # type: ignore[attr-defined]
        around = "torch.jit.trace"
    elif forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        around = "forward-mode differentiation"
    if calls._global_forward_hooks or calls._global_forward_pre_hooks:
        around = around or _global_hook()
    if around:
        raise XditError(f"a parallel model was called inside of {around}, which would not reach what it computes: no "
                        "module and no function of the model is called, and every rank computes a part. Call it "
                        "outside, or use the model as it is")


def _mode() -> str | None:
    """A mode that a program does not honour. One of operators is given those that this rank runs."""
    functions = [torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())]
    for mode in (*(m for m in functions if not isinstance(m, DeviceContext)),
                 *(m for m in _get_current_dispatch_mode_stack() if isinstance(m, TRACING))):
        return f"the mode {type(mode).__module__}.{type(mode).__qualname__}"
    return None


def _global_hook() -> str | None:
    """A hook on all modules. Those of PyTorch itself only note which module runs."""
    for hook in (*calls._global_forward_pre_hooks.values(), *calls._global_forward_hooks.values()):
        named = hook if hasattr(hook, "__qualname__") else type(hook)
        if named.__module__.partition(".")[0] != "torch":
            return f"a hook on all modules ({named.__qualname__} of {named.__module__})"
    return None
