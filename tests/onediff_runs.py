"""Compilers registered with the real onediff package, and what the workers of the pool run with them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pipefusion_runs
import torch
from compiled_runs import deep, difference_of_outputs
from onediff.infer_compiler import DeployableModule
from onediff.infer_compiler.backends.registry import _BACKENDS, register_backend
from torch import fx

import xdit_compile


class Deployed(DeployableModule):
    """What onediff's compilers return: a module around the one they were given."""

    def __init__(self, module: fx.GraphModule, change: Callable[[Any], Any]) -> None:
        super().__init__()
        self.module, self.change = module, change

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.change(self.module(*tensors))


def register(name: str, change: Callable[[Any], Any] = lambda results: results) -> list[tuple[Any, Any]]:
    """Register a compiler that changes results so; returns what it will be called with."""
    seen: list[tuple[Any, Any]] = []

    def compiler(torch_module: Any, *, options: Any = None) -> Deployed:
        seen.append((torch_module, options))
        return Deployed(torch_module, change)

    _BACKENDS.pop(name, None)
    register_backend(name)(compiler)
    return seen


def operators(module: fx.GraphModule) -> list[str]:
    return [str(n.target) for n in module.graph.nodes if n.op == "call_function"]


def run(spec: str, world: int) -> dict[str, Any]:
    """What a registered compiler is given under ``spec``, and the difference to the model."""
    seen, model = register("recorder"), deep(3)
    parallel = xdit_compile.parallelize(model, spec, ranks=range(world), timeout=100)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        errors = [difference_of_outputs(parallel, model, step) for step in range(2)]
    (ready,) = parallel.runners["forward"].programs.values()
    return {"errors": errors, "kinds": {type(m).__bases__[0].__name__ for m, _ in seen},
            "options": [o for _, o in seen], "targets": [operators(m) for m, _ in seen],
            "notes": [str(n) for n in ready.compiled.local.notes]}


def displaced(name: str, spec: str) -> dict[str, Any]:
    """A denoising loop in stages."""
    register("recorder")
    return pipefusion_runs.displaced_errors(name, 1, True, [spec])
