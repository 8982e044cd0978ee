"""Tiny video transformers of diffusers, for exactness tests: the less used classes.  See ``zoo_videos``.

JoyImage edits images; it is here because its latents have frames.
"""

from __future__ import annotations

from functools import partial
from unittest import mock

import torch
from torch import Tensor, nn

if __package__:
    from .cases import Case, Inputs, frame_count, padding_mask, patch_grid, randn, rotary, text_length, timesteps
else:
    from cases import Case, Inputs, frame_count, padding_mask, patch_grid, randn, rotary, text_length, timesteps


def _latents(batch: int, odd: bool, channels: int) -> Tensor:
    """A video's latents, (batch, channels, frames, height, width), for patches of 2x2."""
    rows, columns = patch_grid(odd)
    return randn(1, batch, channels, frame_count(odd), 2 * rows, 2 * columns)


def _places(*sizes: int) -> Tensor:
    """The coordinates of a grid's points, (points, axes)."""
    return torch.cartesian_prod(*(torch.arange(size) for size in sizes))


# --------------------------------------------------------------------------------------------------
# ChronoEdit, AnyFlow, Wan-Animate 2


def _chrono_edit(image: bool, pair: bool = False) -> nn.Module:
    """``pair``: learned positions for two images of 4 tokens each.  Heads of 12 channels, as rotary wants it."""
    from diffusers import ChronoEditTransformer3DModel

    return ChronoEditTransformer3DModel(
        num_attention_heads=3 if image else 4, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=20,
        freq_dim=24, ffn_dim=96, num_layers=3, rope_max_seq_len=32, image_dim=28 if image else None,
        added_kv_proj_dim=36 if image else None, pos_embed_seq_len=8 if pair else None,
    )  # fmt: skip


def _chrono_edit_inputs(
    batch: int, odd: bool, image: bool = False, pair: bool = False, per_token: bool = False
) -> Inputs:
    """As Wan.  Two frames, as ``odd=False`` has them, the class takes for first and last: it spreads their places."""
    rows, columns = patch_grid(odd)
    steps = timesteps(batch)
    inputs = {
        "hidden_states": _latents(batch, odd, 4),
        "timestep": steps[:, None] - torch.arange(frame_count(odd) * rows * columns) if per_token else steps,
        "encoder_hidden_states": randn(2, batch, 512 if image else text_length(odd), 20),
    }
    if pair:
        inputs["encoder_hidden_states_image"] = randn(3, 2 * batch, 4, 28)
    elif image:
        inputs["encoder_hidden_states_image"] = randn(3, batch, 5 if odd else 4, 28)
    return inputs


def _any_flow(image: bool) -> nn.Module:
    """With an image: its tokens before the text's, and the step's size embedded instead of its end."""
    from diffusers import AnyFlowTransformer3DModel

    return AnyFlowTransformer3DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=20, freq_dim=24,
        ffn_dim=96, num_layers=3, rope_max_seq_len=32, image_dim=28 if image else None,
        deltatime_type="t-r" if image else "r",
    )  # fmt: skip


def _any_flow_inputs(batch: int, odd: bool, image: bool = False) -> Inputs:
    """Video is (batch, frames, channels, height, width); for each frame the step's begin and its end."""
    steps = (timesteps(batch)[:, None] - 30 * torch.arange(frame_count(odd))).float()
    inputs = {
        "hidden_states": _latents(batch, odd, 4).transpose(1, 2).contiguous(),
        "timestep": steps,
        "r_timestep": steps - 50,
        "encoder_hidden_states": randn(2, batch, text_length(odd), 20),
    }
    if image:
        inputs["encoder_hidden_states_image"] = randn(3, batch, 5 if odd else 4, 28)
    return inputs


def _any_flow_far(limit: int, image: bool = False) -> nn.Module:
    """Of the chunks of frames all but the last ``limit`` come in patches of 4x4; flex attention, by chunks causal."""
    from diffusers import AnyFlowFARTransformer3DModel

    return AnyFlowFARTransformer3DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=20, freq_dim=24,
        ffn_dim=96, num_layers=3, rope_max_seq_len=32, full_chunk_limit=limit,
        image_dim=28 if image else None, deltatime_type="t-r" if image else "r",
    )  # fmt: skip


