"""Values that the host reads of tensors, which may lie on a device that is still at work on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def on_host(tensor: Tensor) -> bool:
    """Whether reading its values waits for no device."""
    return tensor.device.type == "cpu"


def to_host(numbers: Tensor) -> Callable[[], list[Any]]:
    """What waits for numbers on an accelerator, and for nothing that it is asked to do later."""
    if numbers.device.type != "cuda":
        return numbers.tolist
    copy = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    copy.copy_(numbers, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(numbers.device))

    def arrived() -> list[Any]:
        event.synchronize()
        return copy.tolist()

    return arrived
