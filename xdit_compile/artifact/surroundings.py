"""What of the caller's settings is in the programs of an artifact."""

from __future__ import annotations

import torch

from xdit_compile.frontend.caller import autocast_now


def surroundings() -> str:
    """In which type tensors are made here, and what autocast casts to, if it is on: as a text, equal where the programs
    of a call are the same."""
    casts = [f"autocast of {device} to {_name(dtype)}" for device, on, dtype in autocast_now() if on]
    return ", ".join([f"default type {_name(torch.get_default_dtype())}", *(casts or ["no autocast"])])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
