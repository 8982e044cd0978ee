"""Bodies of requests as arguments of the pipeline's call: only those that it takes, of types and sizes that it may."""

from __future__ import annotations

import base64
import binascii
import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from xdit_compile.errors import ArgumentError
from xdit_compile.pipelines.call_signature import ANY, CallSignature
from xdit_compile.serve.refusals import Refusal, bad
from xdit_compile.serve.settings import Limits

PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
OWN = ("generator", "output_type", "return_dict", "callback", "callback_steps", "callback_on_step_end",
       "callback_on_step_end_tensor_inputs")
"""Arguments of pipelines that a server sets, or that mean nothing over HTTP."""
SEEDS = 2**63
_PER_STEP = ("sigmas", "timesteps")
_DATA = re.compile(r"data:image/[a-z+.-]+;base64,", re.IGNORECASE)
_MOST_NUMBER = 2**53


@dataclass(frozen=True)
class Checked:
    """Arguments that suit the call.

    Attributes:
        seed: of the noise.
        count: how many times it is to be called, with seeds that follow each other.
    """

    arguments: Mapping[str, Any]
    seed: int
    count: int = 1


def checked(signature: CallSignature, limits: Limits, given: Mapping[str, Any], seed: int, count: int = 1,
            pictures: Mapping[str, Any] | None = None) -> Checked:
    """What a client gave, if it may.

    Args:
        pictures: that came as files, by argument.

    Raises:
        Refusal: naming the argument, and what it may be.
    """
    taken: dict[str, Any] = {**given, **(pictures or {})}
    for name in taken:
        if name in OWN:
            raise bad(f"{name} is set by the server" + ("; give a seed" if name == "generator" else ""), name)
    try:
        signature.check_names(taken)
        if missing := signature.missing(taken):
            raise bad(f"{signature.name} needs {', '.join(missing)}", missing[0])
        for name, value in given.items():
            signature.check_values({name: value})
    except ArgumentError as error:
        raise bad(str(error), next((n for n in given if n in str(error).split()), None)) from error
    made = {n: _value(n, v, signature, limits) for n, v in given.items()} | dict(pictures or {})
    _limited(signature, limits, made, count)
    return Checked(made, seed, count)


def seed_of(value: Any, default: int) -> int:
    """A seed, if it is one.

    Raises:
        Refusal: it is not a whole number of 64 bits.
    """
    if value is None:
        return default
    if type(value) is not int or not 0 <= value < SEEDS:
        raise bad(f"seed must be a whole number from 0 to {SEEDS - 1}", "seed")
    return value


def size_of(text: Any) -> dict[str, int]:
    """Height and width of a size such as ``1024x768``; nothing of ``auto``.

    Raises:
        Refusal: it is none.
    """
    if text is None or text == "auto":
        return {}
    found = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", text) if isinstance(text, str) else None
    if found is None:
        raise bad("size must be WIDTHxHEIGHT, as in 1024x1024, or auto", "size")
    return {"width": int(found[1]), "height": int(found[2])}


def picture(content: bytes, limits: Limits, name: str) -> Any:
    """A picture from a file's content.

    Raises:
        Refusal: it is none, or too large.
    """
    library = import_module("PIL.Image")
    try:
        opened = library.open(io.BytesIO(content), formats=PICTURE_FORMATS)
        if max(opened.size) > limits.side or math.prod(opened.size) > limits.pixels:
            raise bad(f"{name} has {opened.width}x{opened.height} pixels; at most {limits.side} a side and "
                      f"{limits.pixels} in all are taken", name)
        opened.load()
    except Refusal:
        raise
    except Exception as error:  # decoders raise anything for files that are damaged
        raise bad(f"{name} is no picture that can be read ({', '.join(PICTURE_FORMATS)})", name) from error
    return opened if opened.mode in ("L", "RGB", "RGBA") else opened.convert("RGB")


def _value(name: str, value: Any, signature: CallSignature, limits: Limits, depth: int = 0) -> Any:
    """A value as the call takes it: texts that are pictures as such, all of a length that may be."""
    if depth > 8:
        raise bad(f"{name} is nested too deeply", name)
    if isinstance(value, str):
        if _DATA.match(value):
            try:
                content = base64.b64decode(value.partition(",")[2], validate=True)
            except binascii.Error:
                raise bad(f"{name} is no picture: its base64 cannot be read", name) from None
            return picture(content, limits, name)
        kinds = signature.kinds.get(name, ANY)
        if not {"any", "str"} & set(kinds) and not any("str" in k[1] for k in kinds if not isinstance(k, str)):
            # Neither an address nor a path of this machine is ever opened.
            raise bad(f"{name} takes no text; give a picture as data:image/png;base64,...", name)
        if len(value) > limits.prompt:
            raise bad(f"{name} has {len(value)} characters; at most {limits.prompt} are taken", name)
        return value
    if isinstance(value, list):
        most = limits.steps + 1 if name in _PER_STEP else limits.images
        if depth == 0 and len(value) > most:
            raise bad(f"{name} has {len(value)} entries; at most {most} are taken", name)
        if not value:
            raise bad(f"{name} is empty", name)
        return [_value(name, v, signature, limits, depth + 1) for v in value]
    if isinstance(value, dict):
        return {k: _value(name, v, signature, limits, depth + 1) for k, v in value.items()}
    if isinstance(value, (int, float)) and not (abs(value) <= _MOST_NUMBER):
        raise bad(f"{name} is no number that can be used", name)
    return value


def _limited(signature: CallSignature, limits: Limits, made: Mapping[str, Any], count: int) -> None:
    def number(name: str) -> Any:
        return made.get(name, signature.defaults.get(name)) if name in signature.kinds else None

    for name, least, most in (("height", 1, limits.side), ("width", 1, limits.side),
                              ("num_inference_steps", 1, limits.steps), ("num_frames", 1, limits.frames),
                              ("num_images_per_prompt", 1, limits.images), ("num_videos_per_prompt", 1, limits.images),
                              ("max_sequence_length", 1, limits.prompt), ("frame_rate", 1, 240), ("fps", 1, 240)):
        if (found := number(name)) is not None and type(found) in (int, float) and not least <= found <= most:
            raise bad(f"{name} must be from {least} to {most}, got {found}", name)
    height, width = number("height"), number("width")
    if type(height) is int and type(width) is int and height * width > limits.pixels:
        raise bad(f"{width}x{height} are more than {limits.pixels} pixels", "size")
    lists = [len(v) for n, v in made.items() if isinstance(v, list) and n not in _PER_STEP]
    each = max(number("num_images_per_prompt") or 1, number("num_videos_per_prompt") or 1)
    if (asked := count * each * max(lists, default=1)) > limits.images:
        raise bad(f"{asked} results are asked for; at most {limits.images} are made for one request", "n")
