"""Autoencoders in tiny configurations, and latents and pictures for them: odd sizes, few frames.

Channels are as few as the classes allow, latents 7x9 (odd) or 8x10; videos have two or three latent frames.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers as d
import torch
from cases import randn, redraw
from emulation import difference
from torch import Tensor, nn

import xdit_compile
from xdit_compile.frontend.method_module import as_module
from xdit_compile.ir.pytree import flatten


@dataclass(frozen=True)
class Vae:
    """One autoencoder: its latents have ``channels``, ``frames`` (None for pictures) and sides of 1/``factor``."""

    name: str
    build: Callable[..., nn.Module]
    """Called with how many times as wide as tiny it shall be; once, by default."""
    channels: int
    factor: int
    frames: int | None = None
    stretch: int = 1
    """Frames of a video per latent frame, but for the first."""
    extra: dict[str, Any] = field(default_factory=dict)

    def latents(self, batch: int = 1, height: int = 7, width: int = 9) -> Tensor:
        frames = () if self.frames is None else (self.frames,)
        return randn(1, batch, self.channels, *frames, height, width)

    def inputs(self, method: str, batch: int = 1, height: int = 7, width: int = 9) -> dict[str, Any]:
        """Keyword arguments of ``decode`` or ``encode``, for latents of these sides."""
        if method == "encode":
            return {"x": self.pictures(batch, height, width), "return_dict": False}
        return {"z": self.latents(batch, height, width), "return_dict": False, **self.extra}

    def pictures(self, batch: int = 1, height: int = 7, width: int = 9) -> Tensor:
        frames = () if self.frames is None else ((self.frames - 1) * self.stretch + 1,)
        return randn(2, batch, 3, *frames, height * self.factor, width * self.factor)


def made(vae: Vae) -> Any:
    """The model, float32, in eval mode, with parameters drawn anew."""
    model = vae.build().eval().requires_grad_(False)
    redraw(model)
    return model


def kl(w: int = 1, **changes: Any) -> nn.Module:
    given = {"block_out_channels": (8 * w, 16 * w), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4,
             "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return d.AutoencoderKL(**(given | changes))


def wan(w: int = 1, **changes: Any) -> nn.Module:
    given = {"base_dim": 8 * w, "z_dim": 4, "dim_mult": [1, 2, 2], "num_res_blocks": 1,
             "temperal_downsample": [False, True], "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    return d.AutoencoderKLWan(**(given | changes))


def hunyuan(w: int = 1) -> nn.Module:
    return d.AutoencoderKLHunyuanVideo(block_out_channels=(8 * w, 8 * w, 16 * w, 16 * w), latent_channels=4,
                                       layers_per_block=1, norm_num_groups=4)


CASES = {v.name: v for v in [
    Vae("kl", kl, 4, 2),
    Vae("kl_plain", lambda w=1: kl(
        w, mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False), 4, 2),
    Vae("cogvideox", lambda w=1: d.AutoencoderKLCogVideoX(
        block_out_channels=(8 * w, 16 * w), layers_per_block=1, latent_channels=4, norm_num_groups=4,
        down_block_types=("CogVideoXDownBlock3D",) * 2, up_block_types=("CogVideoXUpBlock3D",) * 2,
        temporal_compression_ratio=2), 4, 2, 3, 2),
    Vae("mochi", lambda w=1: d.AutoencoderKLMochi(
        in_channels=15, encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32 * w,) * 4,
        latent_channels=4, layers_per_block=(1, 1, 1, 1, 1), add_attention_block=(False, True, False, False, True)),
        4, 8, 2, 6),
    Vae("wan", wan, 4, 4, 3, 2),
    Vae("wan_residual", lambda w=1: wan(w, is_residual=True, patch_size=2, in_channels=12, out_channels=12,
                                        decoder_base_dim=8 * w), 4, 8, 2, 2),
    Vae("qwen", lambda w=1: d.AutoencoderKLQwenImage(
        base_dim=8 * w, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4), 4, 4, 1, 2),
    Vae("ltx", lambda w=1: d.AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(8, 8, 16), decoder_block_out_channels=(8 * w, 8 * w, 16 * w),
        down_block_types=("LTXVideoDownBlock3D",) * 3, layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1), spatio_temporal_scaling=(True, True, False),
        decoder_spatio_temporal_scaling=(True, True, False), decoder_inject_noise=(False,) * 4,
        downsample_type=("conv",) * 3, upsample_residual=(False,) * 3, upsample_factor=(1,) * 3, patch_size=2),
        4, 8, 2, 4),
    Vae("hunyuan", hunyuan, 4, 8, 2, 4),
    Vae("hunyuan15", lambda w=1: d.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(16 * w, 16 * w, 32 * w), layers_per_block=1, spatial_compression_ratio=4,
        temporal_compression_ratio=4), 4, 4, 2, 4),
    Vae("dc", lambda w=1: d.AutoencoderDC(
        latent_channels=4, attention_head_dim=8, encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 16, 16),
        decoder_block_out_channels=(8 * w, 16 * w, 16 * w), encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1), encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,))), 4, 4),
    Vae("temporal", lambda w=1: d.AutoencoderKLTemporalDecoder(
        block_out_channels=(32 * w, 32 * w), layers_per_block=1, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2), 4, 2, extra={"num_frames": 1}),
]}


def unet() -> nn.Module:
    """Convolutions around attention at two resolutions, in the shape of the large picture models."""
    model = d.UNet2DConditionModel(
        in_channels=4, out_channels=4, block_out_channels=(16, 32, 32), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4, 4),
        transformer_layers_per_block=(1, 1, 2), cross_attention_dim=16, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64)
    model.eval().requires_grad_(False)
    redraw(model)
    return model


def unet_inputs(batch: int, height: int = 13, width: int = 18) -> dict[str, Any]:
    return {"sample": randn(3, batch, 4, height, width), "timestep": torch.tensor(500),
            "encoder_hidden_states": randn(4, batch, 7, 16), "return_dict": False,
            "added_cond_kwargs": {"text_embeds": randn(5, batch, 16), "time_ids": randn(6, batch, 6)}}


@torch.no_grad()
def error_on_processes(name: str, method: str, spec: str) -> float:
    """What a worker of the pool runs: the largest difference to the model itself, over the largest value."""
    model = made(CASES[name])
    inputs = CASES[name].inputs(method)
    expected = getattr(model, method)(**inputs)
    actual = xdit_compile.parallelize(as_module(model, method), spec, ranks=range(3),
                                       timeout=100)(**inputs)
    assert type(actual) is type(expected) and type(actual[0]) is type(expected[0])
    return max(map(difference, flatten(actual)[0], flatten(expected)[0]))
