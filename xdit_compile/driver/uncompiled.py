"""Calls of parallel models out of functions that ``torch.compile`` was put around."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from xdit_compile.frontend.mechanisms import COMPILED


@torch.compiler.disable(reason="a parallel model runs its own programs; give backend=inductor in the spec")
def uncompiled(method: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a ``Method`` of a parallel model as it is."""
    if not method.said:
        method.said = True
        warnings.warn(f"torch.compile around a parallel {type(model).__name__} {COMPILED}", stacklevel=2)
    return getattr(model, method.name)(*args, **kwargs)
