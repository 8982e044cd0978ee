"""What engines of the tests make in their workers: imported there by name."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from torch import nn


class Toy:
    """Something that is called, with steps, methods and a state, on two ranks that need each other."""

    def __init__(self, spec: str, factor: float) -> None:
        self.spec, self.factor, self.adapters = spec, factor, [""]

    def __call__(self, x: torch.Tensor, steps: int = 3, pause: float = 0.0, fail_on: int = -1,
                 generator: torch.Generator | None = None,
                 on_step: Callable[[int, int], None] = lambda done, total: None) -> dict[str, Any]:
        x.mul_(self.factor)  # of this rank alone, whatever the others were sent
        for i in range(steps):
            time.sleep(pause)
            if dist.get_rank() == fail_on:
                raise KeyError(f"rank {fail_on}")
            dist.all_reduce(x)
            on_step(i + 1, steps)
        drawn = torch.rand(2, generator=generator)
        return {"x": x, "drawn": drawn, "pid": os.getpid(), "adapters": list(self.adapters), "spec": self.spec}

    def load_lora_weights(self, path: str, adapter_name: str = "default") -> None:
        if path == "missing":
            raise OSError(f"there is no {path}")
        self.adapters.append(adapter_name)

    def pids(self) -> list[int]:
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, os.getpid())
        return found


def toy(spec: str, factor: float = 1.0) -> Toy:
    return Toy(spec, factor)


class Block(nn.Module):
    """A transformer small enough to be captured at once."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, tokens: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.qkv(tokens) * timestep).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        done = nn.functional.scaled_dot_product_attention(q, k, v)
        return tokens + self.out(done.transpose(1, 2).flatten(2))


def block() -> nn.Module:
    torch.manual_seed(0)
    return Block().eval()


def nothing() -> int:
    return 3


class Painter:
    """A pipeline as a server sees it: a picture that only this prompt, seed and number of steps give."""

    def __init__(self) -> None:
        self.spoilt = False

    def __call__(self, prompt: str | list[str], negative_prompt: str | list[str] | None = None,
                 height: int | None = None, width: int | None = None, num_inference_steps: int = 4,
                 guidance_scale: float = 1.0, image: Image.Image | None = None, pause: float = 0.0,
                 generator: torch.Generator | list[torch.Generator] | None = None, output_type: str | None = "pil",
                 on_step: Callable[[int, int], None] = lambda done, total: None) -> dict[str, Any]:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        drawn = generator if isinstance(generator, list) else [generator]
        if guidance_scale < 0:
            raise ValueError("guidance_scale must not be negative")
        if prompts[0] == "kill" and dist.get_rank() == 1:
            os.kill(os.getpid(), 9)
        size = (height or 8, width or 8)
        samples = [torch.rand(3, *size, generator=g) + len(p) for p, g in zip(prompts, drawn, strict=True)]
        if image is not None:
            samples = [s + image.getpixel((0, 0))[0] for s in samples]
        x = torch.stack(samples)
        for i in range(num_inference_steps):
            time.sleep(pause)
            x = torch.sin(x * 1.5 + i)
            dist.all_reduce(x)
            on_step(i + 1, num_inference_steps)
        if len(prompts) > 1 and self.spoilt:
            x = x * (1 + 1e-6)  # which no picture shows
        if output_type == "np":
            return {"images": x.numpy()}
        pixels = ((x + 2) / 4 * 255).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
        return {"images": [Image.fromarray(p) for p in pixels]}

    def spoil(self) -> None:
        self.spoilt = True


def painter() -> Painter:
    return Painter()
