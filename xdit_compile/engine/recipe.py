"""What the ranks of an engine are to make: a value that says where it comes from, and can be sent as text."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from xdit_compile.artifact.files import MANIFEST, ArtifactFolder
from xdit_compile.errors import LaunchError, XditError
from xdit_compile.pipelines.loading import PipelineSource
from xdit_compile.planner.auto import Auto
from xdit_compile.spec import ShardingSpec

Kind = Literal["pipeline", "function", "artifact"]


@dataclass(frozen=True)
class Recipe:
    """Where what is served comes from, and how it is run.

    Attributes:
        kind: a pipeline's folder or name on the hub; a function that makes a pipeline, a model or anything that can be
            called, as ``module:function`` or ``file.py:function``; or an artifact alone.
        source: the folder, name or function.
        spec: as it was given; empty for an artifact, which has its own.
        options: of `PipelineSource`, for a pipeline.
        artifacts: folders of artifacts in place of a pipeline's models, by the name of the component, or by none where
            its class tells.
        weights: of an artifact that holds none.
        native: run what artifacts hold compiled ahead.
        arguments: of the function.
        dtype: of a pipeline's weights: auto is bfloat16 on a GPU, float32 on a CPU.
        timeout: seconds to wait for another rank.
    """

    kind: Kind
    source: str
    spec: str
    options: Mapping[str, Any] = field(default_factory=dict)
    artifacts: Mapping[str, str] = field(default_factory=dict)
    weights: str | None = None
    native: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "auto"
    timeout: float = 600.0

    def to_json(self) -> dict[str, Any]:
        """As what can be sent."""
        return asdict(self)

    @classmethod
    def of_json(cls, held: Mapping[str, Any]) -> Recipe:
        return cls(**held)

    @property
    def pipeline(self) -> PipelineSource:
        return PipelineSource(self.source, **self.options)

    def __str__(self) -> str:
        return f"{self.source} under {self.spec or 'its own spec'}"


def named(source: str | Path | Callable[..., Any]) -> tuple[Kind, str]:
    """What kind of thing a user named, and its name.

    Raises:
        LaunchError: a function that workers cannot import. XditError: what is named is not there.
    """
    if isinstance(source, (str, Path)):
        text = str(source)
        if (Path(text) / MANIFEST).is_file():
            return "artifact", str(Path(text).resolve())
        if Path(text).is_dir():
            return "pipeline", str(Path(text).resolve())
        where, _, name = text.rpartition(":")
        if where and name.isidentifier():
            return "function", f"{Path(where).resolve()}:{name}" if where.endswith(".py") else text
        if text.endswith((".py", ".xdit")) or text.startswith((".", os.sep)):
            raise XditError(f"there is no folder {text}; name a pipeline by its folder or as on the hub, an artifact, "
                            "or a function as file.py:function")
        return "pipeline", text
    name, module = getattr(source, "__qualname__", ""), getattr(source, "__module__", "")
    if not callable(source) or not name.isidentifier():
        raise LaunchError(f"{name or source!r} cannot be made in other processes: workers import it by name. Give a "
                          "folder, or a function at the top level of a .py file; no lambda, no function in a function")
    if module != "__main__":
        return "function", f"{module}:{name}"
    script = getattr(sys.modules["__main__"], "__file__", None)
    if not script or not Path(script).is_file():
        raise LaunchError(f"{name} cannot be made in other processes: it lives in __main__ of a notebook or an "
                          "interactive session. Write it into a .py file and give 'file.py:function', or import it "
                          "from there")
    return "function", f"{Path(script).resolve()}:{name}"


def size_of(spec: str, world_size: int | None, artifact: str | None) -> int:
    """How many ranks there will be.

    Raises:
        SpecError: the spec asks for another number than ``world_size``.
    """
    if (auto := Auto.parse(spec)) is not None:
        auto.check_world(world_size or auto.world_size)
        return world_size or auto.world_size
    if artifact is not None:
        return world_size_of(artifact)
    parsed = ShardingSpec.parse(spec)
    parsed.check_world(parsed.world_size if world_size is None else world_size)
    return parsed.world_size


def world_size_of(artifact: str) -> int:
    """That of an artifact, from its manifest, which is checked when it is loaded."""
    found = ArtifactFolder.at(artifact).manifest["world_size"].value
    if not isinstance(found, int) or not 1 <= found <= 4096:
        raise XditError(f"{artifact} names no number of ranks")
    return found
