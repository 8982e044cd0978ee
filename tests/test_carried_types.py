"""Numbers of any type are exchanged: those that backends do not carry, as their bytes."""

from __future__ import annotations

import carried_runs
import emulation
import pytest
import torch
from pool import Pool

from xdit_compile.frontend.capture import capture
from xdit_compile.ir.call_arguments import call_arguments

DTYPES = (torch.complex64, torch.complex128, torch.int16, torch.int8, torch.int64, torch.float64, torch.float16,
          torch.float8_e4m3fn, torch.float8_e5m2)
OTHERS = (torch.complex64, torch.int16, torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_type_is_exchanged(dtype: torch.dtype) -> None:
    """In lock-step, where collectives take no others than every backend has."""
    model, x = carried_runs.made(dtype)
    arguments = call_arguments(model, {"x": x})
    with torch.no_grad():
        expected = model(x)
        program = capture(model, *arguments)
    for spec in ("ulysses=2", "ring=3", "ulysses=2,displaced=yes"):
        found = emulation.together(model, arguments, [expected, x], program, spec)
        assert found.error <= 1e-5, spec


def test_on_processes(pool: Pool) -> None:
    for found in pool.run(carried_runs.differences, OTHERS, "ulysses=2", ranks=range(2), timeout=120):
        assert max(found) <= 1e-5
