"""The ways to run one forward on several processes that the benchmark compares.

Each contestant makes, from the same model and on every rank, a function that runs the forward. Libraries
that replace parts of diffusers for the whole process (cache-dit puts its own functions into diffusers' table
of attention backends) are kept apart: a contestant's forward always runs with the tables as they were right
after it was built, and contestants of another library are built on untouched ones.
"""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor

Forward = Callable[..., tuple[Tensor]]

INSTALL = "pip install -r benchmarks/requirements.txt"


class Absent(Exception):
    """A contestant's package is not installed, or the contestant does not do what is asked for."""


@dataclass(frozen=True)
class Contestant:
    """``build(model, world_size)`` runs on every rank; None is the plain model, which one rank runs alone."""

    name: str
    library: str
    build: Callable[[nn.Module, int], nn.Module] | None
    about: str


def _ours(spec: str) -> Callable[[nn.Module, int], nn.Module]:
    def build(model: nn.Module, world_size: int) -> nn.Module:
        from xdit_compile import parallelize

        return parallelize(model, spec.format(n=world_size))

    return build


def _diffusers(model: nn.Module, world_size: int) -> nn.Module:
    """With the native attention backend, which supports context parallelism on CPU. But the rank's device is
    looked up among accelerators, of which there are none: one is reported, for ``cpu:0``."""
    from diffusers import ContextParallelConfig
    from diffusers.utils import logging

    logging.set_verbosity_error()
    with mock.patch.object(torch.accelerator, "device_count", lambda: 1):
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=world_size))
    return model


def _diffusers_tensor(model: nn.Module, world_size: int) -> nn.Module:
    """On a mesh of CPUs, which are not among the devices that it was written for, and work."""
    from diffusers import TensorParallelConfig
    from diffusers.hooks import tensor_parallel
    from diffusers.utils import logging
    from torch.distributed.device_mesh import init_device_mesh

    logging.set_verbosity_error()
    devices = (*tensor_parallel._SUPPORTED_TP_DEVICES, "cpu")
    with mock.patch.object(torch.accelerator, "device_count", lambda: 1), mock.patch.object(
        tensor_parallel, "_SUPPORTED_TP_DEVICES", devices
    ):
        model.enable_parallelism(config=TensorParallelConfig(mesh=init_device_mesh("cpu", (world_size,))))
    return model


def _cache_dit(sizes: str = "ulysses_size", **config: Any) -> Callable[[nn.Module, int], nn.Module]:
    def build(model: nn.Module, world_size: int) -> nn.Module:
        os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "ERROR")
        if importlib.util.find_spec("cache_dit") is None:
            raise Absent(f"cache-dit is not installed ({INSTALL})")
        import cache_dit

        # Its tensor parallelism asks for an accelerator's meshes, and works on those of CPUs.
        with mock.patch.object(torch.accelerator, "current_accelerator", lambda *_: torch.device("cpu")):
            return cache_dit.enable_cache(
                model, parallelism_config=cache_dit.ParallelismConfig(**{sizes: world_size}, **config)
            )

    return build


CONTESTANTS: dict[str, Contestant] = {
    c.name: c
    for c in (
        Contestant("single", "torch", None, "the plain model in one process, the others waiting"),
        Contestant("ulysses", "xdit_compile", _ours("ulysses={n}"), "ours, heads exchanged for tokens"),
        Contestant("ring", "xdit_compile", _ours("ring={n}"), "ours, keys and values around a ring"),
        Contestant(
            "ulysses-inductor",
            "xdit_compile",
            _ours("ulysses={n},backend=inductor"),
            "ours, compiled by inductor",
        ),
        Contestant("diffusers", "diffusers", _diffusers, "diffusers' context parallelism, ulysses"),
        Contestant("cache-dit", "cache_dit", _cache_dit(), "cache-dit's context parallelism, ulysses"),
        Contestant(
            "cache-dit-async",
            "cache_dit",
            _cache_dit(ulysses_async=True),
            "the same, exchange and work overlapping",
        ),
        Contestant("tensor", "xdit_compile", _ours("tensor={n}"), "ours, weights shared out"),
        Contestant("diffusers-tensor", "diffusers", _diffusers_tensor, "diffusers' tensor parallelism"),
        Contestant("cache-dit-tensor", "cache_dit", _cache_dit("tp_size"), "cache-dit's tensor parallelism"),
    )
}
DEFAULT = ("single", "ulysses", "ring", "diffusers", "cache-dit", "cache-dit-async")


class Builder:
    """Builds contestants from one model. A library that patches once per process finds its patches again."""

    def __init__(self, model: nn.Module, world_size: int) -> None:
        self.model, self.world_size = model, world_size
        self._untouched = _tables()
        self._left: dict[str, Tables] = {}

    def build(self, contestant: Contestant) -> tuple[Forward, nn.Module]:
        """The contestant's forward on a copy of the model that shares its weights, and what it made of the copy.

        Raises:
            Absent: its package is not installed.
        """
        if contestant.build is None:
            return self.model, self.model  # type: ignore[return-value]
        shared = {id(t): t for t in chain(self.model.parameters(), self.model.buffers())}
        with _swapped(self._left.get(contestant.library, self._untouched)):
            made = contestant.build(copy.deepcopy(self.model, shared), self.world_size)
            after = self._left[contestant.library] = _tables()

        def forward(**kwargs: Any) -> tuple[Tensor]:
            with _swapped(after):
                (output,) = made(**kwargs)
            # diffusers and cache-dit return before their last all-gather is done.
            return (output.wait(),) if isinstance(output, AsyncCollectiveTensor) else (output,)

        return forward, made


def held(made: nn.Module) -> int:
    """Parameters on this rank, once it has been called."""
    if hasattr(made, "runners"):  # ours, which keeps them elsewhere where ranks have shares
        return sum(t.numel() for t in made.runners["forward"].store.values())
    return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in made.parameters())


Tables = list[tuple[Any, dict[str, Any]]]


def _tables() -> Tables:
    """Copies of what libraries replace in diffusers: the attention backends, and Flux's forward code."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry
    from diffusers.models.transformers import transformer_flux as flux

    registry = {
        name: copy.copy(getattr(_AttentionBackendRegistry, name))
        for name in ("_backends", "_constraints", "_supported_arg_names", "_supports_context_parallel")
    }
    return [
        (_AttentionBackendRegistry, registry),
        (flux.FluxAttnProcessor, {"__call__": flux.FluxAttnProcessor.__call__}),
        (flux.FluxSingleTransformerBlock, {"forward": flux.FluxSingleTransformerBlock.forward}),
    ]


def _restore(tables: Tables) -> None:
    for owner, values in tables:
        for name, value in values.items():
            setattr(owner, name, value)


@contextmanager
def _swapped(tables: Tables) -> Iterator[None]:
    before = _tables()
    _restore(tables)
    try:
        yield
    finally:
        _restore(before)
