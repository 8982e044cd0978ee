"""What a server allows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for.

    Attributes:
        side, pixels: of a picture; ``pixels`` of a frame.
        steps: of denoising.
        frames: of a video.
        images: pictures or videos, all prompts together.
        prompt: characters of any text.
        body: bytes of a request.
        seconds: from its arrival to its answer, waiting included.
        kept: finished jobs whose results are held, the oldest given up first.
    """

    side: int = 4096
    pixels: int = 4096 * 4096
    steps: int = 200
    frames: int = 512
    images: int = 8
    prompt: int = 10_000
    body: int = 32 * 2**20
    seconds: float = 3600.0
    kept: int = 64


@dataclass(frozen=True)
class Settings:
    """How a server is reached, and what it does.

    Attributes:
        model: the name under which clients see it.
        queue: requests that may wait; more are told to come again (429).
        batch: requests that may share a call.
        grace: seconds for what is under way when the server is told to stop.
        frame_rate: frames a second of videos whose pipeline takes none.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str = ""
    queue: int = 64
    batch: int = 1
    grace: float = 30.0
    frame_rate: int = 8
    limits: Limits = Limits()
