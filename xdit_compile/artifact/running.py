"""What an artifact needs, and how it is run. Files say the first; the second is for who loads them alone, because
compilers are programs that are started with options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from xdit_compile.artifact.entries import Entry
from xdit_compile.errors import ArtifactError, SpecError
from xdit_compile.spec import ShardingSpec


@dataclass(frozen=True)
class Running:
    """How programs are run: those words of a spec that change no program. As in `ShardingSpec`."""

    backend: str = "eager"
    compile_mode: str = "default"
    onediff_backend: str = ""
    compile_options: str | Mapping[str, Any] = ""
    attention_kernel: str = "auto"

    def on(self, spec: ShardingSpec) -> ShardingSpec:
        """``spec`` with these words."""
        return replace(spec, **{f.name: getattr(self, f.name) for f in fields(self)})

    @staticmethod
    def of(spec: ShardingSpec) -> Running:
        return Running(**{f.name: getattr(spec, f.name) for f in fields(Running)})

    @property
    def words(self) -> list[str]:
        """Those that are not left out, as `load` calls them."""
        return [f"{f.name.replace('compile_mode', 'mode')}={getattr(self, f.name)}" for f in fields(self)
                if getattr(self, f.name) != f.default]


def needed(entry: Entry) -> ShardingSpec:
    """The spec in a file.

    Raises:
        ArtifactError: it is none, or says more than what is needed.
    """
    try:
        spec = ShardingSpec.parse(entry.text())
    except SpecError as error:
        raise ArtifactError(f"{entry.where} is no spec: {error!s:.500}") from error
    if words := Running.of(spec).words:
        raise ArtifactError(f"{entry.where} says {', '.join(words)!s:.200}, but how programs are run is not for a file "
                            "to say: give it to load()")
    if spec.vae_degree > 1 or spec.encoders != "everywhere":
        raise ArtifactError(f"{entry.where} speaks of a pipeline's autoencoder or encoders, but this is one model")
    return spec
