"""Offloading that others have switched on is done by programs in its place."""

from __future__ import annotations

from typing import Any

import mechanisms
import offload_runs
import pytest
import torch
from marks import whole
from pool import Pool
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from xdit_compile.errors import CaptureError
from xdit_compile.frontend.offload_hooks import take_off
from xdit_compile.frontend.tracing import as_fake
from xdit_compile.ir.released_parameters import arrive, device_of, device_of_model, moving, wait_for

AWAY = torch.device("meta")
"""Stands for a device that this machine may not have."""


def drawn() -> list[Any]:
    """All triples, of which a quick run takes those that have each pair of a kind and a moment once."""
    specs = ("ulysses=2", "tensor=2", "pipefusion=2,warmup=all")
    return [(kind, before, spec) if (k + 2 * before + s) % 3 == 0 else whole(kind, before, spec)
            for k, kind in enumerate(offload_runs.KINDS) for before in (True, False) for s, spec in enumerate(specs)]


@pytest.mark.parametrize(("kind", "before", "spec"), drawn())
def test_programs_do_it_on_ranks(pool: Pool, kind: str, before: bool, spec: str) -> None:
    for found in pool.run(offload_runs.taken_over, kind, before, spec, ranks=range(2)):
        assert found["error"] < 1e-5 and found["offload"] and found["programs"] == 2
        assert "offload=block" in found["spec"]


def test_parameters_that_wait_count_as_where_they_go() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[2].weight = model[0].weight  # tied
    wait_for(model, AWAY)
    assert all(p.device.type == "cpu" and device_of(p) == AWAY for p in model.parameters())
    assert all(b.device == AWAY for b in model.buffers()) and device_of_model(model) == AWAY
    with FakeTensorMode() as mode:
        assert as_fake(model[0].weight, mode).device == AWAY
    arrive(model)
    assert all(p.device == AWAY for p in model.parameters()) and model[2].weight is model[0].weight


def test_parameters_that_came_or_were_moved_count_as_where_they_are() -> None:
    here = torch.device("cpu")
    for settle in (arrive, lambda m: m._apply(moving(lambda t: t))):
        model = nn.Linear(4, 4)
        wait_for(model, here if settle is arrive else AWAY)
        settle(model)
        assert all(device_of(p) == here and not vars(p) for p in model.parameters())


def test_hooks_of_two_devices_are_refused() -> None:
    model = mechanisms.flux()
    mechanisms.in_groups("leaf_level")(model)
    model.proj_out._diffusers_hook.hooks["group_offloading"].group.onload_device = AWAY
    with pytest.raises(CaptureError, match="cpu and meta; a program runs on one device"):
        take_off(model)


@pytest.mark.parametrize("kind", offload_runs.KINDS[:3])
def test_what_is_taken_off_leaves_the_model_as_it_was(kind: str) -> None:
    plain, model = mechanisms.flux(), mechanisms.flux()
    forwards = [vars(m).get("forward") for m in model.modules()]
    offload_runs.change(model, kind)
    assert take_off(model) == torch.device("cpu") and take_off(model) is None
    left = [vars(m).get("forward") for m in model.modules()]
    # Both libraries leave the method that was there before as an attribute.
    assert all(f is None or f == type(m).forward.__get__(m) for f, m in zip(left, model.modules(), strict=True))
    assert forwards == [None] * len(forwards)
    assert all(map(torch.equal, plain.parameters(), model.parameters()))
    assert torch.equal(mechanisms.answer(model), mechanisms.answer(plain))
