"""What a pipeline answered, as the files that clients get."""

from __future__ import annotations

import io
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xdit_compile.pipelines.output_files import FILMS, save

FORMATS = {"png": ("PNG", "image/png"), "jpeg": ("JPEG", "image/jpeg"), "webp": ("WEBP", "image/webp")}
_TYPES = {".mp4": "video/mp4", ".gif": "image/gif", ".png": "image/png", ".safetensors": "application/octet-stream"}
PICTURES = "images"
"""The field that pipelines for images answer with."""


class File(NamedTuple):
    """One result."""

    name: str
    media_type: str
    content: bytes
    seed: int


def files_of(answer: Any, seed: int, frame_rate: int, form: str = "png", quality: int = 90) -> list[File]:
    """Pictures in the form asked for, videos as MP4 (GIF without imageio-ffmpeg), anything else as safetensors."""
    fields = dict(answer) if isinstance(answer, Mapping) else {}
    pictures = fields.get(PICTURES)
    if isinstance(pictures, Sequence) and pictures and all(hasattr(p, "save") for p in pictures):
        return [File(f"image-{i}.{form}", FORMATS[form][1], _encoded(p, form, quality), seed)
                for i, p in enumerate(pictures)]
    with tempfile.TemporaryDirectory() as folder:
        found, _ = save(answer, Path(folder), frame_rate)
        return [File(path.name, _TYPES.get(path.suffix, "application/octet-stream"), path.read_bytes(), seed)
                for path in found]


def samples_of(answer: Any, count: int) -> list[Any] | None:
    """The answers of calls that were made as one; None if it cannot be told which part is whose."""
    if not isinstance(answer, Mapping):
        return None
    parts = {name: value for name, value in answer.items() if value is not None}
    field = next((n for n in (PICTURES, FILMS) if n in parts), None)
    if field is None or len(parts) > 1 or not isinstance(parts[field], (Sequence, np.ndarray)) or (
            len(parts[field]) != count):
        return None
    return [{field: parts[field][i : i + 1]} for i in range(count)]


def _encoded(picture: Any, form: str, quality: int) -> bytes:
    held = io.BytesIO()
    # Runs alone make a PNG of a photograph as small as the search for more, in less than half of the time.
    options = {"compress_type": zlib.Z_RLE} if form == "png" else {"quality": quality}
    if form == "jpeg" and picture.mode not in ("L", "RGB"):
        picture = picture.convert("RGB")
    picture.save(held, FORMATS[form][0], **options)
    return held.getvalue()
