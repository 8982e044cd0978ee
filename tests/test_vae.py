"""Autoencoders and UNets: the numbers of one device, a side of the picture split, only borders exchanged."""

from __future__ import annotations

import gc
import inspect
import weakref
from functools import lru_cache
from typing import Any

import live
import pytest
import torch
import vaes
from emulation import Found, held, together
from marks import whole
from pool import Pool
from torch import Tensor, nn

from xdit_compile.errors import CaptureError, XditError
from xdit_compile.frontend.method_module import as_module
from xdit_compile.frontend.program_cache import captured
from xdit_compile.ir.call_arguments import call_arguments
from xdit_compile.ir.program import Program
from xdit_compile.ir.pytree import flatten
from xdit_compile.passes import localize, plan
from xdit_compile.spec import ShardingSpec

EXACT = 1e-5  # of the output's scale, in float32

DECODERS = [
    pytest.param(name, n, marks=[] if n == 2 + i % 3 and i % 6 == 0 else pytest.mark.whole, id=f"{name}-{n}")
    for i, name in enumerate(vaes.CASES) for n in (2, 3, 4)
]
"""A quick run takes one of these for every sixth."""


@lru_cache(maxsize=1)
@torch.no_grad()
def of(name: str, method: str) -> tuple[nn.Module, tuple[Any, Any], list[Tensor], Program]:
    """A case's method as a module, how it is called, what it gives, and the program."""
    return called(vaes.made(vaes.CASES[name]), method, vaes.CASES[name].inputs(method))


def called(model: Any, method: str, inputs: dict[str, Any]) -> tuple[nn.Module, tuple[Any, Any], list[Tensor], Program]:
    with torch.no_grad():
        module = as_module(model, method)
        arguments = call_arguments(module, inputs)
        before = {k: v for k, v in vars(model).items() if not k.startswith("_")}
        result = getattr(model, method)(**inputs)
        program = captured(module, *arguments)
        assert before == {k: v for k, v in vars(model).items() if k in before}
        return module, arguments, flatten((result, arguments))[0], program


def assert_split(found: Found, most: float, gathers: int = 1) -> None:
    """Nothing is computed whole, nothing travels whole but the results."""
    assert found.error <= EXACT
    assert [str(n) for n in found.notes if n.kind == "fallback"] == []
    assert found.work <= most
    whole = [str(n) for n in found.notes if n.kind == "collective" and "all_gather" in n.text]
    assert len(whole) <= gathers, whole


@pytest.mark.parametrize(("name", "n"), DECODERS)
def test_decoding(name: str, n: int) -> None:
    # On two ranks one of them changes from rows to columns, of which there is an even number after up-sampling.
    gathers = 2 if name == "temporal" else 1
    assert_split(together(*of(name, "decode"), f"ring={n}"), most=1.15, gathers=gathers)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if i % 6 == 0 else pytest.mark.whole)
                                  for i, n in enumerate(vaes.CASES)])
def test_encoding(name: str) -> None:
    """The results are a distribution: its parameters, mean, deviation and so on."""
    assert_split(together(*of(name, "encode"), "ring=2"), most=1.15, gathers=6)


@pytest.mark.parametrize(("name", "method"), [
    ("kl", "decode"), *(whole(*case) for case in (
        ("kl", "encode"), ("wan", "decode"), ("dc", "decode")))])
def test_on_real_processes(pool: Pool, name: str, method: str) -> None:
    for error in pool.run(vaes.error_on_processes, name, method, "ring=3", ranks=range(3)):
        assert error <= EXACT


def test_a_distribution_that_comes_back_draws_as_it_would() -> None:
    module, arguments, _, program = of("kl", "encode")
    (posterior,) = module.model.encode(*arguments[0], **arguments[1])  # type: ignore[operator,union-attr]
    tensors, _ = flatten(arguments)
    with torch.no_grad():
        (back,) = program.output_spec.finish(arguments, tensors, program.main(*held(module, program, tensors)))
    assert type(back) is type(posterior)
    one, other = (p.sample(torch.Generator().manual_seed(1)) for p in (posterior, back))
    torch.testing.assert_close(other, one)
    assert torch.equal(back.mode(), back.mean)


def _tiled_kl() -> Any:
    model = vaes.made(vaes.CASES["kl"])
    model.tile_latent_min_size, model.tile_sample_min_size = 6, 12
    model.enable_tiling()
    model.enable_slicing()
    return model, vaes.CASES["kl"].inputs("decode", 2, 6, 8)


