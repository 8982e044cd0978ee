"""Pipelines from text to video: three latent frames of 9x7 patches where the model has no other idea of its sizes."""

from __future__ import annotations

from functools import partial
from typing import Any

import pipelines_text as text
from pipelines_parts import HEIGHT, WIDTH, PipelineCase, asked, changed, image_vae


def _flow(**config: Any) -> Any:
    """The scheduler of most."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**config)


def video_call(frames: int = 9, **arguments: Any) -> dict[str, Any]:
    """A call for a video of so many frames."""
    return asked(height=HEIGHT, width=WIDTH, num_frames=frames, max_sequence_length=13) | arguments


def _latte() -> Any:
    """Frames are images to its VAE; a table of the transformer knows five."""
    from diffusers import DDIMScheduler, LattePipeline

    scheduler = DDIMScheduler(clip_sample=False, prediction_type="v_prediction")
    return LattePipeline(text.t5_tokenizer(), text.t5(), image_vae(), changed("latte"), scheduler)


def _latte_call() -> dict[str, Any]:
    return asked(height=HEIGHT, width=WIDTH, video_length=5, clean_caption=False)


def _cogvideox(dpm: bool) -> Any:
    """As the 5B model (rotary positions, a scheduler which goes by the step before and adds noise) or the 2B one."""
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXPipeline

    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(4, 4, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip
    scheduler = (CogVideoXDPMScheduler if dpm else CogVideoXDDIMScheduler)(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    denoiser = changed(
        "cogvideox_rotary" if dpm else "cogvideox", sample_height=18, sample_width=14, sample_frames=9,
        max_text_seq_length=13,
    )  # fmt: skip
    return CogVideoXPipeline(text.t5_tokenizer(), text.t5(), vae, denoiser, scheduler)


def _cogvideox_call(dynamic: bool) -> dict[str, Any]:
    """Dynamic: guidance grows from step to step."""
    return video_call(use_dynamic_cfg=dynamic)


def _mochi() -> Any:
    """Six frames to a latent one; time runs from noise at 0."""
    from diffusers import AutoencoderKLMochi, MochiPipeline

    vae = AutoencoderKLMochi(
        latent_channels=4, encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5, latents_mean=[0.1] * 4, latents_std=[1.2] * 4,
    )  # fmt: skip
    return MochiPipeline(
        _flow(invert_sigmas=True), vae, text.t5(24), text.t5_tokenizer(), changed("mochi", max_sequence_length=13)
    )


def _wan(two: bool) -> Any:
    """Two: the second model takes over below half the noise, as in Wan 2.2; the first does four steps of six."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline

    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1] * 4, latents_std=[1.2] * 4
    )
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return WanPipeline(
        tokenizer=text.t5_tokenizer(), text_encoder=text.t5(multilingual=True), vae=vae, scheduler=scheduler,
        transformer=changed("wan"), transformer_2=changed("wan") if two else None,
        boundary_ratio=0.7 if two else None,
    )  # fmt: skip


def ltx_parts() -> dict[str, Any]:
    """32x32 pixels and 8 frames to a latent value, which is a token."""
    from diffusers import AutoencoderKLLTXVideo

    vae = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5,
    )  # fmt: skip
    return {
        "scheduler": _flow(use_dynamic_shifting=True), "vae": vae, "text_encoder": text.t5(),
        "tokenizer": text.t5_tokenizer(), "transformer": changed("ltx"),
    }  # fmt: skip


def _ltx() -> Any:
    from diffusers import LTXPipeline

    return LTXPipeline(**ltx_parts())


def ltx_call(**arguments: Any) -> dict[str, Any]:
    return video_call(17, height=9 * 32, width=7 * 32, **arguments)


def _hunyuan_video() -> Any:
    """Guidance as an embedding; the pooled text is CLIP's."""
    from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoPipeline

    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2
    )
    return HunyuanVideoPipeline(
        text_encoder=text.llama(), tokenizer=text.llama_tokenizer(), transformer=changed("hunyuan_video"),
        vae=vae, scheduler=_flow(shift=7.0), text_encoder_2=text.clip(24), tokenizer_2=text.clip_tokenizer(),
    )  # fmt: skip


def _hunyuan_video_call(true: bool) -> dict[str, Any]:
    """True: with classifier-free guidance as well. A short template for the prompt, of which two tokens are cut off."""
    return video_call(
        true_cfg_scale=3.0 if true else 1.0, prompt_template={"template": "the video {}", "crop_start": 2}
    )


def _hunyuan_video15() -> Any:
    """Guidance is a component."""
    from diffusers import AutoencoderKLHunyuanVideo15, HunyuanVideo15Pipeline
    from diffusers.guiders import ClassifierFreeGuidance

    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(4, 4, 8, 8, 8), layers_per_block=1, downsample_match_channel=False,
        upsample_match_channel=False,
    )  # fmt: skip
    return HunyuanVideo15Pipeline(
        text_encoder=text.qwen(pictures=False), tokenizer=text.qwen_tokenizer(),
        transformer=changed("hunyuan_video15", text_embed_dim=24), vae=vae, scheduler=_flow(shift=7.0),
        text_encoder_2=text.t5(24), tokenizer_2=text.byte_tokenizer(), guider=ClassifierFreeGuidance(3.5),
    )  # fmt: skip


def _hunyuan_video15_call() -> dict[str, Any]:
    """What stands in quotes is also spelled for a second encoder. 16 pixels to a latent value, which is a token."""
    call = video_call(height=9 * 16, width=7 * 16, prompt=f'{text.PROMPT} "snow"')
    return {name: value for name, value in call.items() if name not in ("guidance_scale", "max_sequence_length")}


_SHORT = {
    "system_message": "Describe the image", "prompt_template_encode_start_idx": 9, "tokenizer_max_length": 20,
    "tokenizer_2_max_length": 10, "vision_num_semantic_tokens": 7,
}  # fmt: skip

CASES = {
    "latte": PipelineCase(_latte, _latte_call, "batched"),
    "cogvideox": PipelineCase(partial(_cogvideox, False), partial(_cogvideox_call, False), "batched"),
    "cogvideox_dpm": PipelineCase(partial(_cogvideox, True), partial(_cogvideox_call, True), "batched"),
    "mochi": PipelineCase(_mochi, partial(video_call, 13), "batched"),
    "wan": PipelineCase(partial(_wan, False), video_call, "twice"),
    "wan_two": PipelineCase(
        partial(_wan, True), partial(video_call, guidance_scale_2=3.0), "twice", ("transformer", "transformer_2")
    ),
    "ltx": PipelineCase(_ltx, ltx_call, "batched"),
    "hunyuan_video": PipelineCase(_hunyuan_video, partial(_hunyuan_video_call, False), "none"),
    "hunyuan_video_true": PipelineCase(
        _hunyuan_video, partial(_hunyuan_video_call, True), "twice", scale={"true_cfg_scale": 2.0}
    ),
    "hunyuan_video15": PipelineCase(
        _hunyuan_video15, _hunyuan_video15_call, "twice", scale={}, attributes=_SHORT
    ),
}
