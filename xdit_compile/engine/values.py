"""What travels between a handle and its ranks: JSON, and tensors beside it. Nothing is pickled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch

from xdit_compile.artifact.json_values import Result
from xdit_compile.errors import XditError
from xdit_compile.runtime.control.message_codec import Kind, decoded, encoded

# Modes of pictures whose bytes are all there is to them; others are converted.
_MODES = ("1", "L", "LA", "RGB", "RGBA", "I;16", "I", "F", "CMYK", "YCbCr", "HSV")


def _is_picture(value: Any) -> bool:
    # Told by what it can do: its library is there only if one of them is.
    return hasattr(value, "getpixel") and hasattr(value, "tobytes")


def _written_picture(picture: Any) -> Any:
    if picture.mode not in _MODES:
        picture = picture.convert("RGBA")
    return picture.mode, tuple(picture.size), torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)


def _read_picture(held: Any) -> Any:
    mode, size, content = held
    if mode not in _MODES:
        raise ValueError(f"no mode of pictures: {mode!r}")
    return import_module("PIL.Image").frombytes(mode, tuple(size), content.numpy().tobytes())


def _read_generator(held: Any) -> torch.Generator:
    device, state = held
    made = torch.Generator(device)
    made.set_state(state)
    return made


KINDS = (
    Kind("picture", _is_picture, _written_picture, _read_picture),
    Kind("array", lambda v: isinstance(v, np.ndarray), lambda v: torch.from_numpy(np.array(v, order="C")),
         lambda held: held.numpy()),
    Kind("number", lambda v: isinstance(v, np.generic), lambda v: v.item(), lambda held: held),
    Kind("generator", lambda v: isinstance(v, torch.Generator), lambda v: (v.device.type, v.get_state()),
         _read_generator),
    Kind("result", lambda v: isinstance(v, Result), lambda v: dict(v), lambda held: Result(held)),
)
"""Beside those of the codec: pictures, arrays, generators with their state, results of loaded artifacts."""


def written(value: Any) -> tuple[bytes, list[torch.Tensor]]:
    """As text and tensors, which are on the CPU and contiguous.

    Raises:
        XditError: it holds what cannot be sent, such as a function.
    """
    try:
        text, tensors = encoded(value, KINDS)
    except XditError as error:
        raise XditError(f"{error}, pictures, numpy arrays and generators. A function runs in the workers if they can "
                        "import it: see `start(make, ...)`; of progress, on_step= is told") from error
    return text, [t.detach().cpu().contiguous() for t in tensors]


def read(text: bytes, tensor: Callable[[tuple[int, ...], torch.dtype], torch.Tensor]) -> Any:
    """What was written. Of outputs of models whose class is not loaded here, fields of the same names.

    Raises:
        XditError: nothing that `written` makes.
    """
    return decoded(text, tensor, KINDS, Result)


Packed = tuple[bytes, list[Any]]
"""Text, and the bytes of each tensor as an array, which others than this package move."""


def packed(value: Any) -> Packed:
    """As text and arrays. Raises XditError as `written`."""
    text, tensors = written(value)
    return text, [t.reshape(-1).view(torch.uint8).numpy() for t in tensors]


def unpacked(held: Packed) -> Any:
    """What was packed. Its tensors are copies: what was moved may be shared, and not to be written into."""
    text, arrays = held
    waiting = iter(arrays)

    def tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(np.array(next(waiting))).view(dtype).reshape(shape)

    return read(text, tensor)


def generators(value: Any) -> Iterator[torch.Generator]:
    """Those in a call's arguments, in order, each time they occur."""
    if isinstance(value, torch.Generator):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from generators(part)
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        for part in value:
            yield from generators(part)
