"""What the workers of the pool run for the tests of weights in files."""

from __future__ import annotations

from typing import Any

import cases
import displaced
import torch
from accelerate import init_empty_weights
from emulation import difference
from pipefusion_runs import loop

import xdit_compile
from xdit_compile.runtime.deferred.deferred_tensor import materialize


def _empty(name: str) -> torch.nn.Module:
    with init_empty_weights():
        return displaced.MODELS[name].case.build().eval().requires_grad_(False)


def from_files(name: str, folder: str, spec: str) -> dict[str, Any]:
    """A loop with weights read from a folder against one with those of the model in memory; bytes of parameters read,
    those that a model in memory keeps on this rank, and of the whole model."""
    entry = displaced.MODELS[name]
    inputs = entry.case.inputs(1, False)
    held = xdit_compile.parallelize(cases.made(entry.case), spec, ranks=range(2), timeout=60)
    read = xdit_compile.parallelize(_empty(name), spec, ranks=range(2), timeout=60, weights=folder)
    expected, actual = (materialize(loop(m, entry, inputs, 3)) for m in (held, read))

    def nbytes(model: torch.nn.Module) -> int:
        return sum(p.nbytes for p in model.parameters() if not p.is_meta)

    return {"difference": difference(actual, expected), "read": nbytes(read), "held": nbytes(held),
            "all": sum(p.nbytes for p in held.parameters())}


def without(name: str, spec: str) -> str:
    """What is said of a model without weights."""
    entry = displaced.MODELS[name]
    model = xdit_compile.parallelize(_empty(name), spec, ranks=range(2), timeout=60)
    try:
        loop(model, entry, entry.case.inputs(1, False), 1)
    except xdit_compile.XditError as error:
        return str(error)
    return ""
