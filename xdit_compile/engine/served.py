"""What a rank serves: made as a recipe says, called with progress, and told to stop between two steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xdit_compile.api import parallelize
from xdit_compile.artifact.files import ArtifactFolder
from xdit_compile.artifact.load import load as load_artifact
from xdit_compile.driver.parallel_model import Parallel
from xdit_compile.engine.recipe import Recipe
from xdit_compile.engine.target import load as function_named
from xdit_compile.errors import ArgumentError, XditError
from xdit_compile.pipelines.call_signature import CallSignature, refusals_told
from xdit_compile.pipelines.loading import component_of, load
from xdit_compile.pipelines.parallel_pipeline import ParallelPipeline, is_pipeline

OnStep = Callable[[int, int], None]
"""Told how many steps are done, of how many (0 where that is not known)."""
OnPreview = Callable[[int, torch.Tensor], None]
"""Told how many steps are done, and the latents then."""
CALLBACK = "callback_on_step_end"
ON_STEP = "on_step"
"""The argument by which own functions are told of progress."""


class Served:
    """Something that is called, and whose public methods are.

    Args:
        target: a pipeline, a model, or anything else that can be called.
        original: what it is the parallel form of, if it is one.
    """

    def __init__(self, target: Any, original: Any = None) -> None:
        self.target, self._original = target, original
        cls = type(target)
        self.is_pipeline = is_pipeline(target)
        if isinstance(target, nn.Module):
            self.signature = CallSignature.of(cls.__name__, target.forward)
        elif inspect.isroutine(target):
            self.signature = CallSignature.of(target.__name__, target)
        else:
            self.signature = CallSignature.of(cls.__name__, cls.__call__)
        self._tells = not self.is_pipeline and ON_STEP in self.signature.kinds

    def call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], on_step: OnStep,
             on_preview: OnPreview | None = None) -> Any:
        """One call. ``on_step`` may raise, on all ranks alike; so does ``on_preview`` have to be given on all.

        Raises:
            ArgumentError: a pipeline refuses its arguments, or shows no latents.
        """
        if on_preview is not None:
            kwargs = {**kwargs, CALLBACK: self._previewing(on_preview)}
        with torch.no_grad(), refusals_told(self.signature.name):
            if self.is_pipeline:
                with _steps_told(self.target, on_step):
                    return self.target(*args, **kwargs)
            return self.target(*args, **kwargs, **({ON_STEP: on_step} if self._tells else {}))

    def _previewing(self, on_preview: OnPreview) -> Callable[..., dict[str, Any]]:
        """A callback of diffusers that shows latents."""
        if not self.is_pipeline or CALLBACK not in self.signature.kinds:
            raise ArgumentError(f"{self.signature.name} takes no {CALLBACK}, and so shows nothing before it is done; "
                                "leave on_preview out")

        def shown(pipe: Any, step: int, time: Any, held: dict[str, Any]) -> dict[str, Any]:
            on_preview(step + 1, held["latents"])
            return held

        return shown

    def invoke(self, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call a method by its name.

        Raises:
            XditError: there is no public one of this name.
        """
        found = getattr(self.target, method, None)
        if method.startswith("_") or not inspect.isroutine(found):
            raise XditError(f"{type(self.target).__name__} has no method {method!r}")
        return found(*args, **kwargs)

    def mend(self, recipe: Recipe) -> None:
        """Parallelize the original anew, after ranks have failed together and all of them live. Weights, adapters and
        programs are kept with it.

        Raises:
            XditError: there is none, or it has given up weights.
        """
        original = self._original
        modules = (original.components.values() if self.is_pipeline else [original]) if original is not None else ()
        if original is None or any(p.is_meta for m in modules if isinstance(m, nn.Module) for p in m.parameters()):
            raise XditError("it has to be made anew")
        self.target = parallelize(original, recipe.spec, timeout=recipe.timeout)

    @property
    def broken(self) -> bool:
        """Whether its ranks have failed, so that no later call of theirs can succeed."""
        group = getattr(self.target, "parallel_group", None)
        return group is not None and group.control.verdict is not None


