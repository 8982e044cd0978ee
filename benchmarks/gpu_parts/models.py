"""The models that are measured, with random weights made where they run, and the arguments of one call."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gpu_parts.own_models import TwoStreams, Video


class Measured(NamedTuple):
    """A model and the keyword arguments of one call; ``name`` says whose class it is."""

    model: nn.Module
    inputs: dict[str, Any]
    name: str


@dataclass(frozen=True)
class ImageSize:
    """Tokens of an image and a text, heads and their width, blocks with two streams and with one, widths of inputs."""

    tokens: int
    text: int
    heads: int
    width: int
    double: int
    single: int
    channels: int = 64
    text_width: int = 4096
    pooled: int = 768


@dataclass(frozen=True)
class VideoSize:
    """Latent frames, rows and columns, heads and their width, width of the MLP, blocks, text and its width."""

    frames: int
    rows: int
    columns: int
    heads: int
    width: int
    inner: int
    blocks: int
    text: int = 512
    text_width: int = 4096
    channels: int = 16


FLUX = ImageSize(4096, 512, 24, 128, 19, 38)
"""FLUX.1-dev at 1024x1024."""
SMALL_FLUX = ImageSize(64, 16, 8, 32, 1, 1, 16, 32, 32)
WAN = VideoSize(21, 90, 160, 40, 128, 13824, 2)
"""Two of the forty blocks of Wan 14B, 81 frames at 720p: 75,600 tokens."""
SMALL_WAN = VideoSize(2, 8, 8, 4, 16, 128, 1, 16, 32)


@lru_cache
def why_own(own: bool) -> str | None:
    """Why the models of diffusers are not measured; None if they are."""
    if own:
        return "diffusers was to be left alone"
    try:
        importlib.import_module("diffusers").FluxTransformer2DModel  # noqa: B018  which is imported only now
    except Exception as error:  # whatever a package says that is there in parts
        return f"{type(error).__name__}: {error}"
    return None


@lru_cache(maxsize=1)
def image_model(size: ImageSize, device: str, dtype: torch.dtype, own: bool) -> Measured:
    """FLUX, of diffusers if it is there and not ``own``. The one that was asked for last is kept."""
    if why_own(own):
        return Measured(built(lambda: own_image_model(size), device, dtype),
                        image_inputs(size, device, dtype), "own model of the same size")
    from diffusers import FluxTransformer2DModel

    first = size.width // 8
    axes = (first, (size.width - first) // 2, (size.width - first) // 2)
    model = built(lambda: FluxTransformer2DModel(
        in_channels=size.channels, num_layers=size.double, num_single_layers=size.single,
        attention_head_dim=size.width, num_attention_heads=size.heads, joint_attention_dim=size.text_width,
        pooled_projection_dim=size.pooled, guidance_embeds=True, axes_dims_rope=axes), device, dtype)
    return Measured(model, image_inputs(size, device, dtype) | {"return_dict": False}, "diffusers")


def own_image_model(size: ImageSize) -> nn.Module:
    return TwoStreams(size.channels, size.text_width, size.pooled, size.heads, size.width, size.double, size.single)


def image_inputs(size: ImageSize, device: str, dtype: torch.dtype, batch: int = 1) -> dict[str, Any]:
    columns = max(1, int(size.tokens**0.5))
    place = torch.arange(size.tokens)
    made = {
        "hidden_states": random(1, batch, size.tokens, size.channels),
        "encoder_hidden_states": random(2, batch, size.text, size.text_width),
        "pooled_projections": random(3, batch, size.pooled), "timestep": torch.full((batch,), 0.5),
        "guidance": torch.full((batch,), 3.5),
    }
    ids = {"img_ids": torch.stack([place * 0, place // columns, place % columns], 1).float(),
           "txt_ids": torch.zeros(size.text, 3)}
    return {n: t.to(device, dtype) for n, t in made.items()} | {n: t.to(device) for n, t in ids.items()}


@lru_cache(maxsize=1)
def video_model(size: VideoSize, device: str, dtype: torch.dtype, own: bool) -> Measured:
    """Blocks of Wan, of diffusers if it is there and not ``own``. The one that was asked for last is kept."""
    inputs = {"hidden_states": random(1, 1, size.channels, size.frames, size.rows, size.columns).to(device, dtype),
              "timestep": torch.full((1,), 500.0, device=device),
              "encoder_hidden_states": random(2, 1, size.text, size.text_width).to(device, dtype)}
    if why_own(own):
        model = built(lambda: Video(size.channels, size.text_width, size.heads, size.width, size.inner, size.blocks),
                      device, dtype)
        return Measured(model, inputs, "own model of the same size")
    from diffusers import WanTransformer3DModel

    model = built(lambda: WanTransformer3DModel(
        num_attention_heads=size.heads, attention_head_dim=size.width, in_channels=size.channels,
        out_channels=size.channels, text_dim=size.text_width, ffn_dim=size.inner, num_layers=size.blocks),
        device, dtype)
    return Measured(model, inputs | {"return_dict": False}, "diffusers")


def built(make: Callable[[], nn.Module], device: str, dtype: torch.dtype) -> nn.Module:
    """A model whose weights are drawn on its device and in its type, without a copy elsewhere."""
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return make().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def random(seed: int, *shape: int) -> Tensor:
    """Equal on all devices and in all processes."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def forget() -> None:
    """Let go of all models."""
    image_model.cache_clear()
    video_model.cache_clear()
