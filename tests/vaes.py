"""Autoencoders in tiny configurations, and latents and pictures for them: odd sizes, few frames.

Channels are as few as the classes allow, latents 7x9 (odd) or 8x10; videos have two or three latent frames.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers as d
from cases import randn, redraw
from torch import Tensor, nn


@dataclass(frozen=True)
class Vae:
    """One autoencoder: its latents have ``channels``, ``frames`` (None for pictures) and sides of 1/``factor``."""

    name: str
    build: Callable[[], nn.Module]
    channels: int
    factor: int
    frames: int | None = None
    stretch: int = 1
    """Frames of a video per latent frame, but for the first."""
    switch: Callable[[Any], None] | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def latents(self, batch: int = 1, height: int = 7, width: int = 9) -> Tensor:
        frames = () if self.frames is None else (self.frames,)
        return randn(1, batch, self.channels, *frames, height, width)

    def pictures(self, batch: int = 1, height: int = 7, width: int = 9) -> Tensor:
        frames = () if self.frames is None else ((self.frames - 1) * self.stretch + 1,)
        return randn(2, batch, 3, *frames, height * self.factor, width * self.factor)


def made(vae: Vae) -> Any:
    """The model, float32, in eval mode, with parameters drawn anew."""
    model = vae.build().eval().requires_grad_(False)
    redraw(model)
    if vae.switch:
        vae.switch(model)
    return model


def kl(**changes: Any) -> nn.Module:
    given = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4,
             "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return d.AutoencoderKL(**(given | changes))


def wan(**changes: Any) -> nn.Module:
    given = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2], "num_res_blocks": 1,
             "temperal_downsample": [False, True], "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    return d.AutoencoderKLWan(**(given | changes))


def hunyuan(**changes: Any) -> nn.Module:
    given = {"block_out_channels": (8, 8, 16, 16), "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 4}
    return d.AutoencoderKLHunyuanVideo(**(given | changes))


CASES = {v.name: v for v in [
    Vae("kl", kl, 4, 2),
    Vae("kl_plain", lambda: kl(mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False), 4, 2),
    Vae("cogvideox", lambda: d.AutoencoderKLCogVideoX(
        block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4,
        down_block_types=("CogVideoXDownBlock3D",) * 2, up_block_types=("CogVideoXUpBlock3D",) * 2,
        temporal_compression_ratio=2), 4, 2, 3, 2),
    Vae("mochi", lambda: d.AutoencoderKLMochi(
        in_channels=15, encoder_block_out_channels=(32, 32, 32, 32), decoder_block_out_channels=(32, 32, 32, 32),
        latent_channels=4, layers_per_block=(1, 1, 1, 1, 1), add_attention_block=(False, True, False, False, True)),
        4, 8, 2, 6),
    Vae("wan", wan, 4, 4, 3, 2),
    Vae("wan_residual", lambda: wan(is_residual=True, patch_size=2, in_channels=12, out_channels=12,
                                    decoder_base_dim=8), 4, 8, 2, 2),
    Vae("qwen", lambda: d.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4), 4, 4, 1, 2),
    Vae("ltx", lambda: d.AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(8, 8, 16), decoder_block_out_channels=(8, 8, 16),
        down_block_types=("LTXVideoDownBlock3D",) * 3, layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1), spatio_temporal_scaling=(True, True, False),
        decoder_spatio_temporal_scaling=(True, True, False), decoder_inject_noise=(False,) * 4,
        downsample_type=("conv",) * 3, upsample_residual=(False,) * 3, upsample_factor=(1,) * 3, patch_size=2),
        4, 8, 2, 4),
    Vae("hunyuan", hunyuan, 4, 8, 2, 4),
    Vae("hunyuan15", lambda: d.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(16, 16, 32), layers_per_block=1, spatial_compression_ratio=4,
        temporal_compression_ratio=4), 4, 4, 2, 4),
    Vae("dc", lambda: d.AutoencoderDC(
        latent_channels=4, attention_head_dim=8, encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 16, 16),
        decoder_block_out_channels=(8, 16, 16), encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1), encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,))), 4, 4),
    Vae("temporal", lambda: d.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), layers_per_block=1, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2), 4, 2, extra={"num_frames": 2}),
]}
