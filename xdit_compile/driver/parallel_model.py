"""Objects that stand where a model or a pipeline stood: the same class to callers, other methods."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from xdit_compile.driver.model_runner import ModelRunner
from xdit_compile.errors import XditError
from xdit_compile.ir.released_parameters import device_of_model


class Parallel:
    """Marks a parallel model. ``runners`` holds, by the name of the method they serve, its programs."""

    runners: Mapping[str, ModelRunner]


def parallel_model(model: nn.Module, runners: Mapping[str, ModelRunner]) -> Any:
    """An instance of a subclass of the model's class that shares everything but the methods named in ``runners``.

    A subclass, because callers test for the class and read its attributes; an instance of its own, because the
    caller's model must keep its methods. Both have one ``__dict__``: what is set on one is set on the other.
    """
    if hidden := runners.keys() & vars(model).keys():
        raise XditError(f"the {hidden.pop()} of this {type(model).__name__} was replaced on the object, as offloading "
                        "hooks do, and would hide the parallel one; remove the hook first")
    members: dict[str, Any] = {name: _method(type(model), name, runner) for name, runner in runners.items()}
    if isinstance(inspect.getattr_static(type(model), "device", None), property):
        # Of parameters that are given up, where they were.
        members["device"] = property(device_of_model)
    return instance_of_subclass(model, Parallel, {**members, "runners": dict(runners)}, vars(model))


def instance_of_subclass(original: Any, mixin: type, members: Mapping[str, Any], state: dict[str, Any]) -> Any:
    """An object with ``state`` as its attributes, of a class that only differs from the original's in ``members``
    and ``mixin``, and goes by its name."""
    cls = type(original)
    made = type(cls.__name__, (mixin, cls), {**members, "__module__": cls.__module__, "__doc__": cls.__doc__,
                                             "__qualname__": cls.__qualname__})
    stand_in: Any = object.__new__(made)
    object.__setattr__(stand_in, "__dict__", state)
    return stand_in


def _method(cls: type, name: str, runner: ModelRunner) -> Callable[..., Any]:
    """The method that hands its call to the runner."""
    @functools.wraps(getattr(cls, name))
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Offloading moves a model's weights when forward is called; for other methods, the method itself asks for it.
        hook = vars(self).get("_hf_hook")
        if name != "forward" and hasattr(hook, "pre_forward"):
            hook.pre_forward(self)
        return runner(*args, **kwargs)

    return method
