"""Pipelines of diffusers by name: their classes, their weights and adapters, and pictures to give them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from xdit_compile.errors import XditError
from xdit_compile.progress import progress


@dataclass(frozen=True)
class PipelineSource:
    """Where a pipeline comes from and what it is made of.

    Attributes:
        model: a folder or the name of a repository on the hub.
        pipeline, scheduler: names of classes of diffusers, in place of those that the folder names.
        adapters: paths and scales.
        savings: methods that save memory in the components that have them, as ``enable_tiling``.
        further: arguments of ``from_pretrained``.
    """

    model: str
    pipeline: str | None = None
    scheduler: str | None = None
    adapters: tuple[tuple[str, float], ...] = ()
    savings: tuple[str, ...] = ()
    further: Mapping[str, Any] = field(default_factory=dict)


def pipeline_config(source: PipelineSource) -> dict[str, Any]:
    """What the folder says of its pipeline: its class, and library and class of each component.

    Raises:
        XditError: there is no such pipeline, or no diffusers.
    """
    library = _diffusers()
    with _reading(f"a pipeline from {source.model}"):
        found = library.DiffusionPipeline.load_config(source.model, cache_dir=source.further.get("cache_dir"))
    return dict(found)


def pipeline_class(source: PipelineSource) -> Any:
    """The class that will be called; None if it is code of its own, which is known only once it is loaded.

    Raises:
        XditError: there is no such pipeline, or no diffusers.
    """
    if source.pipeline:
        return _class_named(source.pipeline, "DiffusionPipeline")
    name = pipeline_config(source).get("_class_name")
    return getattr(_diffusers(), name, None) if isinstance(name, str) else None


def load(source: PipelineSource, dtype: torch.dtype, without: Sequence[str] = ()) -> Any:
    """The pipeline with its weights and adapters, on the CPU.

    Args:
        without: components whose weights are not read, as others will take their place; they are on the meta device.

    Raises:
        XditError: something is missing or does not fit.
    """
    library = _diffusers()
    cls = _class_named(source.pipeline, "DiffusionPipeline") if source.pipeline else library.DiffusionPipeline
    with progress(f"loading {source.model}"), _reading(f"a pipeline from {source.model}"):
        stand_ins = {name: _empty(source, name) for name in without}
        pipe = cls.from_pretrained(source.model, dtype=dtype, **source.further, **stand_ins)
    if source.scheduler:
        chosen = _class_named(source.scheduler, "SchedulerMixin")
        if getattr(pipe, "scheduler", None) is None:
            raise XditError(f"{type(pipe).__name__} has no scheduler; leave --scheduler out")
        pipe.scheduler = chosen.from_config(pipe.scheduler.config)
    if source.adapters:
        _adapt(pipe, source.adapters)
    for method in source.savings:
        able = [c for c in pipe.components.values() if hasattr(c, method)]
        if not able:
            raise XditError(f"no component of {type(pipe).__name__} has {method}; leave --{method} out")
        for component in able:
            getattr(component, method)()
    return pipe


def component_of(source: PipelineSource, name: str, cls: str) -> str:
    """The component of a pipeline that is called ``name``, or, without a name, that is of the class ``cls``.

    Raises:
        XditError: there is none, or several are.
    """
    parts = _components(source)
    found = [n for n, part in parts.items() if (n == name if name else part[1] == cls)]
    if len(found) != 1:
        asked = name or f"that is a {cls}"
        raise XditError(f"{source.model} has {'no' if not found else 'more than one'} component {asked}; it has "
                        f"{', '.join(f'{n} ({part[1]})' for n, part in parts.items())}")
    return found[0]


def _components(source: PipelineSource) -> dict[str, tuple[str, str]]:
    """Library and class of each component, by name."""
    with _reading(f"a pipeline from {source.model}"):
        config = _diffusers().DiffusionPipeline.load_config(source.model, cache_dir=source.further.get("cache_dir"))
    return {n: (v[0], v[1]) for n, v in config.items() if isinstance(v, (list, tuple)) and len(v) == 2 and v[1]}


def _empty(source: PipelineSource, name: str) -> Any:
    """A component as its configuration describes it, on the meta device."""
    library, cls = _components(source)[name]
    if library != "diffusers":
        raise XditError(f"{name} of {source.model} is of {library}; only models of diffusers are made without their "
                        "weights")
    found = getattr(_diffusers(), cls)
    config = found.load_config(source.model, subfolder=name, cache_dir=source.further.get("cache_dir"))
    with import_module("accelerate").init_empty_weights():
        return found.from_config(config)


def pictures(files: Sequence[str]) -> Any:
    """One picture as it is, several as a list, from files or addresses.

    Raises:
        XditError: one cannot be read.
    """
    with _reading(f"the picture {' or '.join(files)}"):
        read = [import_module("diffusers.utils").load_image(file) for file in files]
    return read[0] if len(read) == 1 else read


def only_one_speaks(first: bool) -> None:
    """Bars on the terminal are rank 0's; other ranks tell of errors alone."""
    for name in ("diffusers", "transformers"):
        if find_spec(name) is not None:
            log = import_module(f"{name}.utils.logging")
            if not first:
                log.set_verbosity_error()
            if not first or not sys.stderr.isatty():
                log.disable_progress_bar()


def _diffusers() -> ModuleType:
    try:
        return import_module("diffusers")
    except ImportError as error:
        raise XditError(f"running a pipeline needs diffusers, which cannot be imported ({error}); "
                        "pip install 'xdit-compile[pipelines]'") from error


def _class_named(name: str, base: str) -> Any:
    """The class of diffusers that a user named."""
    found = getattr(_diffusers(), name, None)
    if not inspect.isclass(found) or not issubclass(found, getattr(_diffusers(), base)):
        raise XditError(f"diffusers has no class {name} derived from {base}; names are written as in its documentation")
    return found


def _adapt(pipe: Any, adapters: Sequence[tuple[str, float]]) -> None:
    if not hasattr(pipe, "load_lora_weights"):
        raise XditError(f"{type(pipe).__name__} takes no adapters; leave --lora out")
    if find_spec("peft") is None:
        raise XditError("adapters need peft, which is not installed; pip install 'xdit-compile[lora]'")
    names = [f"lora{i}" for i in range(len(adapters))]
    for name, (path, _) in zip(names, adapters, strict=True):
        with _reading(f"the adapter {path}"):
            pipe.load_lora_weights(path, adapter_name=name)
    with _reading("the adapters"):
        pipe.set_adapters(names, [scale for _, scale in adapters])


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Files that are missing or unfit are the user's to mend: told without a traceback."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        raise XditError(f"cannot load {what}: {error}") from error