def _tiled_wan() -> Any:
    model = vaes.made(vaes.CASES["wan"])
    model.enable_tiling(tile_sample_min_height=24, tile_sample_min_width=24, tile_sample_stride_height=20,
                        tile_sample_stride_width=20)
    inputs = vaes.CASES["wan"].inputs("decode", 1, 6, 8)
    return model, inputs | {"z": inputs["z"][:, :, :2]}


@pytest.mark.parametrize("build", [_tiled_kl, whole(_tiled_wan)])
def test_tiles_and_slices_are_those_of_the_model(build: Any) -> None:
    """They change the numbers of one device, and those of several in the same way."""
    model, inputs = build()
    assert together(*called(model, "decode", inputs), "ring=2").error <= EXACT
    with torch.no_grad():
        tiled = model.decode(**inputs)[0]
        model.disable_tiling()
        plain = model.decode(**inputs)[0]
    assert tiled.shape != plain.shape or not torch.allclose(tiled, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "kl" else pytest.mark.whole)
                                  for n in vaes.CASES])
def test_memory_is_shared_out(name: str, dtype: torch.dtype) -> None:
    """Measured, not calculated: all tensors that live at once on one of four ranks, the whole result included,
    against those of the model itself."""
    vae = vaes.CASES[name]
    model = vae.build(4).eval().requires_grad_(False).to(dtype)  # type: ignore[no-untyped-call]
    z = vae.latents(1, 32, 32).to(dtype)
    given = {"z": z, "return_dict": False, **vae.extra}
    module = as_module(model, "decode")
    arguments = call_arguments(module, given)
    program, seeds = plan(captured(module, *arguments), ShardingSpec.parse("ring=4"))
    alone = live.peak(lambda: model.decode(**given), z, *model.state_dict().values())
    for rank in (0, 1):
        local = localize(program, seeds, rank)
        inputs = held(module, local, [z])
        share = live.peak(lambda inputs=inputs, local=local: local.main(*inputs), *inputs) / alone
        print(f"{name} {dtype}: rank {rank} of 4 holds {share:.2f} of {alone / 1e6:.0f} MB")
        assert share <= 0.35


@pytest.mark.parametrize(("spec", "batch", "sides", "most"), [
    ("ring=3", 1, (13, 18), 1.1), ("cfg=2", 2, (13, 11), 1.05), *(whole(*case) for case in (
        ("ulysses=2", 1, (13, 18), 1.15), ("ring=3", 1, (13, 11), 1.35), ("cfg=2,ulysses=2", 2, (13, 18), 1.15)))])
def test_a_unet(spec: str, batch: int, sides: tuple[int, int], most: float) -> None:
    """Sides that no power of two divides: what goes down as 13, 7, 4 rows comes up as 4, 7, 13."""
    model = vaes.unet()
    found = together(*called(model, "forward", vaes.unet_inputs(batch, *sides)), spec)
    assert_split(found, most, gathers=2 if "," in spec else 1)


class Codec(nn.Module):
    """A method beside forward, one that draws, and one that takes its time over the signature."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def decode(self, z: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.layer(z) * scale

    def noisy(self, z: Tensor) -> Tensor:
        return self.layer(z) + torch.randn(4)


def test_a_method_is_a_module() -> None:
    model = Codec().eval().requires_grad_(False)
    module = as_module(model, "decode")
    assert module is as_module(model, "decode") and module is not as_module(model, "noisy")
    assert list(inspect.signature(type(module).forward).parameters) == ["self", "z", "scale"]
    z = torch.randn(2, 4)
    assert torch.equal(module(z, scale=2.0), model.decode(z, scale=2.0))
    assert captured(module, (z,), {"scale": 2.0}) is captured(as_module(model, "decode"), (z,), {"scale": 2.0})
    with pytest.raises(CaptureError, match="random numbers"):
        captured(as_module(model, "noisy"), (z,), {})
    with pytest.raises(XditError, match="no method 'missing'"):
        as_module(model, "missing")


def test_nobody_keeps_a_model_that_is_gone() -> None:
    model = Codec().eval().requires_grad_(False)
    module = as_module(model, "decode")
    captured(module, (torch.randn(2, 4),), {})
    gone = weakref.ref(model)
    del model, module
    gc.collect()
    assert gone() is None
