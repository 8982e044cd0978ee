"""The tiny pipelines are what they say: real, deterministic, and whatever is asked shows in the answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import PIPELINES, folder, load, run
from pipelines_parts import PipelineCase, made
from test_pipelines import QUICK
from torch import Tensor, nn


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Faster for matrices so small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipelines")


def difference(a: Tensor, b: Tensor) -> float:
    """Relative to ``a``."""
    assert a.shape == b.shape
    return float((a - b).norm() / a.norm())


def counted(pipe: Any, names: tuple[str, ...]) -> list[tuple[str, int]]:
    """A list to which each call of a component adds its name and its batch."""
    calls: list[tuple[str, int]] = []

    def watch(name: str) -> None:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # The latents are the first argument in their models, whatever its name.
            value = next(v for v in (*args, *kwargs.values()) if torch.is_tensor(v) and v.ndim > 2)
            calls.append((name, len(value)))

        getattr(pipe, name).register_forward_pre_hook(hook, with_kwargs=True)

    for name in names:
        watch(name)
    return calls


def batches(case: PipelineCase) -> list[int]:
    return [batch for step in case.batches for batch in step]


EVERY = [pytest.param(n, marks=[] if n in QUICK else pytest.mark.whole) for n in PIPELINES]


@pytest.mark.parametrize("name", EVERY)
def test_what_is_asked_shows(name: str, root: Path) -> None:
    case = PIPELINES[name]
    pipe = load(folder(name, root))
    calls = counted(pipe, (*case.denoisers, *case.others))
    result = run(pipe, case)
    assert torch.isfinite(result).all()
    assert result.std() > 0.1
    assert [batch for part, batch in calls if part in case.denoisers] == batches(case)
    assert {part for part, _ in calls} == {*case.denoisers, *case.others}, "one of them takes no part"

    assert difference(result, run(pipe, case, **case.prompt)) > 1e-3
    assert difference(result, run(pipe, case, seed=1)) > 1e-3
    if case.scale:
        weaker = run(pipe, case, **case.scale)
    else:  # guidance is a component
        before, pipe.guider = pipe.guider, pipe.guider.new(guidance_scale=2.0)
        weaker, pipe.guider = run(pipe, case), before
    assert difference(result, weaker) > 1e-3
    assert torch.equal(result, run(pipe, case)), "an earlier call left something behind"
    assert torch.equal(result, run(load(folder(name, root)), case))


@pytest.mark.parametrize("name", ["sdxl", "qwen_image", "hunyuan_dit", "wan_two"])
def test_a_pipeline_is_the_same_wherever_it_is_built(name: str, root: Path) -> None:
    case = PIPELINES[name]
    pipe = made(case)
    pipe.set_progress_bar_config(disable=True)
    # Parameters mapped from a file lie otherwise in memory, so that kernels may round differently.
    assert difference(run(pipe, case), run(load(folder(name, root)), case)) < 1e-5
    assert [p.name for p in root.iterdir() if p.name.startswith(".")] == [], "nothing half written stays"


@pytest.mark.parametrize("name", EVERY)
def test_no_parameter_is_zero(name: str, root: Path) -> None:
    for part in load(folder(name, root)).components.values():
        if isinstance(part, nn.Module):
            assert [n for n, p in part.named_parameters() if not p.any()] == []
