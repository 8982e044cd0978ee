"""What the workers of the pool run for the tests of artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pipelines
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


def in_a_pipeline(folder: str, name: str, artifact: str) -> torch.Tensor:
    """What a pipeline gives whose transformer was exported, on two ranks."""
    pipe = pipelines.load(Path(folder) / name)
    pipe.transformer = xdit_compile.load(
        artifact, weights=Path(folder) / name / "transformer", ranks=range(2), timeout=120)
    return pipelines.run(pipe, pipelines.PIPELINES[name], num_inference_steps=2)
