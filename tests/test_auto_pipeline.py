"""What auto sees of a pipeline's call before it plans: its denoiser's first call, and what its autoencoder decodes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import accelerate
import pipelines
import planner_runs
import pytest
import torch
from marks import whole
from pool import Pool
from torch import nn

from xdit_compile.frontend.method_module import as_module
from xdit_compile.frontend.program_cache import captured
from xdit_compile.ir.call_arguments import Call
from xdit_compile.pipelines.auto_pipeline import observed
from xdit_compile.pipelines.components import Role
from xdit_compile.planner.auto import batch_of
from xdit_compile.planner.autoencoder import shared_decoding
from xdit_compile.planner.costs import Loop
from xdit_compile.planner.device_memory import Beside
from xdit_compile.planner.machine import Link, Machine, Rates, read
from xdit_compile.planner.plan import Planner, Question

QUICK = ("dit", "sd3_skip", "flux_true", "wan")
LATENT = ("mochi",)
"""Pipelines of which the autoencoder in the tests does not go with the means of latents that they take off."""


def looks(args: Any, kwargs: Any) -> Any:
    """Of all arguments: shapes and types of tensors, values of the rest."""
    return torch.utils._pytree.tree_map(
        lambda x: (x.shape, x.dtype) if isinstance(x, torch.Tensor) else str(x), (tuple(args), dict(kwargs)))


@pytest.mark.parametrize("name", [n if n in QUICK else whole(n) for n in pipelines.PIPELINES])
def test_what_is_decoded_is_known_after_one_step_and_nothing_has_changed(
        name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    case = pipelines.PIPELINES[name]
    pipe = pipelines.load(pipelines.folder(name, tmp_path_factory.getbasetemp() / "observed"))
    arguments = case.call()
    if "output_type" in arguments and name not in LATENT:
        arguments["output_type"] = "np"
    decoded: list[Any] = []

    def run() -> torch.Tensor:
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        return torch.as_tensor(pipe(**arguments, generator=generator, return_dict=False)[0])

    before, state = run(), torch.get_rng_state()
    parts = {n: m for n, m in pipe.components.items() if isinstance(m, nn.Module)}
    seen = observed(pipe, (), arguments | {"generator": torch.Generator().manual_seed(0)})
    assert torch.equal(torch.get_rng_state(), state)
    assert not {"forward", "decode"} & {n for m in parts.values() for n in vars(m)}
    for vae in (m for m in parts.values() if hasattr(m, "decode")):
        decode = vae.decode
        vae.decode = lambda *a, decode=decode, **k: decoded.append(looks(a, k)) or decode(*a, **k)
    assert torch.equal(run(), before)
    assert (seen.decoding is None) == (not decoded)
    if seen.decoding is not None:
        assert looks(seen.decoding.args, seen.decoding.kwargs) == decoded[0]


def test_what_lies_beside_the_model_is_known(tmp_path: Path) -> None:
    """Of each component once, by what it is for; what offloading brings when it runs is not there."""
    pipe = pipelines.load(pipelines.folder("sd3", tmp_path))
    sizes = {n: sum({t.data_ptr(): t.numel() * t.element_size() for t in (*m.parameters(), *m.buffers())}.values())
             for n, m in pipe.components.items() if isinstance(m, nn.Module)}
    arguments = pipelines.PIPELINES["sd3"].call()
    encoders = [sizes[n] for n in ("text_encoder", "text_encoder_2", "text_encoder_3")]
    found = observed(pipe, (), arguments).beside
    assert found.keys() == {Role.ENCODER, Role.AUTOENCODER} and found[Role.AUTOENCODER] == [sizes["vae"]]
    assert sorted(found[Role.ENCODER]) == sorted(encoders)
    accelerate.hooks.add_hook_to_module(pipe.text_encoder, accelerate.hooks.ModelHook())
    assert len(observed(pipe, (), arguments).beside[Role.ENCODER]) == 2


def test_auto_shares_out_encoders_where_memory_is_small(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "two.toml").write_text(planner_runs.TOML)
    pipe = pipelines.load(pipelines.folder("pixart_alpha", tmp_path))
    seen = observed(pipe, (), pipelines.PIPELINES["pixart_alpha"].call())
    bound, (encoder,) = seen.call.bound(), seen.beside[Role.ENCODER]
    planner = Planner(captured(seen.call.module, bound.args, bound.kwargs))
    beside = Beside(0, (encoder,), sum(seen.beside[Role.AUTOENCODER]))
    loop = Loop(seen.steps, seen.calls, batch_of(seen.call))
    plenty = planner.plan(Question(read(tmp_path / "two.toml"), 2, loop, exact=True, beside=beside)).best
    auto = f"auto,machine={tmp_path}/two.toml,device_memory={int(plenty.memory - 0.2 * encoder)}"
    found = pool.run(planner_runs.pipeline, "pixart_alpha", str(tmp_path), auto, ranks=range(2), timeout=240)
    assert all("encoders=shard" in f["spec"] and f["error"] <= 1e-4 for f in found)


def machine(speed: float, memory: float = 1e12) -> Machine:
    return Machine("some", 4, int(memory), {"float32": Rates(1e10, 1e10)}, 1e12, 0.0, 1.0, True, 0.0, 0.0, 1e12,
                   (Link(0, 0, "any", 1e-6, speed),))


def test_more_ranks_share_an_autoencoder_where_links_are_fast_or_memory_is_small(tmp_path: Path) -> None:
    vae = pipelines.load(pipelines.folder("dit", tmp_path)).vae
    call = Call(as_module(vae, "decode"), (torch.randn(1, 4, 16, 16),), {})
    fast, slow = (shared_decoding(call, Question(machine(speed), 4)) for speed in (1e11, 1e3))
    assert fast.degree == 4 and [*fast.seconds] == [1, 2, 4] and fast.line().startswith("vae=4: ")
    assert fast.seconds[4] < fast.seconds[2] < fast.seconds[1] < 4.5 * fast.seconds[4]
    assert slow.degree == 1 and "with vae=2" in slow.line() and slow.seconds[1] == fast.seconds[1]
    assert shared_decoding(call, Question(machine(1e3, memory=1), 4)).degree == 4


def test_what_cannot_be_captured_is_left_whole() -> None:
    class Odd(nn.Module):
        def decode(self, z: torch.Tensor) -> torch.Tensor:
            return z * random.random()

    found = shared_decoding(Call(as_module(Odd(), "decode"), (torch.randn(1, 4, 8, 8),), {}), Question(machine(1e9), 4))
    assert found.degree == 1 and "not known" in found.line()


@pytest.mark.parametrize(("speed", "degree"), [(1000, 2), (1e-6, 1)])
def test_auto_chooses_how_many_share_the_autoencoder(pool: Pool, tmp_path: Path, speed: float, degree: int) -> None:
    slow = planner_runs.TOML.replace("products_tflops = 10", "products_tflops = 0.001")
    (tmp_path / "two.toml").write_text(slow.replace("gb_per_s = 1.0", f"gb_per_s = {speed}"))
    pipelines.folder("sd3", tmp_path)
    found = pool.run(planner_runs.pipeline, "sd3", str(tmp_path), f"auto,machine={tmp_path}/two.toml", "np",
                     ranks=range(2), timeout=240)
    assert {f["vae"] for f in found} == {degree} and max(f["error"] for f in found) <= 1e-4
