"""What a loaded artifact is to its callers: a module without code, asked as the model was that was exported."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from xdit_compile.artifact.entries import Entry
from xdit_compile.artifact.json_values import Fields, signature_of, structure_of
from xdit_compile.driver.parallel_model import Method
from xdit_compile.errors import ArtifactError


class Codeless(nn.Module):
    """Parameters by their names, and no code that reads attributes."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Private ones are those of libraries, which ask for them themselves.
        known = name.startswith("_") or name in vars(self) or isinstance(vars(type(self)).get(name), Method)
        if not known and value is not None and not isinstance(value, (torch.Tensor, nn.Module)):
            raise _without_code(f"its {name} cannot be set")
        super().__setattr__(name, value)


class Holder(Codeless):
    """A place for parameters of a loaded model. Nothing calls it: hooks are refused."""

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        raise _without_code("hooks on its modules cannot be registered")

    register_forward_pre_hook = register_forward_hook


def _without_code(what: str) -> ArtifactError:
    return ArtifactError(f"a loaded artifact runs the programs that it was exported with, and has no code of its "
                         f"modules: {what}. Do it to the model, and export it anew")


class LoadedModel(Codeless):
    """A model without code: its parameters, and what callers ask of a model of diffusers."""

    config: Fields

    @contextmanager
    def cache_context(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Pipelines call their model inside of this, for caches of steps, which no artifact has."""
        yield

    @property
    def dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32)

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))


def _constants_of(entry: Entry) -> Any:
    structure = structure_of(entry)
    if structure.tensor_count:
        raise entry.wrong("plain value")
    return structure.build(())


def model_class(manifest: Entry) -> type[LoadedModel]:
    """One with the signature of the original's forward, by its name."""
    signature = signature_of(manifest["signature"])
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("calls of a loaded model go to its runner")

    forward.__signature__ = signature.replace(parameters=[own, *signature.parameters.values()])  # type: ignore[attr-defined]
    described = manifest["model"]
    config = Fields({k: _constants_of(v) for k, v in described["config"].items()})
    name = described["class"].text() if described["class"].text().isidentifier() else "Model"
    return type(name, (LoadedModel,), {"forward": forward, "config": config, "__module__": __name__})


