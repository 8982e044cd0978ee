"""What a test pipeline is: real components of diffusers in tiny configurations, and a call that runs in about a second.

The denoisers are those of the zoo, where need be with other numbers; parameters are drawn anew, so that none is zero.
Images are 9x7 patches; latents come out undecoded where a pipeline can leave them so.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import zoo
from cases import redraw
from pipelines_text import NEGATIVE, OTHER, PROMPT
from torch import nn

STEPS = 6
HEIGHT, WIDTH = 144, 112  # 9x7 patches of 2x2 latents of 8x8 pixels

GUIDANCE = {
    "none": [(1,)] * STEPS,
    "batched": [(2,)] * STEPS,
    "twice": [(1, 1)] * STEPS,
    "three": [(3,)] * STEPS,
    "thrice": [(1, 1), *[(1, 1, 1)] * (STEPS - 1)],
    "skip": [(2,), *[(2, 1)] * 3, (2,), (2,)],
}
"""The batches of the calls to the denoiser, step by step. Thrice and skip: some call it again, with fewer layers."""


@dataclass(frozen=True)
class PipelineCase:
    """One pipeline and a way to call it."""

    build: Callable[[], Any]  # the pipeline as its classes initialise it
    call: Callable[[], dict[str, Any]]  # keyword arguments of a call, without generator
    guidance: str  # which of GUIDANCE
    denoisers: tuple[str, ...] = ("transformer",)  # the components that run at each step, or one of which does
    others: tuple[str, ...] = ()  # further components that take part at each step
    prompt: Mapping[str, Any] = field(default_factory=lambda: {"prompt": OTHER})  # arguments that ask for another
    scale: Mapping[str, Any] = field(default_factory=lambda: {"guidance_scale": 2.0})  # for weaker guidance
    attributes: Mapping[str, Any] = field(default_factory=dict)  # of a loaded pipeline, which no folder keeps

    @property
    def batches(self) -> list[tuple[int, ...]]:
        """For each step, the batch of each call to a denoiser."""
        return GUIDANCE[self.guidance]


def made(case: PipelineCase) -> Any:
    """The case's pipeline with all its parameters drawn anew, in eval mode."""
    pipe = case.build()
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            redraw(part.float().eval().requires_grad_(False), zlib.crc32(name.encode()))
    return pipe


def changed(name: str, **config: Any) -> Any:
    """The zoo's model of that name, with other values in its configuration."""
    return varied(zoo.CASES[name].build(), **config)


def varied(model: Any, **config: Any) -> Any:
    """A model as the given one, with other values in its configuration."""
    kept = {key: value for key, value in model.config.items() if not key.startswith("_")}
    return type(model).from_config(kept | config)


def image_vae(**config: Any) -> Any:
    """Four latent channels, eight pixels to a side of a latent one."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(4, 4, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4, norm_num_groups=2,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, latent_channels=4, sample_size=128, **config,
    )  # fmt: skip


def flow_vae() -> Any:
    """As the flow models use it: latents are shifted, and no convolutions at the bottleneck."""
    return image_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5)


def asked(**arguments: Any) -> dict[str, Any]:
    """A call with prompts, whose answer are latents."""
    return {
        "prompt": PROMPT, "negative_prompt": NEGATIVE, "num_inference_steps": STEPS, "guidance_scale": 3.5,
        "output_type": "latent",
    } | arguments  # fmt: skip


def image_call(**arguments: Any) -> dict[str, Any]:
    """A call for an image of 9x7 patches."""
    return asked(height=HEIGHT, width=WIDTH) | arguments
