"""The published full-size diffusion transformers on the meta device: shapes and no weights.

Each function of ``PUBLISHED`` gives ``(model, kwargs)``: the class from diffusers in the configuration of a
published checkpoint, and the keyword arguments of its forward at the checkpoint's usual size, batch 1
(classifier-free guidance doubles it).  All of it lives on the meta device, so a model of 20 billion
parameters takes seconds to build and no memory: enough to capture and to plan with, though not to compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Example = tuple[nn.Module, dict[str, Any]]

BF16 = torch.bfloat16


@contextmanager
def _as_loaded() -> Iterator[None]:
    """Build on the meta device with bfloat16 as the default dtype, as loading in bfloat16 does."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(BF16)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(default)


def build(name: str, **config: Any) -> nn.Module:
    """A diffusers class from its configuration, with the parameters that it wants in float32 in float32."""
    import diffusers

    with _as_loaded():
        model = getattr(diffusers, name)(**config)
    exact = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for path, parameter in model.named_parameters():
        if exact & set(path.split(".")):
            parameter.data = parameter.data.float()
    return model.eval().requires_grad_(False)


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """A tensor of a shape and nothing else."""
    return torch.empty(shape, dtype=dtype, device="meta")


def kept(length: int, count: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """A real (1, length) mask whose first ``count`` entries are 1."""
    return (torch.arange(length) < count).to(dtype)[None]


def flux_dev(size: int = 1024) -> Example:
    """FLUX.1-dev, 1024x1024: 4096 image + 512 text tokens in one sequence, guidance as an input.

    Hidden 3072, 24 heads of 128, 19 double + 38 single layers. ``size`` is the side of the picture in pixels.
    """
    tokens = (size // 16) ** 2
    model = build("FluxTransformer2DModel", guidance_embeds=True)
    return model, {
        "hidden_states": meta(1, tokens, 64),
        "encoder_hidden_states": meta(1, 512, 4096),
        "pooled_projections": meta(1, 768),
        "timestep": meta(1),
        "img_ids": meta(tokens, 3),
        "txt_ids": meta(512, 3),
        "guidance": meta(1, dtype=torch.float32),
    }


def sd3_medium() -> Example:
    """Stable Diffusion 3 medium, 1024x1024: 4096 image + 333 text tokens in one sequence.

    Hidden 1536, 24 heads of 64, 24 layers.  The text is CLIP's 77 tokens followed by T5's 256.
    """
    model = build(
        "SD3Transformer2DModel",
        sample_size=128,
        num_layers=24,
        num_attention_heads=24,
        attention_head_dim=64,
        caption_projection_dim=1536,
        pos_embed_max_size=192,
    )
    return model, {
        "hidden_states": meta(1, 16, 128, 128),
        "encoder_hidden_states": meta(1, 333, 4096),
        "pooled_projections": meta(1, 2048),
        "timestep": meta(1, dtype=torch.float32),
    }


def pixart_sigma_1024() -> Example:
    """PixArt-Sigma XL/2, 1024x1024: 4096 image tokens, 300 text tokens by cross attention with an int64 mask.

    Hidden 1152, 16 heads of 72, 28 layers.
    """
    model = build(
        "PixArtTransformer2DModel",
        sample_size=128,
        caption_channels=4096,
        interpolation_scale=2,
        use_additional_conditions=False,
    )
    return model, {
        "hidden_states": meta(1, 4, 128, 128),
        "encoder_hidden_states": meta(1, 300, 4096),
        "timestep": meta(1, dtype=torch.int64),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "encoder_attention_mask": meta(1, 300, dtype=torch.int64),
    }


def hunyuan_dit_1024() -> Example:
    """HunyuanDiT v1.2, 1024x1024: 4096 image tokens, 77 + 256 text tokens (cross), with int64 masks.

    Hidden 1408, 16 heads of 88, 40 layers of which the last 19 take long skips.
    """
    model = build(
        "HunyuanDiT2DModel",
        in_channels=4,
        patch_size=2,
        sample_size=128,
        hidden_size=1408,
        num_layers=40,
        mlp_ratio=4.3637,
        use_style_cond_and_image_meta_size=False,
    )
    return model, {
        "hidden_states": meta(1, 4, 128, 128),
        "timestep": meta(1),
        "encoder_hidden_states": meta(1, 77, 1024),
        "text_embedding_mask": meta(1, 77, dtype=torch.int64),
        "encoder_hidden_states_t5": meta(1, 256, 2048),
        "text_embedding_mask_t5": meta(1, 256, dtype=torch.int64),
        "image_rotary_emb": (meta(4096, 88, dtype=torch.float32), meta(4096, 88, dtype=torch.float32)),
    }


def cogvideox_5b() -> Example:
    """CogVideoX-5b, 49 frames of 720x480: 13x30x45 = 17550 video + 226 text tokens in one sequence.

    Hidden 3072, 48 heads of 64, 42 layers, rotary positions.
    """
    model = build(
        "CogVideoXTransformer3DModel",
        num_attention_heads=48,
        num_layers=42,
        use_rotary_positional_embeddings=True,
    )
    return model, {
        "hidden_states": meta(1, 13, 16, 60, 90),
        "encoder_hidden_states": meta(1, 226, 4096),
        "timestep": meta(1, dtype=torch.int64),
        "image_rotary_emb": (meta(17550, 64, dtype=torch.float32), meta(17550, 64, dtype=torch.float32)),
    }


def mochi_480p() -> Example:
    """Mochi 1 preview, 163 frames of 848x480: 28x30x53 = 44520 video + 256 text tokens with a bool mask.

    Hidden 3072 (text 1536), 24 heads of 128, 48 layers.  It picks the kept text tokens with ``nonzero``.
    """
    model = build("MochiTransformer3DModel")
    return model, {
        "hidden_states": meta(1, 12, 28, 60, 106),
        "encoder_hidden_states": meta(1, 256, 4096),
        "timestep": meta(1),
        "encoder_attention_mask": torch.ones(1, 256, dtype=torch.bool),
    }


def wan21_14b_720p() -> Example:
    """Wan 2.1 text-to-video 14B, 81 frames of 1280x720: 21x45x80 = 75600 tokens, 512 text tokens (cross).

    Hidden 5120, 40 heads of 128, 40 layers.
    """
    model = build("WanTransformer3DModel")
    return model, {
        "hidden_states": meta(1, 16, 21, 90, 160),
        "timestep": meta(1, dtype=torch.int64),
        "encoder_hidden_states": meta(1, 512, 4096),
    }


def hunyuan_video_720p() -> Example:
    """HunyuanVideo, 129 frames of 1280x720: 33x45x80 = 118800 video + 256 text tokens, mask in bfloat16.

    Hidden 3072, 24 heads of 128, 20 double + 40 single layers, 2 text refiner layers, guidance.
    """
    model = build("HunyuanVideoTransformer3DModel")
    return model, {
        "hidden_states": meta(1, 16, 33, 90, 160),
        "timestep": meta(1),
        "encoder_hidden_states": meta(1, 256, 4096),
        "encoder_attention_mask": meta(1, 256),
        "pooled_projections": meta(1, 768),
        "guidance": meta(1),
    }


def qwen_image_1328() -> Example:
    """Qwen-Image, 1328x1328: 83x83 = 6889 image tokens + up to 1024 text tokens (512 here, no padding).

    Hidden 3072, 24 heads of 128, 60 layers.  A prompt alone is not padded, so there is no mask.
    """
    model = build("QwenImageTransformer2DModel")
    return model, {
        "hidden_states": meta(1, 6889, 64),
        "encoder_hidden_states": meta(1, 512, 3584),
        "encoder_hidden_states_mask": None,
        "timestep": meta(1),
        "img_shapes": [[(1, 83, 83)]],
    }


def ltx_video() -> Example:
    """LTX-Video 0.9 2B, 161 frames of 704x480: 21x15x22 = 6930 tokens, 128 text tokens (cross), bool mask.

    Hidden 2048, 32 heads of 64, 28 layers.
    """
    model = build("LTXVideoTransformer3DModel")
    return model, {
        "hidden_states": meta(1, 6930, 128),
        "encoder_hidden_states": meta(1, 128, 4096),
        "timestep": meta(1, dtype=torch.float32),
        "encoder_attention_mask": meta(1, 128, dtype=torch.bool),
        "num_frames": 21,
        "height": 15,
        "width": 22,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


PUBLISHED: dict[str, Callable[[], Example]] = {
    function.__name__: function
    for function in (
        flux_dev,
        sd3_medium,
        pixart_sigma_1024,
        hunyuan_dit_1024,
        cogvideox_5b,
        mochi_480p,
        wan21_14b_720p,
        hunyuan_video_720p,
        qwen_image_1328,
        ltx_video,
    )
}