def _any_flow_far_inputs(batch: int, odd: bool, image: bool = False, clean: bool = False, mode: str = "") -> Inputs:
    """Three chunks: of 1, 2 and 2 frames, or of 1 frame each.  ``clean``: full chunks come a second time, clean.

    Modes, for ``limit`` 2: "cached" denoises the third chunk with keys and values of the first (6 tokens a frame)
    and the second in caches, (2, batch, heads, tokens, channels) for each block; "store" fills the caches, in
    place, from the first two chunks, and has no other output.
    """
    rows, columns = patch_grid(odd)
    chunks = [1, 2, 2] if odd else [1, 1, 1]
    near, far = rows * columns, (rows // 2) * (columns // 2)  # tokens of a frame, full and compressed
    past = sum(chunks[:2])  # frames of the first two chunks
    frames = torch.arange(past if mode == "cached" else 0, past if mode == "store" else sum(chunks))
    steps = (timesteps(batch)[:, None] - 30 * frames).float()
    inputs = {
        "hidden_states": randn(1, batch, len(frames), 4, 2 * rows, 2 * columns),
        "timestep": steps,
        "r_timestep": steps - 50,
        "encoder_hidden_states": randn(2, batch, text_length(odd), 20),
        "chunk_partition": chunks[:2] if mode == "store" else chunks,
    }
    if image:
        inputs["encoder_hidden_states_image"] = randn(3, batch, 5 if odd else 4, 28)
    if clean:
        inputs |= {
            "clean_hidden_states": randn(4, batch, sum(chunks[1:]), 4, 2 * rows, 2 * columns),
            "clean_timestep": torch.full((batch, sum(chunks[1:])), 5.0),
        }
    if mode:
        inputs["kv_cache"] = [
            {
                "full_cache": randn(5 + block, 2, batch, 4, 2 * max(chunks) * near, 16),
                "compressed_cache": randn(8 + block, 2, batch, 4, 2 * max(chunks) * far, 16),
            }
            for block in range(3)
        ]
        inputs["kv_cache_flag"] = {"num_cached_chunks": 2, "is_cache_step": mode == "store"}
    return inputs


def _wan_animate2(image: bool, cached: bool = False) -> nn.Module:
    """Image embeddings have 1280 channels by the class's code.  ``cached``: with block masks for both sizes.

    The class compiles the mask when it first meets a size; here it is made without the compiler, and beforehand.
    """
    from diffusers.models.transformers import transformer_wan_animate_2 as module

    model = module.WanAnimate2Transformer3DModel(
        text_len=11, in_dim=8, dim=64, ffn_dim=96, freq_dim=24, text_dim=20, out_dim=4, num_heads=4, num_layers=3,
        use_img_emb=image,
    )  # fmt: skip
    if cached:
        create = module.create_block_mask
        plain = lambda *args, **kwargs: create(*args, **kwargs | {"_compile": False})  # noqa: E731
        with mock.patch.object(module, "create_block_mask", plain):
            for odd in (True, False):
                rows, columns = patch_grid(odd)
                key = (frame_count(odd) - 1, rows * columns)
                model.block_masks[key] = model.create_mask(*key, "cpu")
    return model


def _wan_animate2_inputs(batch: int, odd: bool, image: bool = False, cached: bool = False) -> Inputs:
    """Latents, conditions and texts in lists, one for each batch element, texts of different lengths.

    Either the pass over the driving video, which fills the cache (a Python object), or the one that denoises with
    the cache filled: there is a frame more than in the driving video.
    """
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    rows, columns = patch_grid(odd)
    frames = frame_count(odd)
    size = (frames, 2 * rows, 2 * columns)
    reference = torch.tensor([[frames - 1 if cached else frames, rows, columns]]).repeat(batch, 1)
    cache = WanAnimate2KVCache(3)
    inputs = {
        "hidden_states": list(randn(1, batch, 4, *size)),
        "timestep": timesteps(batch),
        "encoder_hidden_states": [randn(10 + item, text_length(odd) - item, 20) for item in range(batch)],
        "condition_latents": list(randn(3, batch, 4, *size)),
        "kv_cache": cache,
        "kv_cache_mode": "cached" if cached else "extract",
        "seq_len": frames * rows * columns,
        "encoder_hidden_states_image": randn(4, batch, 5 if odd else 4, 1280) if image else None,
    }
    if not cached:
        return inputs | {"offset_grid_sizes": reference}
    tokens = (frames - 1) * rows * columns
    for block in range(3):
        cache.get(block).store(randn(20 + block, batch, tokens, 4, 16), randn(30 + block, batch, tokens, 4, 16))
    return inputs | {
        "reference_grid_sizes": reference,
        "origin_len": 4 * (frames - 2) + 1,
        "origin_area": [16 * rows, 16 * columns],
    }


# --------------------------------------------------------------------------------------------------
# ConsisID, Helios


def _consis_id(face: bool, turned: bool = True, learned: bool = False) -> nn.Module:
    """A face is attended to after blocks 0 and 2 of four.  ``turned``: rotary; without, and ``learned``, one size."""
    from diffusers import ConsisIDTransformer3DModel

    return ConsisIDTransformer3DModel(
        num_attention_heads=4, attention_head_dim=12, in_channels=4, out_channels=4, time_embed_dim=24,
        text_embed_dim=20, num_layers=4, sample_width=14, sample_height=10, sample_frames=17, patch_size=2,
        max_text_seq_length=11, use_rotary_positional_embeddings=turned, use_learned_positional_embeddings=learned,
        is_train_face=face, cross_attn_dim_head=12, cross_attn_num_heads=4, LFE_id_dim=28, LFE_vit_dim=24,
        LFE_depth=2, LFE_dim_head=8, LFE_num_heads=3, LFE_num_id_token=2, LFE_num_querie=5, LFE_output_dim=32,
        LFE_ff_mult=2, LFE_num_scale=2,
    )  # fmt: skip


def _consis_id_inputs(batch: int, odd: bool, face: bool = False, turned: bool = True, fixed: bool = False) -> Inputs:
    """Video is (batch, frames, channels, height, width).  ``fixed``: always the sizes of ``odd=True``.

    The face: one vector, and a list of the features of an image encoder, of two of its layers.
    """
    odd = odd or fixed
    rows, columns = patch_grid(odd)
    inputs = {
        "hidden_states": _latents(batch, odd, 4).transpose(1, 2).contiguous(),
        "encoder_hidden_states": randn(2, batch, text_length(odd), 20),
        "timestep": timesteps(batch),
        "image_rotary_emb": rotary(frame_count(odd) * rows * columns, 12) if turned else None,
    }
    if face:
        inputs |= {"id_cond": randn(3, batch, 28), "id_vit_hidden": [randn(4, batch, 6, 24), randn(5, batch, 6, 24)]}
    return inputs


def _helios(variant: str = "") -> nn.Module:
    """The history takes a step of zero, and no part in cross attention.

    Variants: "steps": the history takes the video's step and does attend to text; "heads" and "all": its keys are
    scaled, by one number for each head or one for all.
    """
    from diffusers import HeliosTransformer3DModel

    return HeliosTransformer3DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=20, freq_dim=24,
        ffn_dim=96, num_layers=3, rope_dim=(4, 6, 6), guidance_cross_attn=variant != "steps",
        zero_history_timestep=variant != "steps", is_amplify_history=variant in ("heads", "all"),
        history_scale_mode="scalar" if variant == "all" else "per_head",
    )  # fmt: skip


