"""Types of numbers that every backend's collectives carry. Others travel as their bytes."""

from __future__ import annotations

import torch

CARRIED = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8,
                     torch.uint8, torch.bool})
"""Gloo knows no others but complex ones, and these not in an all-to-all; NCCL no integers of two bytes."""


def carried(memory: torch.Tensor) -> torch.Tensor:
    """One stretch of memory as numbers that travel: itself, or its bytes."""
    return memory if memory.dtype in CARRIED else memory.view(torch.uint8)
