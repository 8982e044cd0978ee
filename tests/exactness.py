"""What the workers of the pool run: a case on one process and on several, compared."""

from __future__ import annotations

from typing import Any

import torch

import xdit_compile
from tests import models
from xdit_compile.structure import flatten


def relative_error(name: str, spec: str, batch: int, odd: bool, ranks: tuple[int, ...]) -> dict[str, Any]:
    """Largest difference between plain PyTorch and the parallel model, over the largest value, and its notes."""
    model = models.build(name)
    inputs = models.CASES[name].inputs(batch, odd)
    with torch.no_grad():
        expected, _ = flatten(model(**inputs))
    parallel = xdit_compile.parallelize(model, spec, ranks=ranks, timeout=60)
    with torch.no_grad():
        actual, _ = flatten(parallel(**inputs))
    assert len(actual) == len(expected)
    errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(actual, expected, strict=True)]
    (compiled, _), = parallel.runner.programs.values()
    return {"error": max(errors), "notes": [str(n) for n in compiled.local.notes]}
