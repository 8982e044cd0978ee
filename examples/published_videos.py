"""More published full-size diffusion transformers on the meta device: video, and at the end audio.

As ``examples/published.py``, of which this is a continuation: each function of ``PUBLISHED`` gives ``(model,
kwargs)``, batch 1. Masks and positions whose values a model reads are real tensors. Configurations were written down
from the checkpoints' config.json, or are the class's defaults where these are the published ones; docstrings say
where that is uncertain.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from published import BF16, Example, build, kept, meta
from torch import Tensor, nn

FLOAT = torch.float32
INT = torch.int64


def rotary(tokens: int, width: int) -> tuple[Tensor, Tensor]:
    """Tables of cosines and sines."""
    return meta(tokens, width, dtype=FLOAT), meta(tokens, width, dtype=FLOAT)


# --------------------------------------------------------------------------------------------------
# Wan and its relatives


def wan22_ti2v_5b() -> Example:
    """Wan 2.2 text-or-image-to-video 5B, 121 frames of 1280x704: 31x22x40 = 27280 tokens, 512 text tokens (cross).

    Hidden 3072, 24 heads of 128, 30 layers. Each token has a timestep of its own.
    """
    model = build(
        "WanTransformer3DModel",
        in_channels=48,
        out_channels=48,
        num_attention_heads=24,
        num_layers=30,
        ffn_dim=14336,
    )
    return model, {
        "hidden_states": meta(1, 48, 31, 44, 80),
        "timestep": meta(1, 27280, dtype=FLOAT),
        "encoder_hidden_states": meta(1, 512, 4096),
    }


def wan21_i2v_14b_720p() -> Example:
    """Wan 2.1 image-to-video 14B, 81 frames of 1280x720: 21x45x80 = 75600 tokens, 257 image + 512 text (cross).

    Hidden 5120, 40 heads of 128, 40 layers.
    """
    model = build("WanTransformer3DModel", in_channels=36, image_dim=1280, added_kv_proj_dim=5120)
    return model, {
        "hidden_states": meta(1, 36, 21, 90, 160),
        "timestep": meta(1, dtype=INT),
        "encoder_hidden_states": meta(1, 512, 4096),
        "encoder_hidden_states_image": meta(1, 257, 1280),
    }


def wan21_vace_14b_720p() -> Example:
    """Wan 2.1 VACE 14B, 81 frames of 1280x720: 21x45x80 = 75600 tokens, 512 text tokens (cross).

    Hidden 5120, 40 heads of 128, 40 layers, and 8 control layers beside every fifth.
    """
    return build("WanVACETransformer3DModel"), {
        "hidden_states": meta(1, 16, 21, 90, 160),
        "timestep": meta(1, dtype=INT),
        "encoder_hidden_states": meta(1, 512, 4096),
        "control_hidden_states": meta(1, 96, 21, 90, 160),
        "control_hidden_states_scale": meta(8),
    }


def wan22_animate_14b_720p() -> Example:
    """Wan 2.2 Animate 14B, 77 frames of 1280x720 and one of reference: 21x45x80 = 75600 tokens.

    Hidden 5120, 40 heads of 128, 40 layers; 257 image + 512 text tokens (cross). 77 pictures of a face, 512x512, pass
    a network of convolutions; their features are attended to after every fifth layer, frame by frame.
    """
    return build("WanAnimateTransformer3DModel", added_kv_proj_dim=5120), {
        "hidden_states": meta(1, 36, 21, 90, 160),
        "timestep": meta(1, dtype=INT),
        "encoder_hidden_states": meta(1, 512, 4096),
        "encoder_hidden_states_image": meta(1, 257, 1280),
        "pose_hidden_states": meta(1, 16, 20, 90, 160),
        "face_pixel_values": meta(1, 3, 77, 512, 512),
    }


def skyreels_v2_14b_720p() -> Example:
    """SkyReels V2 text-to-video 14B 720P, 121 frames of 1280x720: 31x45x80 = 111600 tokens, 512 text tokens (cross).

    Hidden 5120, 40 heads of 128, 40 layers.
    """
    model = build("SkyReelsV2Transformer3DModel", num_attention_heads=40, ffn_dim=13824, num_layers=40)
    return model, {
        "hidden_states": meta(1, 16, 31, 90, 160),
        "timestep": meta(1, dtype=INT),
        "encoder_hidden_states": meta(1, 512, 4096),
    }


def skyreels_v2_df_1300m_540p() -> Example:
    """SkyReels V2 diffusion forcing 1.3B 540P, 97 frames of 960x544: 25x34x60 = 51000 tokens, 512 text (cross).

    Hidden 1536, 12 heads of 128, 30 layers. Each frame has a timestep of its own; the frame rate is embedded.
    """
    model = build(
        "SkyReelsV2Transformer3DModel",
        num_attention_heads=12,
        ffn_dim=8960,
        num_layers=30,
        inject_sample_info=True,
    )
    return model, {
        "hidden_states": meta(1, 16, 25, 68, 120),
        "timestep": meta(1, 25, dtype=INT),
        "encoder_hidden_states": meta(1, 512, 4096),
        "enable_diffusion_forcing": True,
        "fps": [1],
    }


# --------------------------------------------------------------------------------------------------
# HunyuanVideo's relatives


def hunyuan_video_15_480p() -> Example:
    """HunyuanVideo 1.5, text to video, 121 frames of 848x480: 31x30x53 = 49290 video + 1985 condition tokens.

    Hidden 2048, 16 heads of 128, 54 double layers, 2 text refiner layers. The condition is text (1000 tokens, 120 of
    them kept), quoted text (256, none kept) and an image (729, all zero, as there is none): all of that is read.
    """
    return build("HunyuanVideo15Transformer3DModel", task_type="t2v"), {
        "hidden_states": meta(1, 65, 31, 30, 53),
        "timestep": meta(1),
        "encoder_hidden_states": meta(1, 1000, 3584),
        "encoder_attention_mask": kept(1000, 120, BF16),
        "encoder_hidden_states_2": meta(1, 256, 1472),
        "encoder_attention_mask_2": kept(256, 0, BF16),
        "image_embeds": torch.zeros(1, 729, 1152, dtype=BF16),
    }


def hunyuan_video_framepack() -> Example:
    """HunyuanVideo-I2V FramePack, 9 latent frames of 832x480: 14040 video + 3926 tokens of history.

    Hidden 3072, 24 heads of 128, 20 double + 40 single layers. 729 image and 256 text tokens, of which 100 are kept;
    that mask is read.
    """
    model = build(
        "HunyuanVideoFramepackTransformer3DModel", has_image_proj=True, image_proj_dim=1152, has_clean_x_embedder=True
    )
    first, history_4x, history_2x, history_1x, latents = torch.arange(29).split([1, 16, 2, 1, 9])
    return model, {
        "hidden_states": meta(1, 16, 9, 60, 104),
        "timestep": meta(1),
        "encoder_hidden_states": meta(1, 256, 4096),
        "encoder_attention_mask": kept(256, 100, BF16),
        "pooled_projections": meta(1, 768),
        "image_embeds": meta(1, 729, 1152),
        "indices_latents": latents,
        "guidance": meta(1),
        "latents_clean": meta(1, 16, 2, 60, 104),
        "indices_latents_clean": torch.cat([first, history_1x]),
        "latents_history_2x": meta(1, 16, 2, 60, 104),
        "indices_latents_history_2x": history_2x,
        "latents_history_4x": meta(1, 16, 16, 60, 104),
        "indices_latents_history_4x": history_4x,
    }


# --------------------------------------------------------------------------------------------------
# Others


def kandinsky5_lite() -> Example:
    """Kandinsky 5.0 T2V Lite (5 s), 121 frames of 768x512: 31x32x48 = 47616 tokens, 256 text tokens (cross).

    Hidden 1792, 28 heads of 64, 32 layers and 2 for the text. Channels come last: latents, a condition and its mask.
    """
    model = build(
        "Kandinsky5Transformer3DModel",
        in_visual_dim=16,
        out_visual_dim=16,
        model_dim=1792,
        ff_dim=7168,
        visual_cond=True,
    )
    return model, {
        "hidden_states": meta(1, 31, 64, 96, 33),
        "encoder_hidden_states": meta(1, 256, 3584),
        "pooled_projections": meta(1, 768),
        "timestep": meta(1),
        "visual_rope_pos": [torch.arange(31), torch.arange(32), torch.arange(48)],
        "text_rope_pos": torch.arange(256),
        "scale_factor": (1.0, 2.0, 2.0),
        "sparse_params": None,
    }


def ltx2_19b() -> Example:
    """LTX-2 19B, 121 frames of 768x512 with sound: 16x16x24 = 6144 video and 126 audio tokens, 1024 text tokens.

    Hidden 4096 and 2048, 32 heads of 128 and 64, 48 layers: each modality attends to itself, to the text, and to the
    other. The mask of the text is int64.
    """
    return build("LTX2VideoTransformer3DModel", rope_type="split"), {
        "hidden_states": meta(1, 6144, 128),
        "audio_hidden_states": meta(1, 126, 128),
        "encoder_hidden_states": meta(1, 1024, 3840),
        "audio_encoder_hidden_states": meta(1, 1024, 3840),
        "timestep": meta(1, dtype=FLOAT),
        "sigma": meta(1, dtype=FLOAT),
        "encoder_attention_mask": meta(1, 1024, dtype=INT),
        "audio_encoder_attention_mask": meta(1, 1024, dtype=INT),
        "num_frames": 16,
        "height": 16,
        "width": 24,
        "fps": 24.0,
        "audio_num_frames": 126,
        "video_coords": meta(1, 3, 6144, 2, dtype=FLOAT),
        "audio_coords": meta(1, 1, 126, 2, dtype=FLOAT),
    }


def cosmos_predict2_2b_image() -> Example:
    """Cosmos-Predict2-2B text to image, 1360x768: 48x85 = 4080 tokens, 512 text tokens (cross).

    Hidden 2048, 16 heads of 128, 28 layers.
    """
    model = _cosmos(in_channels=16, num_attention_heads=16, rope_scale=(1.0, 4.0, 4.0))
    return model, {
        "hidden_states": meta(1, 16, 1, 96, 170),
        "timestep": meta(1),
        "encoder_hidden_states": meta(1, 512, 1024),
        "padding_mask": meta(1, 1, 768, 1360),
    }


def cosmos_predict2_14b_video() -> Example:
    """Cosmos-Predict2-14B video to world, 93 frames of 1280x704: 24x44x80 = 84480 tokens, 512 text tokens (cross).

    Hidden 5120, 40 heads of 128, 36 layers. Each frame has a timestep of its own.
    """
    model = _cosmos(in_channels=17, num_attention_heads=40, num_layers=36, rope_scale=(20 / 24, 2.0, 2.0))
    return model, {
        "hidden_states": meta(1, 16, 24, 88, 160),
        "timestep": meta(1, 1, 24, 1, 1),
        "encoder_hidden_states": meta(1, 512, 1024),
        "fps": 16,
        "condition_mask": meta(1, 1, 24, 88, 160),
        "padding_mask": meta(1, 1, 704, 1280),
    }


def _cosmos(**config: object) -> nn.Module:
    """The class resizes its padding mask with torchvision; where that is not installed, with the same in torch."""
    from diffusers.models.transformers import transformer_cosmos

    def resize(image: Tensor, size: list[int], interpolation: str) -> Tensor:
        return F.interpolate(image, size=size, mode=interpolation)

    if not hasattr(transformer_cosmos, "transforms"):
        transformer_cosmos.transforms = SimpleNamespace(
            functional=SimpleNamespace(resize=resize), InterpolationMode=SimpleNamespace(NEAREST="nearest")
        )
    return build("CosmosTransformer3DModel", out_channels=16, extra_pos_embed_type=None, **config)


def allegro_720p() -> Example:
    """Allegro, 88 frames of 1280x720: 22x45x80 = 79200 tokens, 512 text tokens (cross) with an int64 mask.

    Hidden 2304, 24 heads of 96, 32 layers. Positions come for each token, as int64.
    """
    return build("AllegroTransformer3DModel"), {
        "hidden_states": meta(1, 4, 22, 90, 160),
        "encoder_hidden_states": meta(1, 512, 4096),
        "timestep": meta(1, dtype=INT),
        "encoder_attention_mask": meta(1, 512, dtype=INT),
        "image_rotary_emb": (
            (rotary(22, 32), rotary(45, 32), rotary(80, 32)),
            tuple(meta(1, 79200, dtype=INT) for _ in range(3)),
        ),
    }


def easyanimate_51_12b() -> Example:
    """EasyAnimate V5.1 12B, text to video, 49 frames of 1008x576: 13x36x63 = 29484 video + 256 text tokens.

    Hidden 3072, 48 heads of 64, 48 double layers.
    """
    model = build(
        "EasyAnimateTransformer3DModel", in_channels=16, out_channels=16, patch_size=2, add_norm_text_encoder=True
    )
    return model, {
        "hidden_states": meta(1, 16, 13, 72, 126),
        "timestep": meta(1),
        "encoder_hidden_states": meta(1, 256, 3584),
    }


def consisid() -> Example:
    """ConsisID, 49 frames of 720x480: 13x30x45 = 17550 video + 226 text tokens in one sequence.

    Hidden 3072, 48 heads of 64, 42 layers, after every second of which the video attends to 32 tokens of a face. Those
    are made of five layers of a CLIP encoder, 577 tokens each.
    """
    model = build(
        "ConsisIDTransformer3DModel",
        in_channels=32,
        num_attention_heads=48,
        num_layers=42,
        use_rotary_positional_embeddings=True,
        is_train_face=True,
    )
    return model, {
        "hidden_states": meta(1, 13, 32, 60, 90),
        "encoder_hidden_states": meta(1, 226, 4096),
        "timestep": meta(1, dtype=INT),
        "image_rotary_emb": rotary(17550, 64),
        "id_cond": meta(1, 1280),
        "id_vit_hidden": [meta(1, 577, 1024) for _ in range(5)],
    }


def latte_1() -> Example:
    """Latte-1, 16 frames of 512x512: 16x1024 = 16384 tokens, 120 text tokens (cross), no mask.

    Hidden 1152, 16 heads of 72, 28 layers within frames and 28 over time.
    """
    model = build(
        "LatteTransformer3DModel",
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        num_layers=28,
        cross_attention_dim=1152,
        attention_bias=True,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=4096,
    )
    return model, {
        "hidden_states": meta(1, 4, 16, 64, 64),
        "encoder_hidden_states": meta(1, 120, 4096),
        "timestep": meta(1, dtype=INT),
    }


def cogvideox_15_5b() -> Example:
    """CogVideoX 1.5 5B, 81 frames of 1360x768: 11x48x85 = 44880 video + 226 text tokens in one sequence.

    Hidden 3072, 48 heads of 64, 42 layers, rotary positions. A patch is two of the 22 latent frames deep.
    """
    model = build(
        "CogVideoXTransformer3DModel",
        num_attention_heads=48,
        num_layers=42,
        sample_width=300,
        sample_height=300,
        sample_frames=81,
        patch_size_t=2,
        patch_bias=False,
        use_rotary_positional_embeddings=True,
    )
    return model, {
        "hidden_states": meta(1, 22, 16, 96, 170),
        "encoder_hidden_states": meta(1, 226, 4096),
        "timestep": meta(1, dtype=INT),
        "image_rotary_emb": rotary(44880, 64),
    }


def sana_video_2b_480p() -> Example:
    """SANA-Video 2B, 81 frames of 832x480: 21x30x52 = 32760 tokens with linear attention, 300 text tokens (cross).

    Hidden 2240, 20 heads of 112, 20 layers, with a convolution over the grid and one over time in each.
    """
    return build("SanaVideoTransformer3DModel"), {
        "hidden_states": meta(1, 16, 21, 60, 104),
        "encoder_hidden_states": meta(1, 300, 2304),
        "encoder_attention_mask": meta(1, 300, dtype=INT),
        "timestep": meta(1, dtype=FLOAT),
    }


# --------------------------------------------------------------------------------------------------
# Audio


def stable_audio_open() -> Example:
    """Stable Audio Open 1.0, 47 s: 1024 frames and a token for the duration, 130 text tokens (cross).

    Hidden 1536, 24 heads of 64 (12 of keys in cross attention), 24 layers.
    """
    return build("StableAudioDiTModel"), {
        "hidden_states": meta(1, 64, 1024),
        "timestep": meta(1, dtype=FLOAT),
        "encoder_hidden_states": meta(1, 130, 768),
        "global_hidden_states": meta(1, 1, 1536),
        "rotary_embedding": rotary(1025, 32),
    }


def ace_step_15() -> Example:
    """ACE-Step 1.5, 240 s: 6000 frames, 3000 tokens, 600 tokens of text and lyrics (cross).

    Hidden 2048, 16 heads of 128 (8 of keys), 24 layers, of which every other attends within 128 tokens.
    """
    return build("AceStepTransformer1DModel"), {
        "hidden_states": meta(1, 6000, 64),
        "timestep": meta(1),
        "timestep_r": meta(1),
        "encoder_hidden_states": meta(1, 600, 2048),
        "context_latents": meta(1, 6000, 128),
    }


PUBLISHED: dict[str, Callable[[], Example]] = {
    function.__name__: function
    for function in (
        wan22_ti2v_5b,
        wan21_i2v_14b_720p,
        wan21_vace_14b_720p,
        wan22_animate_14b_720p,
        skyreels_v2_14b_720p,
        skyreels_v2_df_1300m_540p,
        hunyuan_video_15_480p,
        hunyuan_video_framepack,
        kandinsky5_lite,
        ltx2_19b,
        cosmos_predict2_2b_image,
        cosmos_predict2_14b_video,
        allegro_720p,
        easyanimate_51_12b,
        consisid,
        latte_1,
        cogvideox_15_5b,
        sana_video_2b_480p,
        stable_audio_open,
        ace_step_15,
    )
}
