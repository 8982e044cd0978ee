"""What the workers of the pool run for the tests of artifacts."""

from __future__ import annotations

from typing import Any

import torch

import xdit_compile
from xdit_compile.runtime.deferred.deferred_tensor import materialize


def refused(path: str, ranks: int) -> str:
    """What is said when so many ranks load an artifact for another number."""
    try:
        xdit_compile.load(path, ranks=range(ranks), timeout=60)
    except xdit_compile.ArtifactError as error:
        return str(error)
    return ""


def called(path: str, inputs: dict[str, Any]) -> torch.Tensor:
    """What a call of a loaded artifact gives."""
    with torch.no_grad():
        return materialize(xdit_compile.load(path, ranks=range(2), timeout=120)(**inputs))
