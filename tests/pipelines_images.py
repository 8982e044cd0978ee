"""Pipelines from text to image."""

from __future__ import annotations

from functools import partial
from typing import Any

import pipelines_text as text
from pipelines_parts import STEPS, PipelineCase, changed, flow_vae, image_call, image_vae


def _flow(**config: Any) -> Any:
    """The scheduler of most."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**config)


def _dit() -> Any:
    from diffusers import DiTPipeline, DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(prediction_type="v_prediction")
    return DiTPipeline(changed("dit", sample_size=18), image_vae(), scheduler)


def _dit_call() -> dict[str, Any]:
    """Classes in place of words; a square image, which is decoded always."""
    return {"class_labels": [7], "num_inference_steps": STEPS, "guidance_scale": 3.5, "output_type": "np"}


def _pixart(alpha: bool) -> Any:
    """Alpha: takes the size of the picture, as the 1024 pixel model does, by which ``sample_size`` goes."""
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline

    denoiser = changed("pixart_alpha", sample_size=128) if alpha else changed("pixart_sigma")
    pipe = PixArtAlphaPipeline if alpha else PixArtSigmaPipeline
    return pipe(text.t5_tokenizer(), text.t5(), image_vae(), denoiser, DPMSolverMultistepScheduler())


def _pixart_call() -> dict[str, Any]:
    return image_call(use_resolution_binning=False, clean_caption=False, max_sequence_length=13)


def sd3_parts() -> dict[str, Any]:
    """Both CLIP's projections make up the pooled text, their tokens stand before those of T5."""
    return {
        "transformer": changed("sd3"), "scheduler": _flow(shift=3.0), "vae": flow_vae(),
        "text_encoder": text.clip(8, 12), "tokenizer": text.clip_tokenizer(),
        "text_encoder_2": text.clip(12, 12), "tokenizer_2": text.clip_tokenizer(),
        "text_encoder_3": text.t5(), "tokenizer_3": text.t5_tokenizer(),
    }  # fmt: skip


def _sd3() -> Any:
    from diffusers import StableDiffusion3Pipeline

    return StableDiffusion3Pipeline(**sd3_parts())


def sd3_call(**arguments: Any) -> dict[str, Any]:
    return image_call(max_sequence_length=14) | arguments


def _sd3_skip_call() -> dict[str, Any]:
    """Steps 1 to 3 of 0 to 5 are done once more without the second block."""
    return sd3_call(skip_guidance_layers=[1], skip_layer_guidance_stop=0.6)


def flux_parts() -> dict[str, Any]:
    """Guidance as an embedding."""
    return {
        "transformer": changed("flux_guidance"), "scheduler": _flow(shift=3.0, use_dynamic_shifting=True),
        "vae": flow_vae(), "text_encoder": text.clip(24), "tokenizer": text.clip_tokenizer(),
        "text_encoder_2": text.t5(), "tokenizer_2": text.t5_tokenizer(),
    }  # fmt: skip


def _flux() -> Any:
    from diffusers import FluxPipeline

    return FluxPipeline(**flux_parts())


def flux_call(true: bool, **arguments: Any) -> dict[str, Any]:
    """True: with classifier-free guidance as well."""
    return image_call(max_sequence_length=14, true_cfg_scale=3.0 if true else 1.0) | arguments


def _hunyuan_dit() -> Any:
    """The pipeline fixes the lengths of both texts; its scheduler adds noise at each step."""
    from diffusers import DDPMScheduler, HunyuanDiTPipeline

    return HunyuanDiTPipeline(
        vae=image_vae(), text_encoder=text.bert(20, 77), tokenizer=text.bert_tokenizer(77),
        text_encoder_2=text.t5(24), tokenizer_2=text.t5_tokenizer(),
        transformer=changed("hunyuan_dit_style", text_len=77, text_len_t5=256),
        scheduler=DDPMScheduler(clip_sample=False, beta_schedule="scaled_linear", prediction_type="v_prediction"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _hunyuan_dit_call() -> dict[str, Any]:
    return image_call(use_resolution_binning=False)


def _qwen_image() -> Any:
    """Its latents come from a VAE for videos."""
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline

    vae = AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1] * 4, latents_std=[1.2] * 4,
    )  # fmt: skip
    return QwenImagePipeline(
        scheduler=_flow(use_dynamic_shifting=True), vae=vae, text_encoder=text.qwen(pictures=True),
        tokenizer=text.qwen_tokenizer(), transformer=changed("qwen_image", joint_attention_dim=24),
    )  # fmt: skip


