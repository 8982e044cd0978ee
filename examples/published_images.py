"""More published full-size diffusion transformers on the meta device: images.

As ``examples/published.py``, of which this is a continuation: each function of ``PUBLISHED`` gives ``(model,
kwargs)``, batch 1. Masks and positions whose values a model reads are real tensors. Configurations were written down
from the checkpoints' config.json, or are the class's defaults where these are the published ones; docstrings say
where that is uncertain.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from published import Example, build, kept, meta

FLOAT = torch.float32
INT = torch.int64


# --------------------------------------------------------------------------------------------------
# FLUX and what follows it


def flux2_dev() -> Example:
    """FLUX.2-dev, 1024x1024: 4096 image + 512 text tokens in one sequence, guidance as an input.

    Hidden 6144, 48 heads of 128, 8 double + 48 single layers, which share their modulations.
    """
    return build("Flux2Transformer2DModel"), _flux2_inputs(15360, guidance=True)


def flux2_klein_4b() -> Example:
    """FLUX.2-klein-4B, 1024x1024: 4096 image + 512 text tokens in one sequence, no guidance.

    Hidden 3072, 24 heads of 128, 5 double + 20 single layers.
    """
    model = build(
        "Flux2Transformer2DModel",
        num_layers=5,
        num_single_layers=20,
        num_attention_heads=24,
        joint_attention_dim=7680,
        guidance_embeds=False,
    )
    return model, _flux2_inputs(7680, guidance=False)


def _flux2_inputs(width: int, guidance: bool) -> dict[str, object]:
    """Ids have a batch here and four columns."""
    return {
        "hidden_states": meta(1, 4096, 128),
        "encoder_hidden_states": meta(1, 512, width),
        "timestep": meta(1),
        "guidance": meta(1, dtype=FLOAT) if guidance else None,
        "img_ids": meta(1, 4096, 4, dtype=INT),
        "txt_ids": meta(1, 512, 4, dtype=INT),
    }


def flux_kontext_dev() -> Example:
    """FLUX.1-Kontext-dev, 1024x1024 from a picture of that size: 4096 + 4096 image + 512 text tokens.

    Hidden 3072, 24 heads of 128, 19 double + 38 single layers.
    """
    model = build("FluxTransformer2DModel", guidance_embeds=True)
    return model, {
        "hidden_states": meta(1, 8192, 64),
        "encoder_hidden_states": meta(1, 512, 4096),
        "pooled_projections": meta(1, 768),
        "timestep": meta(1),
        "img_ids": meta(8192, 3),
        "txt_ids": meta(512, 3),
        "guidance": meta(1, dtype=FLOAT),
    }


def flux_controlnet_union() -> Example:
    """FLUX.1-dev-Controlnet-Union (InstantX), 1024x1024: 4096 image + 512 text tokens and one for the kind of control.

    Hidden 3072, 24 heads of 128, 5 double + 10 single layers, each of which gives a residual.
    """
    model = build("FluxControlNetModel", num_layers=5, num_single_layers=10, guidance_embeds=True, num_mode=10)
    return model, {
        "hidden_states": meta(1, 4096, 64),
        "controlnet_cond": meta(1, 4096, 64),
        "controlnet_mode": meta(1, 1, dtype=INT),
        "conditioning_scale": 0.7,
        "encoder_hidden_states": meta(1, 512, 4096),
        "pooled_projections": meta(1, 768),
        "timestep": meta(1),
        "img_ids": meta(4096, 3),
        "txt_ids": meta(512, 3),
        "guidance": meta(1, dtype=FLOAT),
    }


def chroma1_hd() -> Example:
    """Chroma1-HD, 1024x1024: 4096 image + 512 text tokens in one sequence, masked as queries and as keys.

    Hidden 3072, 24 heads of 128, 19 double + 38 single layers. The mask is a bias in bfloat16, as in the pipeline.
    """
    return build("ChromaTransformer2DModel"), {
        "hidden_states": meta(1, 4096, 64),
        "encoder_hidden_states": meta(1, 512, 4096),
        "timestep": meta(1),
        "img_ids": meta(4096, 3),
        "txt_ids": meta(512, 3),
        "attention_mask": meta(1, 512 + 4096),
    }


def bria_32() -> Example:
    """BRIA 3.2, 1024x1024: 4096 image + 128 text tokens in one sequence.

    Hidden 2304, 24 heads of 96, 8 double + 28 single layers: a guess that gives the published 4 billion parameters,
    as the checkpoint's configuration is not public. Four latent channels are certain.
    """
    model = build(
        "BriaTransformer2DModel",
        in_channels=16,
        num_layers=8,
        num_single_layers=28,
        attention_head_dim=96,
        axes_dims_rope=[0, 48, 48],
    )
    return model, {
        "hidden_states": meta(1, 4096, 16),
        "encoder_hidden_states": meta(1, 128, 4096),
        "timestep": meta(1, dtype=FLOAT),
        "img_ids": meta(4096, 3),
        "txt_ids": meta(128, 3),
    }


def bria_fibo() -> Example:
    """BRIA FIBO, 1024x1024: 4096 image + 1000 text tokens (a structured prompt, unpadded) in one sequence.

    Hidden 3072, 24 heads of 128, 8 double + 38 single layers, each of which takes a layer of the text encoder, the
    last of the 37 again where these run out. The numbers of layers are from the parameter count, 8 billion.
    """
    model = build("BriaFiboTransformer2DModel", in_channels=48, num_layers=8, num_single_layers=38)
    layers = [meta(1, 1000, 2048) for _ in range(37)]
    return model, {
        "hidden_states": meta(1, 4096, 48),
        "encoder_hidden_states": meta(1, 1000, 4096),
        "text_encoder_layers": layers + [layers[-1]] * 9,
        "timestep": meta(1),
        "img_ids": meta(4096, 3),
        "txt_ids": meta(1000, 3),
    }


# --------------------------------------------------------------------------------------------------
# Stable Diffusion 3


def sd35_large() -> Example:
    """Stable Diffusion 3.5 large, 1024x1024: 4096 image + 333 text tokens in one sequence.

    Hidden 2432, 38 heads of 64, 38 layers, queries and keys normalised.
    """
    model = build(
        "SD3Transformer2DModel",
        num_layers=38,
        num_attention_heads=38,
        caption_projection_dim=2432,
        pos_embed_max_size=192,
        qk_norm="rms_norm",
    )
    return model, _sd3_inputs()


def sd35_medium() -> Example:
    """Stable Diffusion 3.5 medium, 1024x1024: 4096 image + 333 text tokens in one sequence.

    Hidden 1536, 24 heads of 64, 24 layers, in the first 13 of which the image attends to itself a second time.
    """
    model = build(
        "SD3Transformer2DModel",
        num_layers=24,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    )
    return model, _sd3_inputs()


def sd3_controlnet_canny() -> Example:
    """SD3-Controlnet-Canny (InstantX), 1024x1024: 4096 image + 333 text tokens in one sequence.

    Hidden 1536, 24 heads of 64, 12 layers (6 in others of the series), each of which gives a residual.
    """
    model = build(
        "SD3ControlNetModel",
        num_layers=12,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pos_embed_max_size=192,
    )
    return model, _sd3_inputs() | {"controlnet_cond": meta(1, 16, 128, 128), "conditioning_scale": 0.7}


def _sd3_inputs() -> dict[str, object]:
    return {
        "hidden_states": meta(1, 16, 128, 128),
        "encoder_hidden_states": meta(1, 333, 4096),
        "pooled_projections": meta(1, 2048),
        "timestep": meta(1, dtype=FLOAT),
    }


# --------------------------------------------------------------------------------------------------
# Text and image in one sequence


def qwen_image_edit() -> Example:
    """Qwen-Image-Edit (2509), 1024x1024 from one picture of that size: 4096 + 4096 image + 256 text tokens, no mask.

    Hidden 3072, 24 heads of 128, 60 layers. About 200 of the text tokens stand for the picture.
    """
    return build("QwenImageTransformer2DModel"), {
        "hidden_states": meta(1, 8192, 64),
        "encoder_hidden_states": meta(1, 256, 3584),
        "encoder_hidden_states_mask": None,
        "timestep": meta(1),
        "img_shapes": [[(1, 64, 64), (1, 64, 64)]],
    }


def auraflow_03() -> Example:
    """AuraFlow v0.3, 1024x1024: 4096 image + 256 text tokens and 8 registers in one sequence.

    Hidden 3072, 12 heads of 256, 4 double + 32 single layers. Positions for 96x96 patches are learned.
    """
    return build("AuraFlowTransformer2DModel", pos_embed_max_size=9216), {
        "hidden_states": meta(1, 4, 128, 128),
        "encoder_hidden_states": meta(1, 256, 2048),
        "timestep": meta(1),
    }


def cogview4_6b() -> Example:
    """CogView4-6B, 1024x1024: 4096 image + 128 text tokens in one sequence.

    Hidden 4096, 32 heads of 128, 28 layers. The text's length is the prompt's, in steps of 16.
    """
    model = build("CogView4Transformer2DModel", num_layers=28, attention_head_dim=128, num_attention_heads=32)
    return model, _cogview_inputs(128)


def cogview3_plus_3b() -> Example:
    """CogView3-Plus-3B, 1024x1024: 4096 image + 224 text tokens in one sequence.

    Hidden 2560, 64 heads of 40, 30 layers.
    """
    return build("CogView3PlusTransformer2DModel"), _cogview_inputs(224)


def _cogview_inputs(text: int) -> dict[str, object]:
    return {
        "hidden_states": meta(1, 16, 128, 128),
        "encoder_hidden_states": meta(1, text, 4096),
        "timestep": meta(1, dtype=FLOAT),
        "original_size": meta(1, 2),
        "target_size": meta(1, 2),
        "crop_coords": meta(1, 2),
    }


def lumina_image_2() -> Example:
    """Lumina-Image 2.0, 1024x1024: 4096 image + 120 of 256 text tokens in one sequence; the mask is read.

    Hidden 2304, 24 heads of 96 (8 of keys), 26 layers, and two of refinement for image and for text each. Tables of
    the rotary embedding, kept in a list, are made anew and real, as loading a checkpoint leaves them.
    """
    model = build("Lumina2Transformer2DModel", cap_feat_dim=2304)
    rope = model.rope_embedder
    rope.freqs_cis = rope._precompute_freqs_cis(rope.axes_dim, rope.axes_lens, rope.theta)
    return model, {
        "hidden_states": meta(1, 16, 128, 128),
        "timestep": meta(1, dtype=FLOAT),
        "encoder_hidden_states": meta(1, 256, 2304),
        "encoder_attention_mask": kept(256, 120),
    }


def z_image_turbo() -> Example:
    """Z-Image-Turbo, 1024x1024: 4096 image + 100 text tokens, padded to 128, in one sequence.

    Hidden 3840, 30 heads of 128, 30 layers, and two of refinement for image and for text each.
    """
    return build("ZImageTransformer2DModel"), {
        "x": [meta(16, 1, 128, 128)],
        "t": meta(1),
        "cap_feats": [meta(100, 2560)],
    }


def omnigen_v1() -> Example:
    """OmniGen v1, 1024x1024: 40 text tokens, the timestep and 4096 image tokens, with a (1, 4137, 4137) mask.

    Hidden 3072, 32 heads of 96, 32 layers of a causal language model. The largest position is read. The factors of
    the rotary embedding are not the published ones: they do not change the graph.
    """
    model = build(
        "OmniGenTransformer2DModel",
        rope_scaling={"type": "su", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48},
    )
    return model, {
        "hidden_states": meta(1, 4, 128, 128),
        "timestep": meta(1, dtype=FLOAT),
        "input_ids": meta(1, 40, dtype=INT),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": meta(1, 4137, 4137, dtype=FLOAT),
        "position_ids": torch.arange(4137)[None],
    }


def hunyuan_image_21() -> Example:
    """HunyuanImage 2.1, 2048x2048: 4096 image + 1000 and 128 text tokens in one sequence; their masks are read.

    Hidden 3584, 28 heads of 128, 20 double + 40 single layers, 2 text refiner layers. 120 tokens of the prompt and 20
    of its quoted text (ByT5) are kept.
    """
    return build("HunyuanImageTransformer2DModel", text_embed_2_dim=1472), {
        "hidden_states": meta(1, 64, 64, 64),
        "timestep": meta(1),
        "encoder_hidden_states": meta(1, 1000, 3584),
        "encoder_attention_mask": kept(1000, 120),
        "encoder_hidden_states_2": meta(1, 128, 1472),
        "encoder_attention_mask_2": kept(128, 20),
    }


def prx_1024() -> Example:
    """PRX-1024 (Photoroom), 1024x1024: 4096 image tokens that attend to themselves and to 256 text tokens, masked.

    Hidden 1792, 28 heads of 64, 16 layers. The variant with the FLUX autoencoder (16 channels).
    """
    return build("PRXTransformer2DModel", axes_dim=[32, 32]), {
        "hidden_states": meta(1, 16, 128, 128),
        "timestep": meta(1, dtype=FLOAT),
        "encoder_hidden_states": meta(1, 256, 2304),
        "attention_mask": meta(1, 256, dtype=torch.bool),
    }


# --------------------------------------------------------------------------------------------------
# Cross attention to text, or none


def lumina_next_sft() -> Example:
    """Lumina-Next-SFT, 1024x1024: 4096 image tokens, 256 text tokens (cross) with an int64 mask.

    Hidden 2304, 32 heads of 72 (8 of keys), 24 layers. The rotary table is for 384x384 patches.
    """
    model = build("LuminaNextDiT2DModel", num_layers=24, num_kv_heads=8)
    return model, {
        "hidden_states": meta(1, 4, 128, 128),
        "timestep": meta(1),
        "encoder_hidden_states": meta(1, 256, 2048),
        "encoder_mask": meta(1, 256, dtype=INT),
        "image_rotary_emb": meta(384, 384, 36, dtype=torch.complex64),
        "cross_attention_kwargs": {"base_sequence_length": 4096},
    }


def sana_1600m_1024() -> Example:
    """Sana 1.6B, 1024x1024: 1024 image tokens with linear attention, 300 text tokens (cross) with an int64 mask.

    Hidden 2240, 70 heads of 32 (linear), 20 of 112 (cross), 20 layers, with a convolution of 3x3 in each.
    """
    return build("SanaTransformer2DModel"), {
        "hidden_states": meta(1, 32, 32, 32),
        "encoder_hidden_states": meta(1, 300, 2304),
        "encoder_attention_mask": meta(1, 300, dtype=INT),
        "timestep": meta(1, dtype=FLOAT),
    }


def pixart_alpha_1024() -> Example:
    """PixArt-alpha XL/2 1024-MS, 1024x1024: 4096 image tokens, 120 text tokens (cross) with an int64 mask.

    Hidden 1152, 16 heads of 72, 28 layers. Resolution and aspect ratio are embedded.
    """
    model = build("PixArtTransformer2DModel", caption_channels=4096, use_additional_conditions=True)
    return model, {
        "hidden_states": meta(1, 4, 128, 128),
        "encoder_hidden_states": meta(1, 120, 4096),
        "timestep": meta(1, dtype=INT),
        "added_cond_kwargs": {"resolution": meta(1, 2), "aspect_ratio": meta(1, 1)},
        "encoder_attention_mask": meta(1, 120, dtype=INT),
    }


def dit_xl_512() -> Example:
    """DiT-XL/2, 512x512: 1024 image tokens and a class label.

    Hidden 1152, 16 heads of 72, 28 layers.
    """
    return build("DiTTransformer2DModel", out_channels=8, sample_size=64), {
        "hidden_states": meta(1, 4, 64, 64),
        "timestep": meta(1, dtype=INT),
        "class_labels": meta(1, dtype=INT),
    }


PUBLISHED: dict[str, Callable[[], Example]] = {
    function.__name__: function
    for function in (
        flux2_dev,
        flux2_klein_4b,
        flux_kontext_dev,
        flux_controlnet_union,
        chroma1_hd,
        bria_32,
        bria_fibo,
        sd35_large,
        sd35_medium,
        sd3_controlnet_canny,
        qwen_image_edit,
        auraflow_03,
        cogview4_6b,
        cogview3_plus_3b,
        lumina_image_2,
        z_image_turbo,
        omnigen_v1,
        hunyuan_image_21,
        prx_1024,
        lumina_next_sft,
        sana_1600m_1024,
        pixart_alpha_1024,
        dit_xl_512,
    )
}
