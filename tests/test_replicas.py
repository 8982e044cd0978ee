"""Weights that differ between ranks are found by name, at the first call and after counted writes."""

from __future__ import annotations

import re

import calls
import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from pool import Pool

from xdit_compile import parallelize
from xdit_compile.errors import RankMismatch
from xdit_compile.runtime.control.tensor_digest import _ROW, _ROWS, bulk_digest

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.complex64)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(DTYPES), st.integers(1, 3 * 8 * _ROW * 9), st.data())
def test_a_change_anywhere_is_seen(dtype: torch.dtype, size: int, data: st.DataObject) -> None:
    content = torch.from_numpy(np.random.default_rng(size).integers(0, 2, size * dtype.itemsize, dtype=np.uint8))
    before = bulk_digest(content.view(dtype))
    assert before == bulk_digest(content.view(dtype).clone())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= 1
    assert bulk_digest(content.view(dtype)) != before


@pytest.mark.parametrize("shape", [(64, 16), (1, 300), (513, 509), (4096, 40), (_ROWS * 3, _ROW + 1)])
def test_rows_and_columns_that_are_exchanged_are_seen(shape: tuple[int, int]) -> None:
    x = torch.randn(shape)
    before = bulk_digest(x)
    assert bulk_digest(x.t().contiguous().t()) == before, "strides mean nothing"
    assert bulk_digest(x.flip(0)) != before or shape[0] == 1
    assert bulk_digest(x.flip(1)) != before
    rolled = x.clone()
    rolled[[0, -1]] = x[[-1, 0]]
    assert bulk_digest(rolled) != before or shape[0] == 1


def test_odd_tensors() -> None:
    for x in (torch.empty(0, 3), torch.tensor(1.0), torch.ones(9, dtype=torch.uint8)[1:], torch.ones(3).expand(5, 3)):
        assert bulk_digest(x) == bulk_digest(x.clone())
    assert bulk_digest(torch.zeros(2, 3)) != bulk_digest(torch.zeros(3, 2))


def differing(how: str) -> list[str]:
    """What a rank sees of calls before and after the last rank's weights change as ``how`` says, and are set right."""
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    model, mine = calls.Tiny().eval(), dist.get_rank() == 1
    model.register_buffer("table", torch.zeros(3))
    weight = model.blocks[1].norm1.weight
    kept, call = weight.clone(), calls.inputs()
    plain = model(**call)
    spec = "pipefusion=2,patches=2" if how == "stages" else "ulysses=2"
    parallel = parallelize(model, spec, timeout=20, ranks=[0, 1])
    said = []

    def change() -> None:
        if how == "buffer":
            model.table += 1
        elif how == "replaced":
            model.blocks[1].norm1.weight = torch.nn.Parameter(2 * kept, requires_grad=False)
        else:
            weight.mul_(2)

    def ask() -> None:
        try:
            result = parallel(**call)
            said.append("right" if torch.allclose(result.sample + 0, plain.sample, atol=1e-5) else "WRONG")
        except RankMismatch as error:
            said.append(str(error))

    if how in ("first", "stages") and mine:
        change()
    ask()
    if how not in ("first", "stages") and mine:
        change()
    ask()
    if mine:
        model.table.zero_()
        model.blocks[1].norm1.weight = torch.nn.Parameter(kept, requires_grad=False)
    ask()
    return said


@pytest.mark.parametrize("how", ["first", "stages", "written", "replaced", "buffer"])
def test_the_first_tensor_that_differs_is_named(pool: Pool, how: str) -> None:
    name = "table" if how == "buffer" else r"blocks\.1\.norm1\.weight"
    for first, second, third in pool.run(differing, how, ranks=(0, 1)):
        assert first == (second if how in ("first", "stages") else "right")
        wanted = rf"do not hold the same weights: {name}: ranks 0 have float32\[\d+\] \w+; ranks 1 have float32"
        assert re.search(wanted, second), second
        assert third == "right", third