def made(recipe: Recipe, place: torch.device, first: bool) -> Served:
    """What a recipe describes, on this rank's device.

    Raises:
        XditError: something is missing or does not fit.
    """
    if recipe.kind == "artifact":
        return Served(_artifact(recipe, recipe.source, recipe.weights, place))
    if recipe.kind == "function":
        return _of_function(recipe, place)
    dtype = torch.float32 if place.type == "cpu" else torch.bfloat16
    dtype = dtype if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    replaced = {component_of(recipe.pipeline, name, _class_in(path)): path for name, path in recipe.artifacts.items()}
    pipe = load(recipe.pipeline, dtype, without=tuple(replaced))
    for name, path in replaced.items():
        weights, own = recipe.weights, Path(recipe.source) / name
        if weights is None and any(own.glob("*.safetensors")):
            weights = str(own)  # of what the artifact does not include
        setattr(pipe, name, _artifact(recipe, path, weights, place))
    pipe.set_progress_bar_config(disable=True)
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and name not in replaced:
            part.to(place)
    return Served(pipe) if replaced else _parallel(pipe, recipe)


def _artifact(recipe: Recipe, path: str, weights: str | None, place: torch.device) -> nn.Module:
    return load_artifact(path, weights, timeout=recipe.timeout, device=place, native=recipe.native)


def _parallel(original: Any, recipe: Recipe) -> Served:
    return Served(parallelize(original, recipe.spec, timeout=recipe.timeout), original)


def _of_function(recipe: Recipe, place: torch.device) -> Served:
    function = function_named(recipe.source)
    given = dict(recipe.arguments)
    with suppress(TypeError, ValueError):  # of a builtin
        if "spec" in inspect.signature(function).parameters:
            given.setdefault("spec", recipe.spec)
    target = function(**given)
    if isinstance(target, tuple) and target and isinstance(target[0], nn.Module):
        target = target[0]  # with example inputs, as `explain` and `verify` take it
    if is_pipeline(target) and not isinstance(target, ParallelPipeline):
        target.set_progress_bar_config(disable=True)
        return _parallel(target.to(place), recipe)
    if isinstance(target, nn.Module) and not isinstance(target, Parallel):
        return _parallel(target.to(place).eval(), recipe)
    if not callable(target):
        raise XditError(f"{recipe.source} must return a pipeline, a model or something that can be called; it returned "
                        f"a {type(target).__name__}")
    return Served(target)


def _class_in(path: str) -> str:
    return ArtifactFolder.at(path).manifest["model"]["class"].text()


@contextmanager
def _steps_told(pipe: Any, on_step: OnStep) -> Iterator[None]:
    """Within, the bars of a pipeline tell of its steps. They look at nothing that the pipeline computes, so that no
    rank waits for another because of them, as one would for a callback's sake."""
    held = vars(pipe).get("progress_bar")
    pipe.progress_bar = lambda iterable=None, total=None: _Bar(iterable, total, on_step)
    try:
        yield
    finally:
        # A pipeline whose spec is chosen at its first call has become another one meanwhile.
        vars(pipe).pop("progress_bar", None)
        if held is not None:
            pipe.progress_bar = held


class _Bar:
    """As much of tqdm as pipelines use."""

    def __init__(self, iterable: Iterable[Any] | None, total: int | None, on_step: OnStep) -> None:
        self._iterable, self._on_step, self.n = iterable, on_step, 0
        self.total = total if total is not None else len(iterable) if isinstance(iterable, Sized) else 0

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None: ...

    def __iter__(self) -> Iterator[Any]:
        for item in self._iterable if self._iterable is not None else ():
            yield item
            self.update()

    def update(self, n: int = 1) -> None:
        self.n += n
        self._on_step(self.n, self.total)

    def set_description(self, *_: object, **__: object) -> None: ...

    set_postfix = set_description_str = set_postfix_str = refresh = close = set_description
