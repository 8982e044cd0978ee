"""The folder of an artifact: written whole or not at all, and read only where it holds what its manifest says."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xdit_compile.errors import ArtifactError

MANIFEST = "manifest.json"
FORMAT = "xdit_compile artifact"
VERSION = 2
LARGEST_TEXT = 256 * 2**20
"""Bytes of the largest manifest or graph that is read; those of the largest models have a few million."""
TENSORS = ".safetensors"
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*(\.[a-z0-9_-]+)*")


@dataclass
class ArtifactDraft:
    """An artifact that is being written, in a folder of its own."""

    folder: Path
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, data: bytes, suffix: str) -> str:
        """The name of a file with this content; equal contents are one file."""
        name = f"{hashlib.sha256(data).hexdigest()[:20]}.{suffix}"
        if name not in self.parts:
            (self.folder / name).write_bytes(data)
            self._note(name)
        return name

    def adopt(self, name: str) -> str:
        """A file that was written into the folder by this name."""
        self._note(name)
        return name

    def _note(self, name: str) -> None:
        assert _NAME.fullmatch(name), name
        path = self.folder / name
        self.parts[name] = {"bytes": path.stat().st_size, "sha256": hash_of(path)}
        if path.suffix == TENSORS:
            self.parts[name]["header"] = _hash_of_header(path)

    def finish(self, manifest: Mapping[str, Any]) -> None:
        whole = {"format": FORMAT, "version": VERSION, **manifest, "parts": dict(sorted(self.parts.items()))}
        (self.folder / MANIFEST).write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n")


@contextmanager
def drafted(path: Path, overwrite: bool) -> Iterator[ArtifactDraft]:
    """A draft that becomes the artifact at ``path`` if nothing fails.

    Raises:
        ArtifactError: something is there already.
    """
    if path.exists() and not overwrite:
        raise ArtifactError(f"{path} is there already; give overwrite=True (--overwrite) to replace it")
    if path.exists() and not (path / MANIFEST).is_file():
        raise ArtifactError(f"{path} is no artifact and will not be replaced")
    path.parent.mkdir(parents=True, exist_ok=True)
    folder, old = (path.parent / f".{path.name}-{secrets.token_hex(6)}" for _ in range(2))
    folder.mkdir()
    try:
        yield ArtifactDraft(folder)
        if path.exists():
            path.rename(old)
        folder.rename(path)
    finally:
        for left in (folder, old):
            shutil.rmtree(left, ignore_errors=True)


@dataclass(frozen=True)
class ArtifactFolder:
    """An artifact that was written before. Its manifest is read; other files when they are asked for."""

    path: Path
    manifest: Mapping[str, Any]
    digest: str
    """Of the manifest, and so of all that it names."""

    @staticmethod
    def at(path: str | Path) -> ArtifactFolder:
        """Raises ArtifactError where there is none, or one of another version."""
        path = Path(path)
        if not (path / MANIFEST).is_file():
            raise ArtifactError(f"{path} is no artifact: it has no {MANIFEST}")
        text = _small(path / MANIFEST)
        try:
            manifest = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{path / MANIFEST} is damaged: {error}") from error
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise ArtifactError(f"{path / MANIFEST} is not that of an {FORMAT}")
        if manifest.get("version") != VERSION:
            raise ArtifactError(f"{path} has version {manifest.get('version')!r} of the format; this package reads "
                                f"version {VERSION}: export the model anew, or use the package that wrote it")
        return ArtifactFolder(path, manifest, hashlib.sha256(text).hexdigest())

    def file(self, name: Any, whole: bool = True) -> Path:
        """The file of this name, which is as long as the manifest says and has the content whose hash is there; of
        tensors only the header is compared, with their names, types and places, unless it is looked at ``whole``.

        Raises:
            ArtifactError: it is not, or the name is not that of a file beside the manifest.
        """
        noted = self.manifest.get("parts", {}).get(name) if isinstance(name, str) else None
        if not isinstance(name, str) or not _NAME.fullmatch(name) or not isinstance(noted, dict):
            raise ArtifactError(f"{self.path} names {name!r}, which is none of its files")
        path = self.path / name
        if path.is_symlink() or not path.is_file():
            raise ArtifactError(f"{path} is missing, or no plain file")
        if path.stat().st_size != noted.get("bytes"):
            raise ArtifactError(f"{path} has {path.stat().st_size} bytes, but was written with {noted.get('bytes')}: "
                                "it is damaged or was replaced")
        whole = whole or path.suffix != TENSORS
        if (hash_of(path) if whole else _hash_of_header(path)) != noted.get("sha256" if whole else "header"):
            raise ArtifactError(f"{path} does not have the hash that it was written with: it is damaged or was "
                                "replaced")
        return path

    def read(self, name: Any) -> bytes:
        """The content of a file that fits into memory."""
        return _small(self.file(name))


def hash_of(path: Path) -> str:
    made = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            made.update(piece)
    return made.hexdigest()


def _hash_of_header(path: Path) -> str:
    """Of the length and the header that a safetensors file begins with."""
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if length > LARGEST_TEXT:
            raise ArtifactError(f"cannot read {path}: its header claims {length} bytes")
        return hashlib.sha256(start + file.read(length)).hexdigest()


def _small(path: Path) -> bytes:
    if (size := path.stat().st_size) > LARGEST_TEXT:
        raise ArtifactError(f"{path} has {size} bytes, more than any manifest or graph")
    return path.read_bytes()