def _helios_inputs(batch: int, odd: bool, history: bool = True) -> Inputs:
    """Histories of 2, 2 and 16 frames, of which the last two shrink to 12 and 16 tokens; indices (batch, frames)."""
    rows, columns = patch_grid(odd)
    frames = frame_count(odd)
    inputs = {
        "hidden_states": _latents(batch, odd, 4),
        "timestep": timesteps(batch),
        "encoder_hidden_states": randn(2, batch, text_length(odd), 20),
    }
    if not history:
        return inputs
    index = torch.arange(20 + frames).repeat(batch, 1)
    first, long, mid, short, latents = index.split([1, 16, 2, 1, frames], dim=1)
    return inputs | {
        "indices_hidden_states": latents,
        "indices_latents_history_short": torch.cat([first, short], dim=1),
        "indices_latents_history_mid": mid,
        "indices_latents_history_long": long,
        "latents_history_short": randn(5, batch, 4, 2, 2 * rows, 2 * columns),
        "latents_history_mid": randn(6, batch, 4, 2, 2 * rows, 2 * columns),
        "latents_history_long": randn(7, batch, 4, 16, 2 * rows, 2 * columns),
    }


# --------------------------------------------------------------------------------------------------
# Motif, JoyImage


def _motif_video(image: bool = False, decoder: bool = False) -> nn.Module:
    """``decoder``: the last of three single blocks starts anew from the latents and attends to the others' output.

    The others have a second attention, to text alone.
    """
    from diffusers import MotifVideoTransformer3DModel

    return MotifVideoTransformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=4, attention_head_dim=16, num_layers=2,
        num_single_layers=3, num_decoder_layers=1 if decoder else 0, text_embed_dim=20,
        image_embed_dim=28 if image else None, rope_axes_dim=(4, 6, 6), enable_text_cross_attention_dual=decoder,
        enable_text_cross_attention_single=decoder,
    )  # fmt: skip


def _motif_video_inputs(batch: int, odd: bool, mask: bool = True, image: bool = False) -> Inputs:
    """Mask: (batch, text) bool.  An image's tokens come before the text's."""
    return {
        "hidden_states": _latents(batch, odd, 9),
        "timestep": timesteps(batch),
        "encoder_hidden_states": randn(2, batch, text_length(odd), 20),
        "encoder_attention_mask": padding_mask(batch, text_length(odd), torch.bool) if mask else None,
        "image_embeds": randn(3, batch, 5 if odd else 4, 28) if image else None,
    }


