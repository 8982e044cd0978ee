"""What the workers of the pool run: a case on one process and on several, compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import models
import torch
from torch import nn

import xdit_compile
from xdit_compile.structure import flatten

_built: dict[str, nn.Module] = {}


def relative_errors(name: str, batch: int, odd: bool, specs: Sequence[str], backend: str = "eager") -> dict[str, Any]:
    """By spec: the largest difference between plain PyTorch and the parallel model over the largest value, and what
    the compiler noted. Specs of fewer processes than take part are run by the first ranks."""
    if name not in _built:
        _built.clear()
        _built[name] = models.build(name)
    model, inputs = _built[name], models.CASES[name].inputs(batch, odd)
    with torch.no_grad():
        expected, _ = flatten(model(**inputs))
    found: dict[str, Any] = {}
    for spec in specs:
        parsed = xdit_compile.ShardingSpec.parse(spec)
        if torch.distributed.get_rank() >= parsed.world_size:
            continue
        parallel = xdit_compile.parallelize(model, f"{spec},backend={backend}", ranks=range(parsed.world_size),
                                            timeout=100)
        with torch.no_grad():
            out = parallel(**inputs)
        actual, _ = flatten(out)
        assert type(out) is type(model(**inputs)) and len(actual) == len(expected)
        errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(actual, expected, strict=True)]
        (compiled, _), = parallel.runner.programs.values()
        found[spec] = {"error": max(errors), "notes": [str(n) for n in compiled.local.notes]}
    return found
