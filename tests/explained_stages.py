"""A target for the command line: a tiny DiT and the arguments of one call."""

from __future__ import annotations

from typing import Any

import cases
import displaced
from torch import nn


def dit() -> tuple[nn.Module, dict[str, Any]]:
    entry = displaced.MODELS["dit"]
    return cases.made(entry.case), entry.case.inputs(1, False)