def _joy_image(rope: str = "rope") -> nn.Module:
    """``mrope``: text is rotated too, by an offset which the class reads from a tensor."""
    from diffusers import JoyImageEditTransformer3DModel

    return JoyImageEditTransformer3DModel(
        in_channels=4, hidden_size=64, num_attention_heads=4, text_dim=20, num_layers=3, rope_dim_list=[4, 6, 6],
        rope_type=rope,
    )  # fmt: skip


def _joy_image_inputs(batch: int, odd: bool, items: int) -> Inputs:
    """One video, or ``items`` images, (batch, items, channels, 1, height, width), the last one made of the others."""
    rows, columns = patch_grid(odd)
    return {
        "hidden_states": randn(1, batch, items, 4, 1, 2 * rows, 2 * columns) if items else _latents(batch, odd, 4),
        "timestep": timesteps(batch),
        "encoder_hidden_states": randn(2, batch, text_length(odd), 20),
    }


def _joy_image_plus() -> nn.Module:
    from diffusers import JoyImageEditPlusTransformer3DModel

    return JoyImageEditPlusTransformer3DModel(
        in_channels=4, hidden_size=64, num_attention_heads=4, text_dim=20, num_layers=3, rope_dim_list=[4, 6, 6]
    )


def _joy_image_plus_inputs(batch: int, odd: bool, mask: bool) -> Inputs:
    """Patches come packed, (batch, patches, channels, 1, 2, 2), of two images for each batch element.

    With a mask, (batch, text) int64, the second element's images are smaller, and padded.
    """
    rows, columns = patch_grid(odd)
    shapes = [[(1, rows, columns), (1, 3, 4 - (item if mask else 0))] for item in range(batch)]
    return {
        "hidden_states": randn(1, batch, rows * columns + 12, 4, 1, 2, 2),
        "timestep": timesteps(batch),
        "encoder_hidden_states": randn(2, batch, text_length(odd), 20),
        "encoder_hidden_states_mask": padding_mask(batch, text_length(odd), torch.int64) if mask else None,
        "shape_list": shapes,
    }


# --------------------------------------------------------------------------------------------------
# Kandinsky 6


def _kandinsky6(variant: str = "") -> nn.Module:
    """Audio has heads of 8 channels.  Variants: "linked": rotary between the modalities, so heads of 16, and gates
    crosswise; "image": two types of frames and a condition in the latents.
    """
    from diffusers import Kandinsky6Transformer3DModel

    linked = variant == "linked"
    return Kandinsky6Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=20, in_text_dim2=24, time_dim=32, model_dim=64, ff_dim=96,
        num_text_blocks=2, num_visual_blocks=3, axes_dims=(4, 6, 6), visual_cond=variant == "image", in_audio_dim=6,
        out_audio_dim=6, model_dim_a=64 if linked else 32, ff_dim_a=48, axes_dims_a=(4, 6, 6) if linked else (2, 2, 4),
        ca_rope=linked, cross_gates=linked, fix_modulation=linked,
        visual_token_type_num_embeddings=2 if variant == "image" else 0,
    )  # fmt: skip


def _kandinsky6_inputs(batch: int, odd: bool, audio: bool = True, mask: bool = True, image: bool = False) -> Inputs:
    """Video is (batch, frames, height, width, channels); mask: (batch, text) bool.

    With an image another frame follows, of another type, in the first one's place.
    """
    rows, columns = patch_grid(odd)
    frames = frame_count(odd) + image
    inputs = {
        "hidden_states": randn(1, batch, frames, 2 * rows, 2 * columns, 9 if image else 4),
        "encoder_hidden_states": randn(2, batch, text_length(odd), 20),
        "pooled_projections": randn(3, batch, 24),
        "timestep": timesteps(batch).float(),
        "audio_hidden_states": randn(4, batch, 9 if odd else 6, 6) if audio else None,
        "encoder_attention_mask": padding_mask(batch, text_length(odd), torch.bool) if mask else None,
    }
    if image:
        last = torch.arange(frames) == frames - 1
        inputs |= {
            "visual_token_type_ids": last.long().repeat(batch, 1),
            "visual_rope_pos": (torch.arange(frames) * ~last, torch.arange(rows), torch.arange(columns)),
        }
    return inputs