def _qwen_image_call() -> dict[str, Any]:
    """Guidance itself is for models distilled."""
    return image_call(true_cfg_scale=3.0, guidance_scale=None)


def _sana() -> Any:
    """32 pixels to a side of a latent one, each a token."""
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline

    deep = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    scales = ((),) * 3 + ((5,),) * 3
    vae = AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_types=deep, decoder_block_types=deep,
        encoder_block_out_channels=(8,) * 6, decoder_block_out_channels=(8,) * 6, encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales, encoder_layers_per_block=(1,) * 6, decoder_layers_per_block=(1,) * 6,
        scaling_factor=0.4,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, final_sigmas_type="zero"
    )
    return SanaPipeline(text.gemma_tokenizer(), text.gemma(), vae, changed("sana"), scheduler)


def _sana_call() -> dict[str, Any]:
    """Without the instruction which a model for words would extend the prompt by."""
    return image_call(
        height=9 * 32, width=7 * 32, use_resolution_binning=False, complex_human_instruction=None,
        max_sequence_length=13,
    )  # fmt: skip


def _lumina2() -> Any:
    from diffusers import Lumina2Pipeline

    return Lumina2Pipeline(
        changed("lumina2"), _flow(use_dynamic_shifting=True), flow_vae(), text.gemma(), text.gemma_tokenizer()
    )


def _lumina2_call() -> dict[str, Any]:
    return image_call(system_prompt="Describe the image", max_sequence_length=35)


def sdxl_parts() -> dict[str, Any]:
    """Cross attention on both levels, to the tokens of both encoders side by side."""
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True, transformer_layers_per_block=(1, 2), cross_attention_dim=24,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64,
    )  # fmt: skip
    return {
        "vae": image_vae(), "text_encoder": text.clip(8), "tokenizer": text.clip_tokenizer(),
        "text_encoder_2": text.clip(16, 16), "tokenizer_2": text.clip_tokenizer(), "unet": unet,
        "scheduler": EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1),
    }  # fmt: skip


def _sdxl() -> Any:
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline(**sdxl_parts(), add_watermarker=False)


CASES = {
    "dit": PipelineCase(_dit, _dit_call, "batched", prompt={"class_labels": [400]}),
    "pixart_alpha": PipelineCase(partial(_pixart, True), _pixart_call, "batched"),
    "pixart_sigma": PipelineCase(partial(_pixart, False), _pixart_call, "batched"),
    "sd3": PipelineCase(_sd3, sd3_call, "batched"),
    "sd3_skip": PipelineCase(_sd3, _sd3_skip_call, "skip", scale={"skip_layer_guidance_scale": 1.0}),
    "flux": PipelineCase(_flux, partial(flux_call, False), "none"),
    "flux_true": PipelineCase(_flux, partial(flux_call, True), "twice", scale={"true_cfg_scale": 2.0}),
    "hunyuan_dit": PipelineCase(_hunyuan_dit, _hunyuan_dit_call, "batched"),
    "qwen_image": PipelineCase(_qwen_image, _qwen_image_call, "twice", scale={"true_cfg_scale": 2.0}),
    "sana": PipelineCase(_sana, _sana_call, "batched"),
    "lumina2": PipelineCase(_lumina2, _lumina2_call, "twice"),
    "sdxl": PipelineCase(_sdxl, image_call, "batched", denoisers=("unet",)),
}
