"""Which errors while a model is captured are no matter of capturing: on one device they would be just the same."""

from __future__ import annotations

import dis
import traceback
from pathlib import Path
from types import FrameType

import torch

from xdit_compile.frontend import opaque_modules

_TORCH = Path(torch.__file__).parent
_PACKAGE = Path(opaque_modules.__file__).parents[1]
_RAISES = dis.opmap["RAISE_VARARGS"]


def not_of_capture(error: BaseException) -> bool:
    """Whether ``error`` is the lack of memory, or was raised by a ``raise`` or ``assert`` of the model's own code or of
    a library that it calls, or by Python for a key or a number, and not because of what tracing has raised there."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    frames = list(traceback.walk_tb(error.__traceback__))
    if not frames or error.__cause__ is not None or error.__context__ is not None:
        return False
    # A module left in Python is shown zeros, which it may refuse.
    if any(frame.f_code.co_filename == opaque_modules.__file__ for frame, _ in frames):
        return False
    # Python's own, of a missing key or a division by zero, are the same whatever tensors are.
    plain = isinstance(error, (LookupError, ArithmeticError)) or _raises(error)
    return plain and not _inside(frames[-1][0], _TORCH) and not _inside(frames[-1][0], _PACKAGE)


def _raises(error: BaseException) -> bool:
    """Whether the statement that the error comes from is one that raises."""
    last = error.__traceback__
    while last and last.tb_next:
        last = last.tb_next
    return last is not None and last.tb_frame.f_code.co_code[last.tb_lasti] == _RAISES


def _inside(frame: FrameType, folder: Path) -> bool:
    return folder in Path(frame.f_code.co_filename).parents
