"""A server of the tests: its engine real, in two processes, its port on loopback, and what it should answer."""

from __future__ import annotations

import base64
import io
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import engine_makers
import httpx
import numpy as np
import torch
import uvicorn
from PIL import Image

import xdit_compile
from xdit_compile.serve.app import Server, application
from xdit_compile.serve.settings import Settings

IMAGES = "/v1/images/generations"
PAINTER = f"{engine_makers.__file__}:painter"


@contextmanager
def served(settings: Settings, engine: Any) -> Iterator[tuple[httpx.Client, Server]]:
    """A server on an engine, and a client of it."""
    port = free_port()
    server = Server(settings, lambda: engine, lambda: None)
    runner = uvicorn.Server(uvicorn.Config(application(server), "127.0.0.1", port, log_level="error"))
    thread = threading.Thread(target=runner.run, daemon=True)
    thread.start()
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        ready(client)
        yield client, server
    runner.should_exit = True
    thread.join(60)
    assert not thread.is_alive()


class Kept:
    """An engine that a server does not close when it stops."""

    def __init__(self, engine: xdit_compile.Engine) -> None:
        self._engine = engine

    def close(self) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def ready(client: httpx.Client, seconds: float = 120, lives: Callable[[], object] = lambda: None) -> None:
    """Wait until a server takes calls; ``lives`` raises if it has ended."""
    deadline = time.monotonic() + seconds
    while True:
        lives()
        try:
            if client.get("/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline, "the server is not ready"
        time.sleep(0.1)


def drawn(prompt: str, seed: int, steps: int = 4, size: tuple[int, int] = (8, 8)) -> np.ndarray:
    """The picture that two ranks of a `Painter` make, computed here."""
    x = torch.rand(3, *size, generator=torch.Generator().manual_seed(seed)) + len(prompt)
    for i in range(steps):
        x = 2 * torch.sin(x * 1.5 + i)
    return ((x + 2) / 4 * 255).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()


def pixels(content: bytes | str) -> np.ndarray:
    held = base64.b64decode(content) if isinstance(content, str) else content
    return np.asarray(Image.open(io.BytesIO(held)))


def png(value: int, size: tuple[int, int] = (2, 2)) -> bytes:
    held = io.BytesIO()
    Image.new("RGB", size, (value, 0, 0)).save(held, "PNG")
    return held.getvalue()


def malformed(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A path and a request that is wrong somehow."""
    good: dict[str, Any] = {"prompt": "a", "seed": 1, "size": "8x8", "n": 1, "num_inference_steps": 1}
    junk = [None, -1, 0.5, 2**70, "", "\0", [], [[]], {}, {"a": {"b": [1]}}, True, "x" * 500, "data:image/png;base64,"]
    kind = rng.randrange(5)
    path = rng.choice([IMAGES, "/v1/jobs", "/v1/videos", "/generate"])
    if kind == 0:
        text = json.dumps(good)
        cut = text[: rng.randrange(len(text))] + rng.choice(["", "\xff", "]", "[" * 2000])
        return path, {"content": cut.encode("latin-1"), "headers": {"Content-Type": "application/json"}}
    if kind == 1:
        return path, {"json": good | {"".join(rng.choices("abcdefgh_", k=6)): rng.choice(junk)}}
    if kind == 2:
        name = rng.choice(["prompt", "num_inference_steps", "height", "guidance_scale", "image", "negative_prompt"])
        wrong = {"prompt": [3, None, {}, []], "num_inference_steps": [0, -4, 1.5, "1", [1], 2**70],
                 "height": [0, -8, 8.5, "8", 10**9], "guidance_scale": ["high", [], {}, 1e300],
                 "image": ["x", "data:image/png;base64,AAAA", "file:///etc/passwd"], "negative_prompt": [1, {}, True]}
        body = {k: v for k, v in good.items() if k not in ("size", "n")} | {name: rng.choice(wrong[name])}
        return path, {"json": body}
    if kind == 3:
        return path, {"content": rng.randbytes(rng.randrange(300)), "headers": {"Content-Type": rng.choice(
            ["application/json", "multipart/form-data", "text/html", ""])}}
    return "/v1/images/edits", {"content": rng.randbytes(200), "headers": {
        "Content-Type": rng.choice(["multipart/form-data; boundary=x", "multipart/form-data", "application/json"])}}
