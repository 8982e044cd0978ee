"""Methods other than forward, as modules: an autoencoder is called by ``decode`` and ``encode``."""

from __future__ import annotations

import functools
from typing import Any
from weakref import WeakValueDictionary

from torch import nn

from xdit_compile.errors import XditError

_made: WeakValueDictionary[tuple[int, str], nn.Module] = WeakValueDictionary()
"""By the identity of the model, which the module keeps alive as long as it lives itself."""


def as_module(model: nn.Module, method: str) -> nn.Module:
    """A module whose forward is ``model.<method>``; ``model`` is its only child, ``model``.

    The same one each time as long as somebody holds it, and with it all programs that were captured of it.

    Raises:
        XditError: the model's class has no such method.
    """
    key = id(model), method
    made = _made.get(key)
    if made is None:
        cls: Any = type(model)
        made = _made[key] = _class(cls, method)(model)
    return made


@functools.cache
def _class(cls: type[nn.Module], method: str) -> type[nn.Module]:
    function = getattr(cls, method, None)
    if not callable(function):
        raise XditError(f"{cls.__name__} has no method {method!r}")

    def init(self: Any, model: nn.Module) -> None:
        nn.Module.__init__(self)
        self.model = model
        self.training = model.training

    # What ``inspect.signature`` says of forward is what it says of the method.
    @functools.wraps(function)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.model, method)(*args, **kwargs)

    return type(f"{cls.__name__}.{method}", (nn.Module,), {
        "__init__": init, "forward": forward, "uncalled": ("model",), "__module__": cls.__module__,
        "__doc__": function.__doc__})
