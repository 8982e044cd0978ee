"""Artifacts in the place of components of a pipeline: what was exported runs, and its weights are read nowhere else."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from xdit_compile.artifact.load import load, spec_and_class
from xdit_compile.artifact.running import Running
from xdit_compile.errors import SpecError, XditError
from xdit_compile.planner.auto import Auto
from xdit_compile.runtime.parallel_group import ParallelGroup
from xdit_compile.spec import ShardingSpec


def exported_spec(artifacts: Mapping[str, str], given: ShardingSpec | Auto) -> ShardingSpec:
    """That of the artifacts, run as ``given`` says.

    Raises:
        SpecError: ``given`` asks for other ranks or for a choice of them, or artifacts are for different ones.
    """
    if isinstance(given, Auto):
        raise SpecError("auto chooses a spec, but an artifact was exported for one; leave it out")
    specs = {spec_and_class(path)[0] for path in artifacts.values()}
    if len(specs) > 1:
        raise SpecError(f"the artifacts are for different specs, {' and '.join(map(str, specs))}; export them for one")
    (spec,) = specs
    if Running().on(given) not in (ShardingSpec(), spec):
        raise SpecError(f"the spec asks for {Running().on(given)}, but the artifact was exported for {spec}; leave it "
                        "out, or export the model for it")
    return Running.of(given).on(spec)


def pipeline_with(pipe: Any, artifacts: Mapping[str, str], source: str, spec: ShardingSpec,
                  place: torch.device) -> tuple[Any, ParallelGroup]:
    """``pipe``, which was loaded without these components, with artifacts in their places; and the ranks of one.

    Args:
        artifacts: folders by the names of components; source: of the pipeline, where their weights are.

    Raises:
        XditError: an artifact does not load.
    """
    made = {name: load(folder, _weights(Path(source) / name), device=place, backend=spec.backend,
                       mode=spec.compile_mode, compile_options=spec.compile_options,
                       onediff_backend=spec.onediff_backend, attention_kernel=spec.attention_kernel)
            for name, folder in artifacts.items()}
    # Made anew: what a pipeline reads of its components it reads when it is made.
    taken = inspect.signature(type(pipe).__init__).parameters
    options = {n: v for n, v in dict(pipe.config).items() if n in taken and n not in pipe.components}
    group = next(iter(made.values())).runners["forward"].group
    return type(pipe)(**{**pipe.components, **made}, **options), group


def named(artifacts: Mapping[str, str], components: Mapping[str, Any], pipeline: str) -> dict[str, str]:
    """The artifacts by component: that of the class that was exported, where none is named.

    Args:
        artifacts: folders by names, of which one may be empty; components: of a pipeline's folder, each its library and
            class.

    Raises:
        XditError: no component, or more than one, is of that class.
    """
    found = {}
    for name, folder in artifacts.items():
        _, cls = spec_and_class(folder)
        fits = [n for n, of in components.items() if isinstance(of, (list, tuple)) and cls in of]
        if name and name not in components:
            raise XditError(f"{pipeline} has no component {name}; it has {', '.join(components)}")
        if not name and len(fits) != 1:
            raise XditError(f"{folder} is a {cls}, of which {pipeline} has "
                            f"{' and '.join(fits) or 'none'}; say which it is for, as in --artifact NAME={folder}")
        found[name or fits[0]] = folder
    return found


def _weights(folder: Path) -> Path | None:
    return folder if folder.is_dir() else None
