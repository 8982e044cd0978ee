"""What the workers of the pool run: a quantized model on one process and on several, compared."""

from __future__ import annotations

from typing import Any

import quantized
import torch
import zoo
from cases import made
from emulation import difference

import xdit_compile
from xdit_compile.ir.packed_tensors import named_parts
from xdit_compile.ir.pytree import flatten


def _nbytes(model: torch.nn.Module) -> int:
    held = named_parts(dict(model.named_parameters()))
    return sum(t.numel() * t.element_size() for t in held.values() if not t.is_meta)


@torch.no_grad()
def differences(name: str, kind: str, spec: str, batch: int) -> dict[str, Any]:
    """At two steps, and how many bytes of weights this rank holds, of all."""
    model = made(zoo.CASES[name])
    quantized.KINDS[kind](model)
    inputs = zoo.CASES[name].inputs(batch, False)
    steps = [inputs, inputs | {"timestep": inputs["timestep"] * 0.5}]
    expected = [flatten(model(**step))[0] for step in steps]
    every = _nbytes(model)
    parallel = xdit_compile.parallelize(model, spec, ranks=range(2), timeout=100)
    found = [max(difference(a + 0, b) for a, b in zip(flatten(parallel(**step))[0], one, strict=True))
             for step, one in zip(steps, expected, strict=True)]
    return {"steps": found, "held": _nbytes(parallel), "every": every}