def _kandinsky6_sr() -> nn.Module:
    """Attention in blocks of 64 tokens (nabla), always by flex attention; of the frames always a token's own."""
    from diffusers import Kandinsky6SRTransformer3DModel

    return Kandinsky6SRTransformer3DModel(
        in_visual_dim=4, out_visual_dim=6, time_dim=24, model_dim=64, ff_dim=96, num_visual_blocks=3,
        axes_dims=(4, 6, 6), nabla_window=(1, 1, 1),
    )  # fmt: skip


def _kandinsky6_sr_inputs(batch: int, odd: bool) -> Inputs:
    """Noise, condition and mask, channels last; a grid of 8x8, of 3 or 2 frames, patches of one.  No text."""
    return {"hidden_states": randn(1, batch, 3 if odd else 2, 8, 8, 9), "timestep": timesteps(batch).float()}


# --------------------------------------------------------------------------------------------------
# One sequence for all: Cosmos 3, MiniMax H3


def _cosmos3(variant: str = "") -> nn.Module:
    """Two heads of keys for four of queries.  Variants: "sound", "action", and "square": squared ReLU, other norms."""
    from diffusers import Cosmos3OmniTransformer

    square = variant == "square"
    return Cosmos3OmniTransformer(
        head_dim=16, hidden_size=64, intermediate_size=96, latent_channel=4, patch_latent_dim=16, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, rope_axes_dim=[4, 2, 2], vocab_size=50,
        sound_gen=variant == "sound", sound_dim=6 if variant == "sound" else None, action_gen=variant == "action",
        action_dim=5 if variant == "action" else None, num_embodiment_domains=3,
        hidden_act="relu2" if square else "silu", qk_norm_for_text=not square, use_und_k_norm_for_gen=square,
    )  # fmt: skip


def _cosmos3_inputs(batch: int, odd: bool, extra: str = "", image: bool = False) -> Inputs:
    """The class has no batch: one sequence of text, which is causal, then video, then sound or action.

    ``batch`` is ignored.  Indices say where each part stands, and which frames are noisy: with an image the first
    is not, and it is not predicted.  Positions: (3, tokens), floating point.
    """
    rows, columns = patch_grid(odd)
    frames, text, more = frame_count(odd), text_length(odd), 0
    area = rows * columns
    noisy = torch.arange(1 if image else 0, frames)
    start = text + frames * area
    places = _places(frames, rows, columns).T * torch.tensor([[1.5], [1.0], [1.0]]) + torch.tensor([[100.0], [0], [0]])
    positions = [torch.arange(text).float().repeat(3, 1), places]
    inputs = {
        "input_ids": (7 * torch.arange(text) + 3) % 50,
        "text_indexes": torch.arange(text),
        "und_len": text,
        "vision_tokens": [randn(1, 1, 4, frames, 2 * rows, 2 * columns)],
        "vision_token_shapes": [(frames, rows, columns)],
        "vision_sequence_indexes": torch.arange(text, start),
        "vision_mse_loss_indexes": torch.arange(text + int(noisy[0]) * area, start),
        "vision_timesteps": torch.full((len(noisy) * area,), 700.0),
        "vision_noisy_frame_indexes": [noisy],
    }
    if extra:
        more = 9 if odd else 6
        known = 1 if extra == "action" else 0  # the first action is given
        inputs |= {
            f"{extra}_tokens": [randn(2, 6, more) if extra == "sound" else randn(2, more, 5)],
            f"{extra}_token_shapes": [(more, 1, 1)],
            f"{extra}_sequence_indexes": torch.arange(start, start + more),
            f"{extra}_mse_loss_indexes": torch.arange(start + known, start + more),
            f"{extra}_timesteps": torch.full((more - known,), 700.0),
            f"{extra}_noisy_frame_indexes": [torch.arange(known, more)],
        }
        positions.append(torch.stack([100.0 + torch.arange(more), torch.zeros(more), torch.zeros(more)]))
    if extra == "action":
        inputs["action_domain_ids"] = [torch.tensor(2)]
    return inputs | {"position_ids": torch.cat(positions, dim=1), "sequence_length": start + more}


def _minimax_h3() -> nn.Module:
    """Four heads of 16 channels on a hidden size of 48; 12 of the 16 are rotated."""
    from diffusers import MiniMaxH3Transformer3DModel

    return MiniMaxH3Transformer3DModel(
        num_attention_heads=4, attention_head_dim=16, hidden_size=48, num_layers=3, num_refiner_layers=2, ffn_dim=96,
        in_channels=2, audio_in_channels=6, text_dim=20, freq_dim=24, time_embed_hidden_dim=32, time_embed_dim=28,
        rope_freq_dim=2,
    )  # fmt: skip


