"""What auto sees of a pipeline's call before it plans: its denoiser's first call, and what its autoencoder decodes."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pipelines
import planner_runs
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers.hooks import apply_group_offloading
from marks import whole
from pool import Pool
from torch import nn

from xdit_compile.frontend.method_module import as_module
from xdit_compile.frontend.program_cache import captured
from xdit_compile.ir.beside import Beside, EncoderBytes
from xdit_compile.ir.call_arguments import Call
from xdit_compile.pipelines.auto_pipeline import observed
from xdit_compile.planner.auto import batch_of
from xdit_compile.planner.autoencoder import shared_decoding
from xdit_compile.planner.costs import Loop
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


def hooks_on(pipe: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for c in pipe.components.values()
               if isinstance(c, nn.Module) for m in c.modules())


def test_what_lies_beside_the_model_is_known(tmp_path: Path) -> None:
    """Of each component once, by what it is for; what offloading brings when it runs is not there."""
    pipe = pipelines.load(pipelines.folder("sd3", tmp_path))
    sizes = {n: sum({t.data_ptr(): t.numel() * t.element_size() for t in (*m.parameters(), *m.buffers())}.values())
             for n, m in pipe.components.items() if isinstance(m, nn.Module)}
    arguments = pipelines.PIPELINES["sd3"].call()
    pipe(**arguments)  # transformers puts on hooks of its own
    hooks = hooks_on(pipe)
    found = observed(pipe, (), arguments).beside
    assert found.denoisers == 0 and found.others == sizes["vae"]
    assert sorted(e.nbytes for e in found.encoders) == sorted(
        sizes[n] for n in ("text_encoder", "text_encoder_2", "text_encoder_3"))
    # Guidance encodes two prompts; what is shared out are all parameters but for small ones outside of blocks.
    assert all(e.calls == 2 and 0.7 * e.nbytes < e.cut <= e.nbytes and e.messages % 2 == 0 for e in found.encoders)
    assert hooks_on(pipe) == hooks


class Tables(nn.Module):
    """An encoder with a table and two blocks, of 400 bytes each but for the table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(100, 10)
        self.blocks = nn.ModuleList(nn.Linear(10, 10, bias=False) for _ in range(2))
        self.register_buffer("positions", torch.zeros(5))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return x


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(10, 10)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return x + self.layer(x)


class Asks:
    """A pipeline that takes from its encoder what ``ask`` does."""

    def __init__(self, ask: Callable[[Tables], torch.Tensor]) -> None:
        self.encoder, self.other, self.model, self.ask = Tables(), Denoiser(), Denoiser(), ask
        self.components = {"encoder": self.encoder, "again": self.encoder, "other": self.other, "model": self.model}

    def __call__(self) -> torch.Tensor:
        return self.model(self.ask(self.encoder), torch.tensor([1]))


IDS = torch.arange(4)
CUT = EncoderBytes(4000 + 800 + 20, 4800, 4096 + 2 * 512, 9, 3)
"""What comes lies in memory at multiples of 256 bytes."""


@pytest.mark.parametrize(("ask", "seen"), [
    (lambda e: e(IDS) + e(IDS) + e(IDS), CUT), (lambda e: e.table(IDS), EncoderBytes(4820)),
    (lambda e: e(IDS) + e.table(IDS), EncoderBytes(4820)), (lambda e: torch.randn(4, 10), EncoderBytes(4820))])
def test_an_encoder_is_shared_out_if_it_is_only_called_as_a_whole(
        ask: Callable[[Tables], torch.Tensor], seen: EncoderBytes) -> None:
    pipe = Asks(ask)
    assert observed(pipe, (), {}).beside == Beside(440, (seen,), 0)
    pipe.encoder.compile(backend="eager")
    assert observed(pipe, (), {}).beside == Beside(440, (EncoderBytes(4820),), 0)


HOOKS: dict[str, tuple[Callable[[nn.Module], object], bool]] = {
    "aligned": (lambda m: add_hook_to_module(m, AlignDevicesHook("cpu", io_same_device=True)), True),
    "sequential": (lambda m: accelerate.cpu_offload(m, torch.device("cpu"), offload_buffers=True), False),
    "as a whole": (lambda m: accelerate.cpu_offload_with_hook(m, "cpu"), False),
    "in groups": (lambda m: apply_group_offloading(m, torch.device("cpu"), offload_type="leaf_level"), False)}


@pytest.mark.parametrize("name", HOOKS)
def test_what_offloading_brings_when_it_runs_is_not_there(name: str) -> None:
    pipe = Asks(lambda e: e(IDS))
    put, there = HOOKS[name]
    put(pipe.encoder)
    found = observed(pipe, (), {}).beside
    assert [e.nbytes for e in found.encoders] == ([4820] if there else []) and found.denoisers == 440


def test_auto_shares_out_encoders_where_memory_is_small(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "two.toml").write_text(planner_runs.TOML)
    pipe = pipelines.load(pipelines.folder("pixart_alpha", tmp_path))
    seen = observed(pipe, (), pipelines.PIPELINES["pixart_alpha"].call())
    bound, (encoder,) = seen.call.bound(), seen.beside.encoders
    planner = Planner(captured(seen.call.module, bound.args, bound.kwargs))
    loop = Loop(seen.steps, seen.calls, batch_of(seen.call))
    plenty = planner.plan(Question(read(tmp_path / "two.toml"), 2, loop, exact=True, beside=seen.beside)).best
    auto = f"auto,machine={tmp_path}/two.toml,device_memory={int(plenty.memory - 0.2 * encoder.cut)}"
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
