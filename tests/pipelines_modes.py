"""Pipelines that take a picture besides the words, or guide in other ways than by a negative prompt alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import pipelines_text as text
import torch
from cases import randn
from pipelines_images import flux_call, flux_parts, sd3_call, sd3_parts, sdxl_parts
from pipelines_parts import HEIGHT, STEPS, WIDTH, PipelineCase, changed, image_call, varied
from pipelines_videos import ltx_call, ltx_parts
from torch import Tensor

_HALF = {"num_inference_steps": 2 * STEPS, "strength": 0.5}
"""From a picture half noise: half of the steps are left to do."""


def _picture(height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    """Pixels in 0..1."""
    return randn(5, 1, 3, height, width).sigmoid()


def _sd3_image() -> Any:
    from diffusers import StableDiffusion3Img2ImgPipeline

    return StableDiffusion3Img2ImgPipeline(**sd3_parts())


def _sd3_image_call() -> dict[str, Any]:
    return sd3_call(image=_picture(), **_HALF)


def _flux_inpaint() -> Any:
    from diffusers import FluxInpaintPipeline

    return FluxInpaintPipeline(**flux_parts())


def _flux_inpaint_call() -> dict[str, Any]:
    """The right half is to be painted; after each step the rest is set back to the picture with less noise."""
    mask = torch.zeros(1, 1, HEIGHT, WIDTH)
    mask[..., WIDTH // 2 :] = 1
    return flux_call(True, image=_picture(), mask_image=mask, **_HALF)


def _sd3_control() -> Any:
    from diffusers import StableDiffusion3ControlNetPipeline

    return StableDiffusion3ControlNetPipeline(**sd3_parts(), controlnet=changed("sd3_net"))


def _sd3_control_call() -> dict[str, Any]:
    """At the last two steps its strength is zero."""
    return sd3_call(control_image=_picture(), controlnet_conditioning_scale=0.5, control_guidance_end=0.7)


def _sdxl_control() -> Any:
    """The half of a UNet that goes down, with residuals for the other."""
    from diffusers import ControlNetModel, StableDiffusionXLControlNetPipeline

    parts = sdxl_parts()
    control = ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(4, 4, 8, 8))
    return StableDiffusionXLControlNetPipeline(**parts, controlnet=control, add_watermarker=False)


def _sdxl_control_call() -> dict[str, Any]:
    return image_call(image=_picture(), controlnet_conditioning_scale=0.5)


def _pix2pix() -> Any:
    """Edits a picture: with words and picture, with the picture alone, with neither."""
    from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionInstructPix2PixPipeline

    parts = sdxl_parts()
    unet = varied(parts["unet"], in_channels=8, addition_embed_type=None, cross_attention_dim=16)
    return StableDiffusionInstructPix2PixPipeline(
        vae=parts["vae"], text_encoder=text.clip(16), tokenizer=parts["tokenizer"], unet=unet,
        scheduler=EulerAncestralDiscreteScheduler(beta_schedule="scaled_linear"), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _pix2pix_call() -> dict[str, Any]:
    """The size is the picture's."""
    call = image_call(image=_picture(), image_guidance_scale=1.5)
    return {name: value for name, value in call.items() if name not in ("height", "width")}


def _sd3_pag() -> Any:
    """A third of the batch goes through the first block with each image token attending to itself alone."""
    from diffusers import StableDiffusion3PAGPipeline

    return StableDiffusion3PAGPipeline(**sd3_parts(), pag_applied_layers="blocks.1")


def _sd3_pag_call() -> dict[str, Any]:
    call = sd3_call(pag_scale=2.0)
    return {name: value for name, value in call.items() if name != "max_sequence_length"}


def _ltx_image() -> Any:
    from diffusers import LTXImageToVideoPipeline

    return LTXImageToVideoPipeline(**ltx_parts())


def _ltx_image_call() -> dict[str, Any]:
    """The first latent frame is the picture's, without noise: a timestep for each token."""
    return ltx_call(image=_picture(9 * 32, 7 * 32))


def _hunyuan_image(third: bool) -> Any:
    """Guidance is a component, which keeps a running mean of differences. Third: one that leaves out a block."""
    from diffusers import AutoencoderKLHunyuanImage, FlowMatchEulerDiscreteScheduler, HunyuanImagePipeline
    from diffusers.guiders import AdaptiveProjectedMixGuidance, SkipLayerGuidance
    from diffusers.hooks import LayerSkipConfig

    guider = AdaptiveProjectedMixGuidance(3.5, adaptive_projected_guidance_start_step=2)
    if third:
        left_out = LayerSkipConfig(indices=[1], fqn="transformer_blocks")
        guider = SkipLayerGuidance(
            3.5, skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0, skip_layer_config=left_out
        )
    vae = AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32,) * 6, layers_per_block=1,
        spatial_compression_ratio=32, sample_size=64, scaling_factor=0.75, downsample_match_channel=False,
        upsample_match_channel=False,
    )  # fmt: skip
    return HunyuanImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0), vae=vae, text_encoder=text.qwen(pictures=True),
        tokenizer=text.qwen_tokenizer(), text_encoder_2=text.t5(24), tokenizer_2=text.byte_tokenizer(),
        transformer=changed("hunyuan_image_glyphs", text_embed_dim=24), guider=guider,
    )  # fmt: skip


def _hunyuan_image_call() -> dict[str, Any]:
    """What stands in quotes is also spelled for a second encoder."""
    call = image_call(height=9 * 64, width=7 * 64, prompt=f'{text.PROMPT} "snow"')
    return {name: value for name, value in call.items() if name != "guidance_scale"}


_SHORT = {"tokenizer_max_length": 14, "tokenizer_2_max_length": 19}

CASES = {
    "sd3_image": PipelineCase(_sd3_image, _sd3_image_call, "batched"),
    "flux_inpaint": PipelineCase(_flux_inpaint, _flux_inpaint_call, "twice", scale={"true_cfg_scale": 2.0}),
    "sd3_control": PipelineCase(_sd3_control, _sd3_control_call, "batched", others=("controlnet",)),
    "sdxl_control": PipelineCase(_sdxl_control, _sdxl_control_call, "batched", ("unet",), ("controlnet",)),
    "pix2pix": PipelineCase(_pix2pix, _pix2pix_call, "three", ("unet",), scale={"image_guidance_scale": 2.5}),
    "sd3_pag": PipelineCase(_sd3_pag, _sd3_pag_call, "three", scale={"pag_scale": 1.0}),
    "ltx_image": PipelineCase(_ltx_image, _ltx_image_call, "batched"),
    "hunyuan_image": PipelineCase(
        partial(_hunyuan_image, False), _hunyuan_image_call, "twice", scale={}, attributes=_SHORT
    ),
    "hunyuan_image_skip": PipelineCase(
        partial(_hunyuan_image, True), _hunyuan_image_call, "thrice", scale={}, attributes=_SHORT
    ),
}