def _minimax_h3_inputs(batch: int, odd: bool, keyframe: bool) -> Inputs:
    """Text, audio and video rows in one sequence, whose structure and whose steps the whole batch shares.

    Rows of video are packed patches.  A key frame's rows stand before the audio's and have a step of their own.
    """
    rows, columns = patch_grid(odd)
    frames, text, sounds = frame_count(odd), text_length(odd), 10 if odd else 6
    given = rows * columns if keyframe else 0
    audio = text + given
    video = audio + sounds
    total = video + frames * rows * columns
    places = torch.zeros(total, 3, dtype=torch.float64)
    places[:text, 0] = torch.arange(text)
    grid = _places(1, rows, columns).double() + torch.tensor([text, 0, 0])
    places[text:audio] = grid[:given]
    places[audio:video, 0] = text + torch.arange(sounds // 2).repeat(2)  # two channels, at the grid's two sides
    places[audio:video, 2] = (columns - 1.0) * torch.arange(2).repeat_interleave(sounds // 2)
    places[video:] = _places(frames, rows, columns).double() * torch.tensor([5.0, 1, 1]) + torch.tensor([text, 0, 0])
    video_rows = torch.cat([torch.arange(text, audio), torch.arange(video, total)])
    tags = torch.zeros(total, dtype=torch.int64)  # video
    tags[:text], tags[audio:video] = 1, 2
    steps = torch.zeros(total, dtype=torch.int64)
    steps[text:audio] = 1
    return {
        "hidden_states": randn(1, batch, len(video_rows), 8),
        "audio_hidden_states": randn(2, batch, sounds, 6),
        "encoder_hidden_states": randn(3, batch, text, 20),
        "timestep": torch.tensor([700.0, 0.0] if keyframe else [700.0]),
        "timestep_indices": steps,
        "token_tags": tags,
        "position_ids": places,
        "video_indices": video_rows,
        "audio_indices": torch.arange(audio, video),
        "text_indices": torch.arange(text),
    }


# --------------------------------------------------------------------------------------------------
# Sana-WM


def _sana_wm(rays: bool) -> nn.Module:
    """Blocks 0 and 2 scan over the frames (gated delta rule), 1 and 3 have softmax, computed in bfloat16.

    ``rays``: a map of the camera's rays is added to the latents, in patches of 2x2; without it, Plücker coordinates
    enter each block.
    """
    from diffusers import SanaWMTransformer3DModel

    return SanaWMTransformer3DModel(
        in_channels=4, num_layers=4, hidden_size=64, num_attention_heads=4, linear_head_dim=16, softmax_every_n=2,
        patch_size=(1, 2, 2) if rays else (1, 1, 1), chunk_plucker_channels=6, caption_channels=20, mlp_ratio=2.0,
        use_chunk_plucker_post_attn=not rays,
    )  # fmt: skip


def _sana_wm_inputs(batch: int, odd: bool, rays: bool = False, camera: bool = True, padded: bool = False) -> Inputs:
    """A step for each frame, (batch, 1, frames); mask: (batch, text) int64; ``padded``: the last frame is not valid.

    The camera: for each frame a pose, 4x4, two focal lengths and the centre, in latent pixels.
    """
    rows, columns = patch_grid(odd)
    frames, patch = frame_count(odd), 2 if rays else 1
    height, width = patch * rows, patch * columns
    pose = torch.eye(4).repeat(batch, frames, 1, 1)
    pose[..., :3, :3] = torch.linalg.qr(torch.eye(3) + 0.1 * randn(5, batch, frames, 3, 3)).Q
    pose[..., :3, 3] = 0.3 * randn(6, batch, frames, 3)
    lens = torch.tensor([0.9 * width, 0.9 * height, width / 2, height / 2]).expand(batch, frames, 4)
    steps = timesteps(batch)[:, None, None] * (torch.arange(frames) > 0)
    inputs = {
        "hidden_states": randn(1, batch, 4, frames, height, width),
        "timestep": steps.float(),
        "encoder_hidden_states": randn(2, batch, text_length(odd), 20),
        "encoder_attention_mask": padding_mask(batch, text_length(odd), torch.int64),
    }
    if camera:
        inputs["camera_conditions"] = torch.cat([pose.flatten(2), lens], dim=-1)
    if camera and not rays:
        inputs["chunk_plucker"] = randn(7, batch, 6, frames, height, width)
    if padded:
        valid = (torch.arange(frames) < frames - 1).float()
        inputs["frame_valid_mask"] = valid[None, None, :, None, None].repeat(batch, 1, 1, 1, 1)
    return inputs


def _sana_wm_refiner(gated: bool) -> nn.Module:
    """LTX-2 without its audio, whose parameters it keeps.  Gated: gates at the heads, and rotary by halves."""
    from diffusers import SanaWMLTX2RefinerTransformer3DModel

    return SanaWMLTX2RefinerTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=16, cross_attention_dim=64,
        audio_in_channels=6, audio_out_channels=6, audio_num_attention_heads=4, audio_attention_head_dim=8,
        audio_cross_attention_dim=32, num_layers=3, caption_channels=20, gated_attn=gated,
        rope_type="split" if gated else "interleaved",
    )  # fmt: skip


def _sana_wm_refiner_inputs(
    batch: int, odd: bool, mask: bool = True, gated: bool = False, mode: str | None = None
) -> Inputs:
    """Tokens come packed; rotary comes with them, (batch, tokens, hidden), or by heads; one step for each token.

    ``mode`` is the cache's, a Python object: "inject" puts keys and values of one frame (the sink, not yet rotated)
    and of another (history) before the video's, "capture_pre_rope" stores keys and values in it.
    """
    from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMRefinerKVCache

    rows, columns = patch_grid(odd)
    area = rows * columns
    tokens = frame_count(odd) * area

    def turns(count: int) -> tuple[Tensor, ...]:
        tables = (table.repeat(batch, 1, 1) for table in rotary(count, 64))
        if gated:  # half as many, for each head
            return tuple(table[..., ::2].unflatten(2, (4, 8)).transpose(1, 2) for table in tables)
        return tuple(tables)

    inputs = {
        "hidden_states": randn(1, batch, tokens, 8),
        "encoder_hidden_states": randn(2, batch, text_length(odd), 20),
        "timestep": timesteps(batch)[:, None] - torch.arange(tokens).float(),
        "video_rotary_emb": turns(tokens),
        "encoder_attention_mask": padding_mask(batch, text_length(odd), torch.int64) if mask else None,
    }
    if mode is None:
        return inputs
    cache = SanaWMRefinerKVCache(3)
    if "inject" in mode:
        cache.sink_pe = turns(area)
        for block in range(3):
            layer = cache.get(block)
            layer.store_sink(randn(10 + block, batch, area, 64), randn(20 + block, batch, area, 64))
            layer.store_history(randn(30 + block, batch, area, 64), randn(40 + block, batch, area, 64))
    return inputs | {"kv_cache": cache, "kv_cache_mode": mode}


BFLOAT16 = 5e-3
"""The softmax blocks of some classes compute in bfloat16 whatever the model is in: another order of sums is another
rounding."""

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("chrono_edit", partial(_chrono_edit, True), partial(_chrono_edit_inputs, image=True), 3),
        Case(
            "chrono_edit_pair",
            partial(_chrono_edit, True, True),
            partial(_chrono_edit_inputs, image=True, pair=True),
            3,
        ),
        Case("chrono_edit_noimage", partial(_chrono_edit, False), _chrono_edit_inputs, 4),
        Case("chrono_edit_steps", partial(_chrono_edit, False), partial(_chrono_edit_inputs, per_token=True), 4),
        Case("any_flow", partial(_any_flow, False), _any_flow_inputs, 4),
        Case("any_flow_image", partial(_any_flow, True), partial(_any_flow_inputs, image=True), 4),
        Case("any_flow_far", partial(_any_flow_far, 3), _any_flow_far_inputs, 4),
        Case("any_flow_far_compressed", partial(_any_flow_far, 2), _any_flow_far_inputs, 4),
        Case("any_flow_far_clean", partial(_any_flow_far, 2), partial(_any_flow_far_inputs, clean=True), 4),
        Case("any_flow_far_image", partial(_any_flow_far, 2, True), partial(_any_flow_far_inputs, image=True), 4),
        Case("any_flow_far_cached", partial(_any_flow_far, 2), partial(_any_flow_far_inputs, mode="cached"), 4),
        Case("any_flow_far_store", partial(_any_flow_far, 2), partial(_any_flow_far_inputs, mode="store"), 4),
        Case("wan_animate2", partial(_wan_animate2, True), partial(_wan_animate2_inputs, image=True), 4),
        Case("wan_animate2_noimage", partial(_wan_animate2, False), _wan_animate2_inputs, 4),
        Case(
            "wan_animate2_cached",
            partial(_wan_animate2, True, True),
            partial(_wan_animate2_inputs, image=True, cached=True),
            4,
        ),
        Case("consis_id", partial(_consis_id, True), partial(_consis_id_inputs, face=True), 4),
        Case("consis_id_noface", partial(_consis_id, False), _consis_id_inputs, 4),
        Case(
            "consis_id_learned",
            partial(_consis_id, True, True, True),
            partial(_consis_id_inputs, face=True, fixed=True),
            4,
        ),
        Case(
            "consis_id_fixed",
            partial(_consis_id, False, False),
            partial(_consis_id_inputs, turned=False, fixed=True),
            4,
        ),
        Case("helios", _helios, _helios_inputs, 4),
        Case("helios_nohistory", _helios, partial(_helios_inputs, history=False), 4),
        Case("helios_steps", partial(_helios, "steps"), _helios_inputs, 4),
        Case("helios_heads", partial(_helios, "heads"), _helios_inputs, 4),
        Case("helios_scaled", partial(_helios, "all"), _helios_inputs, 4),
        Case("motif_video", _motif_video, _motif_video_inputs, 4),
        Case("motif_video_nomask", _motif_video, partial(_motif_video_inputs, mask=False), 4),
        Case("motif_video_i2v", partial(_motif_video, True), partial(_motif_video_inputs, image=True), 4),
        Case(
            "motif_video_decoder",
            partial(_motif_video, True, True),
            partial(_motif_video_inputs, image=True),
            4,
        ),
        Case("joy_image_edit", _joy_image, partial(_joy_image_inputs, items=2), 4),
        Case("joy_image_edit_single", _joy_image, partial(_joy_image_inputs, items=1), 4),
        Case("joy_image_edit_video", _joy_image, partial(_joy_image_inputs, items=0), 4),
        Case("joy_image_edit_mrope", partial(_joy_image, "mrope"), partial(_joy_image_inputs, items=2), 4),
        Case("joy_image_edit_plus", _joy_image_plus, partial(_joy_image_plus_inputs, mask=True), 4),
        Case("joy_image_edit_plus_nomask", _joy_image_plus, partial(_joy_image_plus_inputs, mask=False), 4),
        Case("kandinsky6", _kandinsky6, _kandinsky6_inputs, 4),
        Case("kandinsky6_nomask", _kandinsky6, partial(_kandinsky6_inputs, mask=False), 4),
        Case("kandinsky6_silent", _kandinsky6, partial(_kandinsky6_inputs, audio=False), 4),
        Case("kandinsky6_linked", partial(_kandinsky6, "linked"), _kandinsky6_inputs, 4),
        Case("kandinsky6_image", partial(_kandinsky6, "image"), partial(_kandinsky6_inputs, image=True), 4),
        Case("kandinsky6_sr", _kandinsky6_sr, _kandinsky6_sr_inputs, 4),
        Case("cosmos3_omni", _cosmos3, _cosmos3_inputs, 4),
        Case("cosmos3_omni_image", _cosmos3, partial(_cosmos3_inputs, image=True), 4),
        Case("cosmos3_omni_sound", partial(_cosmos3, "sound"), partial(_cosmos3_inputs, extra="sound"), 4),
        Case(
            "cosmos3_omni_action",
            partial(_cosmos3, "action"),
            partial(_cosmos3_inputs, extra="action", image=True),
            4,
        ),
        Case("cosmos3_omni_square", partial(_cosmos3, "square"), _cosmos3_inputs, 4),
        Case("minimax_h3", _minimax_h3, partial(_minimax_h3_inputs, keyframe=False), 4),
        Case("minimax_h3_keyframe", _minimax_h3, partial(_minimax_h3_inputs, keyframe=True), 4),
        Case("sana_wm", partial(_sana_wm, False), _sana_wm_inputs, 4, BFLOAT16),
        Case("sana_wm_nocamera", partial(_sana_wm, False), partial(_sana_wm_inputs, camera=False), 4, BFLOAT16),
        Case("sana_wm_padded", partial(_sana_wm, False), partial(_sana_wm_inputs, padded=True), 4, BFLOAT16),
        Case("sana_wm_rays", partial(_sana_wm, True), partial(_sana_wm_inputs, rays=True), 4, BFLOAT16),
        Case("sana_wm_refiner", partial(_sana_wm_refiner, False), _sana_wm_refiner_inputs, 4),
        Case(
            "sana_wm_refiner_nomask",
            partial(_sana_wm_refiner, False),
            partial(_sana_wm_refiner_inputs, mask=False),
            4,
        ),
        Case(
            "sana_wm_refiner_gated",
            partial(_sana_wm_refiner, True),
            partial(_sana_wm_refiner_inputs, gated=True),
            4,
        ),
        Case(
            "sana_wm_refiner_inject",
            partial(_sana_wm_refiner, False),
            partial(_sana_wm_refiner_inputs, mode="inject"),
            4,
        ),
        Case(
            "sana_wm_refiner_capture",
            partial(_sana_wm_refiner, False),
            partial(_sana_wm_refiner_inputs, mode="capture_pre_rope"),
            4,
        ),
        Case(
            "sana_wm_refiner_both",
            partial(_sana_wm_refiner, False),
            partial(_sana_wm_refiner_inputs, mode="inject_and_capture_post_rope"),
            4,
        ),
    )
}
