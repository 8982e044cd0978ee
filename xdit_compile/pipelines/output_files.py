"""What a pipeline made, as files: pictures, videos, and tensors where it was asked for those."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xdit_compile.errors import XditError

FILMS = "frames"
"""The field that pipelines for videos answer with, a list of frames for each video."""


def absent(path: Path, overwrite: bool) -> None:
    """Refuse to write over what is there.

    Raises:
        XditError: there is such a file, or something in a folder of that name, and it may not be overwritten.
    """
    if not overwrite and (path.is_file() or (path.is_dir() and any(path.iterdir()))):
        raise XditError(f"{path} is there already; choose another name, or give --overwrite")


def kept_apart(folder: Path, overwrite: bool) -> None:
    """Refuse to write into a folder that holds results of an earlier run.

    Raises:
        XditError: naming one that could be written over.
    """
    found = sorted(p for p in folder.glob("*") if re.fullmatch(r"(image|video)-\d+\.\w+|\w+\.safetensors", p.name))
    if found and not overwrite:
        raise XditError(f"{found[0]} is there already; choose another --output, or give --overwrite")


def save(result: Any, folder: Path, frame_rate: int) -> tuple[list[Path], list[str]]:
    """Write each field of a pipeline's answer into ``folder``; the files, and what no file was written for.

    Pictures become ``image-0.png`` and so on, videos ``video-0.mp4`` (``.gif`` without imageio-ffmpeg), tensors and
    arrays ``FIELD.safetensors``. A file is there whole or not at all.
    """
    fields = dict(result) if isinstance(result, Mapping) else {f"result{i}": v for i, v in enumerate(result)}
    files: list[Path] = []
    others: list[str] = []
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as drafts:
        for field, value in fields.items():
            written = list(_write(field, value, Path(drafts), frame_rate))
            if not written and value is not None:
                others.append(f"{field}: {value}")
            for draft in written:
                files.append(draft.replace(folder / draft.name))
    return files, others


def _write(field: str, value: Any, folder: Path, frame_rate: int) -> Iterator[Path]:
    if tensors := _tensors(field, value):
        path = folder / f"{field}.safetensors"
        import_module("safetensors.torch").save_file(tensors, path)
        yield path
    elif pictures := _pictures(value):
        if field == FILMS:
            yield from _films(folder, value if isinstance(value[0], Sequence) else [value], frame_rate)
            return
        for path, picture in zip(_names(folder, "image", len(pictures), "png"), pictures, strict=True):
            picture.save(path)
            yield path


def _films(folder: Path, films: Sequence[Any], frame_rate: int) -> Iterator[Path]:
    export = import_module("diffusers.utils")
    coded = find_spec("imageio") is not None and find_spec("imageio_ffmpeg") is not None
    write = export.export_to_video if coded else export.export_to_gif
    for path, frames in zip(_names(folder, "video", len(films), "mp4" if coded else "gif"), films, strict=True):
        write(frames, str(path), fps=frame_rate)
        yield path


def _names(folder: Path, stem: str, count: int, suffix: str) -> Iterator[Path]:
    """Names whose alphabetical order is that of the results."""
    digits = len(str(count - 1))
    return (folder / f"{stem}-{i:0{digits}}.{suffix}" for i in range(count))


def _pictures(value: Any) -> list[Any]:
    """All pictures of a list, or of its lists, in order; none if it holds anything else."""
    if not isinstance(value, (list, tuple)):
        # Told by what they can do: their library is there only if one of them is.
        return [value] if hasattr(value, "save") and hasattr(value, "getpixel") else []
    inner = [_pictures(v) for v in value]
    return [picture for some in inner for picture in some] if all(inner) else []


def _tensors(name: str, value: Any) -> dict[str, torch.Tensor]:
    """The tensors and arrays in a field, by name; several are counted."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return {name: torch.as_tensor(value).detach().cpu().contiguous()}
    if isinstance(value, (list, tuple)):
        return {n: t for i, v in enumerate(value) for n, t in _tensors(f"{name}.{i}", v).items()}
    return {}
