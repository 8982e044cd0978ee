"""The folder of an artifact: written whole or not at all, and read only where it holds what its manifest says."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from xdit_compile.artifact.entries import Entry, parse
from xdit_compile.errors import ArtifactError

MANIFEST = "manifest.json"
FORMAT = "xdit_compile artifact"
VERSION = 4
LARGEST_TEXT = 32 * 2**20
"""Bytes of the largest manifest or graph that is read; those of the largest models have a few million. As values of
Python they take up to twenty times as much."""
TENSORS = ".safetensors"
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*(\.[a-z0-9_-]+)*")
_LONGEST_NAME = 128


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
        with _opened(path) as file:
            self.parts[name] = {"bytes": path.stat().st_size, "sha256": hash_of(file)}
            file.seek(0)
            if path.suffix == TENSORS:
                self.parts[name]["header"] = _hash_of_header(path, file)

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
    manifest: Entry
    digest: str
    """Of the manifest, and so of all that it names."""

    @staticmethod
    def at(path: str | Path) -> ArtifactFolder:
        """Raises ArtifactError where there is none, or one of another version."""
        path = Path(path)
        if not (path / MANIFEST).exists():
            raise ArtifactError(f"{path} is no artifact: it has no {MANIFEST}" if path.is_dir() else
                                f"there is no folder {path}")
        text = _content(path / MANIFEST)
        manifest = parse(text, str(path / MANIFEST))
        if "format" not in manifest or manifest["format"].value != FORMAT:
            raise ArtifactError(f"{path / MANIFEST} is not that of an {FORMAT}")
        if (found := manifest["version"].value) != VERSION or type(found) is not int:
            raise ArtifactError(f"{path} has version {found!r} of the format; this package reads "
                                f"version {VERSION}: export the model anew, or use the package that wrote it")
        return ArtifactFolder(path, manifest, hashlib.sha256(text).hexdigest())

    def file(self, name: Entry, whole: bool = True) -> Path:
        """The file of this name, which is as long as the manifest says and has the content whose hash is there; of
        tensors only the header is compared, with their names, types and places, unless it is looked at ``whole``.

        Raises:
            ArtifactError: it is not, or the name is not that of a file beside the manifest.
        """
        path, noted = self._noted(name)
        whole = whole or path.suffix != TENSORS
        with _opened(path) as file:
            self._sized(path, file, noted)
            self._hashed(path, hash_of(file) if whole else _hash_of_header(path, file),
                         noted["sha256" if whole else "header"])
        return path

    def read(self, name: Entry, most: int = LARGEST_TEXT) -> bytes:
        """The content of a file of at most so many bytes: that whose hash was compared, whatever becomes of the
        file."""
        path, noted = self._noted(name)
        with _opened(path) as file:
            self._sized(path, file, noted)
        data = _content(path, most)
        if len(data) != noted["bytes"].value:
            raise ArtifactError(f"{path} has changed while it was read")
        self._hashed(path, hashlib.sha256(data).hexdigest(), noted["sha256"])
        return data

    def _noted(self, name: Entry) -> tuple[Path, Entry]:
        """Where a file is, and what the manifest says of it."""
        if not isinstance(name.value, str) or len(name.value) > _LONGEST_NAME or not _NAME.fullmatch(name.value) or (
                name.value not in self.manifest["parts"]):
            raise ArtifactError(f"{name.where} names {name.value!r:.200}, which is none of the files of {self.path}")
        return self.path / name.value, self.manifest["parts"][name.value]

    @staticmethod
    def _sized(path: Path, file: BinaryIO, noted: Entry) -> None:
        size, written = os.fstat(file.fileno()).st_size, noted["bytes"].value
        if size != written:
            raise ArtifactError(f"{path} has {size} bytes, but was written with {written!r:.40}: it is damaged or was "
                                "replaced")

    @staticmethod
    def _hashed(path: Path, found: str, noted: Entry) -> None:
        if found != noted.value:
            raise ArtifactError(f"{path} does not have the hash that it was written with: it is damaged or was "
                                "replaced")


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A plain file: no link to elsewhere, and nothing that could be waited for."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ArtifactError(f"{path} is missing, or no plain file ({error.strerror})") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ArtifactError(f"{path} is missing, or no plain file")
    with open(handle, "rb") as file:
        yield file


def hash_of(file: BinaryIO) -> str:
    made = hashlib.sha256()
    while piece := file.read(2**20):
        made.update(piece)
    return made.hexdigest()


def _hash_of_header(path: Path, file: BinaryIO) -> str:
    """Of the length and the header that a safetensors file begins with."""
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if length > LARGEST_TEXT:
        raise ArtifactError(f"cannot read {path}: its header claims {length} bytes")
    return hashlib.sha256(start + file.read(length)).hexdigest()


def _content(path: Path, most: int = LARGEST_TEXT) -> bytes:
    with _opened(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise ArtifactError(f"{path} has {size} bytes, more than the {most} that it may have")
        # A file that grows meanwhile is not followed.
        return file.read(size)
