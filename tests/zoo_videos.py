"""Tiny video transformers of diffusers, for exactness tests: the widely used classes, each in all its modes.

As in ``models``, every entry of ``CASES`` is one model (or one way of calling it) with inputs for it; ``cases`` says
what the sizes are.  ``zoo_videos_more`` lists the other video classes.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

if __package__:
    from .cases import Case, Inputs, frame_count, padding_mask, patch_grid, randn, text_length, timesteps
else:
    from cases import Case, Inputs, frame_count, padding_mask, patch_grid, randn, text_length, timesteps


def _latents(batch: int, odd: bool, channels: int, patch: int = 2) -> Tensor:
    """A video's latents, (batch, channels, frames, height, width)."""
    rows, columns = patch_grid(odd)
    return randn(1, batch, channels, frame_count(odd), patch * rows, patch * columns)


# --------------------------------------------------------------------------------------------------
# HunyuanVideo 1.5 and Framepack


def _hunyuan_video15(meanflow: bool = False) -> nn.Module:
    from diffusers import HunyuanVideo15Transformer3DModel

    return HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=4, attention_head_dim=16, num_layers=3,
        num_refiner_layers=2, text_embed_dim=20, text_embed_2_dim=24, image_embed_dim=28,
        rope_axes_dim=(4, 6, 6), use_meanflow=meanflow,
    )  # fmt: skip


def _hunyuan_video15_inputs(batch: int, odd: bool, image: bool = True, meanflow: bool = False) -> Inputs:
    """Noise, condition and mask in one latent; patches of one; two texts with masks in the model's dtype.

    The class sorts the kept tokens of image and texts to the front by indexing with the masks, element by element,
    and takes an image embedding of zeros to mean that there is no image.  The timestep is floating point: its
    dtype is the one in which the class embeds it.
    """
    embeds = randn(4, batch, 5 if odd else 4, 28)
    return {
        "hidden_states": _latents(batch, odd, 9, patch=1),
        "timestep": timesteps(batch).float(),
        "timestep_r": timesteps(batch).float() - 25 if meanflow else None,
        "encoder_hidden_states": randn(2, batch, text_length(odd), 20),
        "encoder_attention_mask": padding_mask(batch, text_length(odd), torch.float32),
        "encoder_hidden_states_2": randn(3, batch, 7, 24),
        "encoder_attention_mask_2": padding_mask(batch, 7, torch.float32),
        "image_embeds": embeds if image else torch.zeros_like(embeds),
    }


def _framepack(guidance: bool) -> nn.Module:
    """The image projection and the embedder of the history are there always: forward fails without them."""
    from diffusers import HunyuanVideoFramepackTransformer3DModel

    return HunyuanVideoFramepackTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=16, num_layers=3,
        num_single_layers=3, num_refiner_layers=2, guidance_embeds=guidance, text_embed_dim=20,
        pooled_projection_dim=24, rope_axes_dim=(4, 6, 6), has_image_proj=True, image_proj_dim=28,
        has_clean_x_embedder=True,
    )  # fmt: skip


def _framepack_inputs(batch: int, odd: bool, guidance: bool) -> Inputs:
    """Histories of 2, 2 and 16 frames, of which the last two shrink to 12 and 16 tokens; frame indices as tensors.

    A mask comes with the text, (batch, text) in the model's own dtype.  At batch 1 the class cuts the text to the
    mask's sum, at batch 2 it fills a mask row by row.
    """
    rows, columns = patch_grid(odd)
    frames = frame_count(odd)
    index = torch.arange(1 + 1 + 2 + 16 + frames)
    first, history_4x, history_2x, history_1x, latents = index.split([1, 16, 2, 1, frames])
    return {
        "hidden_states": _latents(batch, odd, 4),
        "timestep": timesteps(batch),
        "encoder_hidden_states": randn(2, batch, text_length(odd), 20),
        "encoder_attention_mask": padding_mask(batch, text_length(odd), torch.float32),
        "pooled_projections": randn(3, batch, 24),
        "image_embeds": randn(4, batch, 5 if odd else 4, 28),
        "indices_latents": latents,
        "guidance": 6000.0 - 1000 * torch.arange(batch) if guidance else None,
        "latents_clean": randn(5, batch, 4, 2, 2 * rows, 2 * columns),
        "indices_latents_clean": torch.cat([first, history_1x]),
        "latents_history_2x": randn(6, batch, 4, 2, 2 * rows, 2 * columns),
        "indices_latents_history_2x": history_2x,
        "latents_history_4x": randn(7, batch, 4, 16, 2 * rows, 2 * columns),
        "indices_latents_history_4x": history_4x,
    }


# --------------------------------------------------------------------------------------------------
# LTX-2


def _ltx2(version: str = "2.0") -> nn.Module:
    """Video heads of 16 and audio heads of 8 channels.

    2.3: gates at the heads, text modulated by the step, no text projection, rotary by halves, and attention that
    guidance may replace with its values.  2.5: as 2.3, but the text's modulation is a table, the video's
    feed-forward has no bias, and a learned embedding marks key frames.
    """
    from diffusers import LTX2VideoTransformer3DModel

    later = {
        "gated_attn": True, "cross_attn_mod": True, "audio_gated_attn": True, "audio_cross_attn_mod": True,
        "rope_type": "split", "use_prompt_embeddings": False, "perturbed_attn": True,
    }  # fmt: skip
    last = {"ff_bias": False, "use_prompt_adaln_single": False, "use_keyframes_abs_pos_embedding": True}
    return LTX2VideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=16, cross_attention_dim=64,
        audio_in_channels=6, audio_out_channels=6, audio_num_attention_heads=4, audio_attention_head_dim=8,
        audio_cross_attention_dim=32, num_layers=3, caption_channels=20,
        **{"2.0": {}, "2.3": later, "2.5": later | last}[version],
    )  # fmt: skip


def _ltx2_inputs(batch: int, odd: bool, mask: bool = True, version: str = "2.0", mode: str = "") -> Inputs:
    """Video and audio tokens come packed, the grid as Python integers; masks: (batch, text) int64.

    From 2.3 on each modality brings text of its own width.  Modes: "image" gives one timestep for each video
    token, "isolated" cuts the modalities apart, "guided" takes the values for the attention in block 1, "guided one"
    does that for the first batch element only, "reference" has a mask for the video's self-attention, "keyframes"
    marks video tokens, "places" gives the coordinates, (batch, 3 or 1, tokens, 2), and the grid nevertheless.
    """
    rows, columns = patch_grid(odd)
    frames, sounds = frame_count(odd), 9 if odd else 6
    tokens = frames * rows * columns
    text, audio_text = (20, 20) if version == "2.0" else (64, 32)
    steps = timesteps(batch).float()
    inputs = {
        "hidden_states": randn(1, batch, tokens, 8),
        "audio_hidden_states": randn(2, batch, sounds, 6),
        "encoder_hidden_states": randn(3, batch, text_length(odd), text),
        "audio_encoder_hidden_states": randn(4, batch, text_length(odd), audio_text),
        "timestep": steps,
        "sigma": steps,
        "encoder_attention_mask": padding_mask(batch, text_length(odd), torch.int64) if mask else None,
        "audio_encoder_attention_mask": padding_mask(batch, text_length(odd), torch.int64) if mask else None,
        "num_frames": frames,
        "height": rows,
        "width": columns,
        "fps": 25.0,
        "audio_num_frames": sounds,
        "use_cross_timestep": version != "2.0",
    }
    first = (torch.arange(tokens) < rows * columns).float()  # the first frame's tokens
    if mode == "image":
        inputs |= {"timestep": steps[:, None] * (1 - first), "audio_timestep": steps}
    elif mode == "isolated":
        inputs["isolate_modalities"] = True
    elif mode == "guided":
        inputs["spatio_temporal_guidance_blocks"] = [1]
    elif mode == "guided one":
        inputs |= {"spatio_temporal_guidance_blocks": [1], "perturbation_mask": (torch.arange(batch) > 0).float()}
    elif mode == "reference":
        strength = torch.ones(tokens, tokens)
        strength[:, : rows * columns] = 0.9997  # times -10000 a bias of -3
        inputs["video_self_attention_mask"] = strength.repeat(batch, 1, 1)
    elif mode == "keyframes":
        inputs["video_keyframes_mask"] = first[:, None].repeat(batch, 1, 1)
    elif mode == "places":
        place = torch.cartesian_prod(torch.arange(frames), torch.arange(rows), torch.arange(columns)).T
        scale = torch.tensor([8 / 25, 32.0, 32.0])[:, None, None]
        bounds = torch.stack([place, place + 1], dim=-1) * scale
        moments = torch.stack([torch.arange(sounds), torch.arange(sounds) + 1], dim=-1) * 0.04
        inputs |= {
            "video_coords": bounds.repeat(batch, 1, 1, 1),
            "audio_coords": moments.repeat(batch, 1, 1, 1),
        }
    return inputs


# --------------------------------------------------------------------------------------------------
# Cosmos


def _cosmos(version: str) -> nn.Module:
    """Version 1: learned positions besides rotary.  Version 2: a channel for the condition's mask instead.

    Transfer 2.5 projects the text, attends to an image's tokens beside the text's, and adds what a control net made
    to every second block.  No channel for the padding of the picture: the class resizes that with torchvision,
    which is not among the packages the tests need.
    """
    from diffusers import CosmosTransformer3DModel

    transfer = {
        "use_crossattn_projection": True, "crossattn_proj_in_channels": 24, "encoder_hidden_states_channels": 20,
        "controlnet_block_every_n": 2, "img_context_dim_in": 28, "img_context_dim_out": 64,
    }  # fmt: skip
    return CosmosTransformer3DModel(
        in_channels=4 if version == "1" else 5, out_channels=4, num_attention_heads=4, attention_head_dim=16,
        num_layers=3, text_embed_dim=20, adaln_lora_dim=24, max_size=(8, 16, 16), concat_padding_mask=False,
        extra_pos_embed_type="learnable" if version == "1" else None, **(transfer if version == "transfer" else {}),
    )  # fmt: skip


def _cosmos_inputs(batch: int, odd: bool, version: str = "1", mask: bool = False) -> Inputs:
    """Mask: (batch, text) bool.  The frame rate is an integer.

    Version 2 and transfer give one timestep for each frame, (batch, 1, frames, 1, 1), floating point.
    """
    rows, columns = patch_grid(odd)
    frames, size = frame_count(odd), (2 * rows, 2 * columns)
    text = randn(2, batch, text_length(odd), 24 if version == "transfer" else 20)
    inputs = {
        "hidden_states": _latents(batch, odd, 4),
        "timestep": timesteps(batch),
        "encoder_hidden_states": text,
        "attention_mask": padding_mask(batch, text_length(odd), torch.bool) if mask else None,
        "fps": 30,
    }
    if version != "1":
        given = (torch.arange(frames) < 1).float()[None, None, :, None, None]  # the first frame is a condition
        inputs |= {
            "condition_mask": given.repeat(batch, 1, 1, *size),
            "timestep": (timesteps(batch)[:, None, None, None, None] / 1000 * (1 - given) + 0.01 * given),
        }
    if version == "transfer":
        tokens = frames * rows * columns
        inputs |= {
            "encoder_hidden_states": (text, randn(3, batch, 6, 28)),
            "block_controlnet_hidden_states": [randn(4, batch, tokens, 64), randn(5, batch, tokens, 64)],
            "fps": None,
        }
    return inputs


# --------------------------------------------------------------------------------------------------
# Relatives of Wan


def _skyreels_v2(image: bool = False, pair: bool = False, fps: bool = False, block: int = 1) -> nn.Module:
    """With an image as in ``_wan``, 3 heads; ``pair``: learned positions for two images of 4 tokens each.

    ``block`` frames at a time see each other and what came before (causal); ``fps``: the frame rate is embedded.
    """
    from diffusers import SkyReelsV2Transformer3DModel

    return SkyReelsV2Transformer3DModel(
        num_attention_heads=3 if image else 4, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=20,
        freq_dim=24, ffn_dim=96, num_layers=3, rope_max_seq_len=32, image_dim=28 if image else None,
        added_kv_proj_dim=48 if image else None, pos_embed_seq_len=8 if pair else None,
        inject_sample_info=fps, num_frame_per_block=block,
    )  # fmt: skip


def _skyreels_v2_inputs(
    batch: int, odd: bool, image: bool = False, pair: bool = False, forcing: bool = False, fps: bool = False,
    even: bool = False,
) -> Inputs:  # fmt: skip
    """``forcing``: one timestep for each frame, (batch, frames); the frame rate is a list of one 0 or 1.

    (One for each batch element works at batch 1 only.)  ``even``: always 4 frames, two blocks of two.
    With an image 512 text tokens, as in ``_wan_inputs``; a pair of images comes as twice the batch.
    """
    rows, columns = patch_grid(odd)
    frames = 4 if even else frame_count(odd)
    steps = timesteps(batch)
    inputs = {
        "hidden_states": randn(1, batch, 4, frames, 2 * rows, 2 * columns),
        "timestep": steps[:, None] - 30 * torch.arange(frames) if forcing else steps,
        "encoder_hidden_states": randn(2, batch, 512 if image else text_length(odd), 20),
        "enable_diffusion_forcing": forcing,
        "fps": [1] if fps else None,
    }
    if pair:
        inputs["encoder_hidden_states_image"] = randn(3, 2 * batch, 4, 28)
    elif image:
        inputs["encoder_hidden_states_image"] = randn(3, batch, 5 if odd else 4, 28)
    return inputs


def _wan_vace(image: bool) -> nn.Module:
    """Two control blocks beside blocks 0 and 2 of three."""
    from diffusers import WanVACETransformer3DModel

    return WanVACETransformer3DModel(
        num_attention_heads=3 if image else 4, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=20,
        freq_dim=24, ffn_dim=96, num_layers=3, rope_max_seq_len=32, vace_layers=[0, 2], vace_in_channels=6,
        image_dim=28 if image else None, added_kv_proj_dim=48 if image else None,
    )  # fmt: skip


def _wan_vace_inputs(batch: int, odd: bool, image: bool = False, scale: bool = True, short: bool = False) -> Inputs:
    """Scales for the control blocks, one each; ``short``: control for all frames but the last, padded."""
    rows, columns = patch_grid(odd)
    inputs = {
        "hidden_states": _latents(batch, odd, 4),
        "timestep": timesteps(batch),
        "encoder_hidden_states": randn(2, batch, 512 if image else text_length(odd), 20),
        "control_hidden_states": randn(4, batch, 6, frame_count(odd) - short, 2 * rows, 2 * columns),
        "control_hidden_states_scale": torch.tensor([1.0, 0.5]) if scale else None,
    }
    if image:
        inputs["encoder_hidden_states_image"] = randn(3, batch, 5 if odd else 4, 28)
    return inputs


def _wan_animate(image: bool) -> nn.Module:
    """Four blocks; the face is attended to after blocks 0 and 2, frame by frame.  Faces of 16x16 pixels.

    The motion encoder is narrow: each of its layers divides by the root of its width, and the face should matter.
    """
    from diffusers import WanAnimateTransformer3DModel

    return WanAnimateTransformer3DModel(
        num_attention_heads=3 if image else 4, attention_head_dim=16, in_channels=12, latent_channels=4,
        out_channels=4, text_dim=20, freq_dim=24, ffn_dim=96, num_layers=4, rope_max_seq_len=32,
        image_dim=28 if image else None, added_kv_proj_dim=48 if image else None,
        motion_encoder_channel_sizes={"4": 2, "8": 2, "16": 2}, motion_encoder_size=16, motion_style_dim=2,
        motion_dim=2, motion_encoder_dim=16, face_encoder_hidden_dim=16, face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )  # fmt: skip


def _wan_animate_inputs(batch: int, odd: bool, image: bool = False) -> Inputs:
    """One frame of reference, so poses are one fewer; four pixel frames of the face for each but the first."""
    rows, columns = patch_grid(odd)
    frames = frame_count(odd)
    inputs = {
        "hidden_states": _latents(batch, odd, 12),
        "timestep": timesteps(batch),
        "encoder_hidden_states": randn(2, batch, 512 if image else text_length(odd), 20),
        "pose_hidden_states": randn(4, batch, 4, frames - 1, 2 * rows, 2 * columns),
        "face_pixel_values": randn(5, batch, 3, 4 * (frames - 2) + 1, 16, 16).tanh(),
        "motion_encode_batch_size": 8,
    }
    if image:
        inputs["encoder_hidden_states_image"] = randn(3, batch, 5 if odd else 4, 28)
    return inputs


# --------------------------------------------------------------------------------------------------
# Kandinsky 5


def _kandinsky5(condition: bool, nabla: bool = False) -> nn.Module:
    """Rotary rounds queries and keys to bfloat16.  Nabla: attention in blocks of 64 tokens, by flex attention.

    The pipeline chooses that with ``set_attention_backend``, which would choose it for every other model too.
    """
    from diffusers import Kandinsky5Transformer3DModel

    model = Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=20, in_text_dim2=24, time_dim=32, out_visual_dim=4, model_dim=64, ff_dim=96,
        num_text_blocks=2, num_visual_blocks=3, axes_dims=(4, 6, 6), visual_cond=condition,
        attention_type="nabla" if nabla else "regular",
    )  # fmt: skip
    for module in model.modules() if nabla else ():
        if hasattr(module, "processor"):
            module.processor._attention_backend = "flex"
    return model


def _kandinsky5_inputs(batch: int, odd: bool, condition: bool, nabla: bool = False) -> Inputs:
    """Video is (batch, frames, height, width, channels); positions are tensors, without batch; no mask.

    With a condition the first frame comes again, and a mask.  Nabla works on squares of 8x8 patches, so the grid
    is 8x8, of 3 or 2 frames; a window of one frame to either side is attended to always.
    """
    rows, columns = (8, 8) if nabla else patch_grid(odd)
    frames = (3 if odd else 2) if nabla else frame_count(odd)
    video = randn(1, batch, frames, 2 * rows, 2 * columns, 4)
    if condition:
        given = torch.zeros_like(video[..., :1])
        given[:, 0] = 1
        video = torch.cat([video, video * given, given], dim=-1)
    sparse = None
    if nabla:
        time = torch.arange(frames)
        sparse = {
            "sta_mask": ((time[:, None] - time).abs() <= 1)[None, None], "attention_type": "nabla",
            "to_fractal": True, "P": 0.8, "wT": 3, "wW": 1, "wH": 1, "add_sta": True,
            "visual_shape": (frames, rows, columns), "method": "topcdf",
        }  # fmt: skip
    return {
        "hidden_states": video,
        "encoder_hidden_states": randn(2, batch, text_length(odd), 20),
        "timestep": timesteps(batch).float(),
        "pooled_projections": randn(3, batch, 24),
        "visual_rope_pos": [torch.arange(frames), torch.arange(rows), torch.arange(columns)],
        "text_rope_pos": torch.arange(text_length(odd)),
        "scale_factor": (1.0, 2.0, 2.0),
        "sparse_params": sparse,
    }


# --------------------------------------------------------------------------------------------------
# Allegro, EasyAnimate, Sana


def _allegro() -> nn.Module:
    from diffusers import AllegroTransformer3DModel

    return AllegroTransformer3DModel(
        num_attention_heads=4, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=3,
        cross_attention_dim=48, sample_height=16, sample_width=16, sample_frames=5, caption_channels=20,
    )  # fmt: skip


def _allegro_inputs(batch: int, odd: bool, mask: bool = True, padded: bool = False) -> Inputs:
    """Text mask: (batch, text) int64.  ``padded``: a mask of the latents too, (batch, frames, height, width).

    Rotary: for each axis a table of cosines and sines, then for each axis the positions, (1, tokens).
    """
    rows, columns = patch_grid(odd)
    sizes = (frame_count(odd), rows, columns)
    tables = []
    for size in sizes:
        angles = torch.outer(torch.arange(size).float(), 100.0 ** (-torch.arange(0, 4, 2) / 4)).repeat(1, 2)
        tables.append((angles.cos(), angles.sin()))
    places = torch.cartesian_prod(*(torch.arange(size) for size in sizes)).T
    inputs = {
        "hidden_states": _latents(batch, odd, 4),
        "encoder_hidden_states": randn(2, batch, text_length(odd), 20),
        "timestep": timesteps(batch),
        "encoder_attention_mask": padding_mask(batch, text_length(odd), torch.int64) if mask else None,
        "image_rotary_emb": (tuple(tables), tuple(place[None] for place in places)),
    }
    if padded:
        kept = padding_mask(batch, columns, torch.float32).repeat_interleave(2, dim=1)
        inputs["attention_mask"] = kept[:, None, None].repeat(1, sizes[0], 2 * rows, 1)
    return inputs


def _easy_animate(channels: int = 4, mixed: bool = False) -> nn.Module:
    """``mixed``: only the first of the blocks has weights of its own for text; a norm after, and before T5 too."""
    from diffusers import EasyAnimateTransformer3DModel

    return EasyAnimateTransformer3DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=channels, out_channels=4, patch_size=2,
        num_layers=3, mmdit_layers=1 if mixed else 3, time_embed_dim=24, add_norm_text_encoder=mixed,
        text_embed_dim=20, text_embed_dim_t5=20 if mixed else None, after_norm=mixed,
    )  # fmt: skip


def _easy_animate_inputs(batch: int, odd: bool, extra: str = "", t5: bool = False) -> Inputs:
    """No mask.  ``extra``: more channels, of "inpaint_latents" (5) or "control_latents" (4)."""
    inputs = {
        "hidden_states": _latents(batch, odd, 4),
        "timestep": timesteps(batch),
        "encoder_hidden_states": randn(2, batch, text_length(odd), 20),
        "encoder_hidden_states_t5": randn(3, batch, 7, 20) if t5 else None,
    }
    if extra:
        channels = 5 if extra == "inpaint_latents" else 4
        inputs[extra] = randn(4, batch, channels, *inputs["hidden_states"].shape[2:])
    return inputs


def _sana_video(guidance: bool) -> nn.Module:
    """Linear attention, and a convolution over the grid and one over time in place of the feed-forward."""
    from diffusers import SanaVideoTransformer3DModel

    return SanaVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=16, num_layers=3,
        num_cross_attention_heads=4, cross_attention_head_dim=16, cross_attention_dim=64, caption_channels=20,
        sample_size=16, guidance_embeds=guidance, rope_max_seq_len=32,
    )  # fmt: skip


def _sana_video_inputs(
    batch: int, odd: bool, mask: bool = True, image: bool = False, guidance: bool = False, control: bool = False
) -> Inputs:
    """Mask: (batch, text) int64.  With an image one timestep for each token, (batch, 1, frames, rows, columns)."""
    rows, columns = patch_grid(odd)
    frames = frame_count(odd)
    steps = timesteps(batch).float()
    given = (torch.arange(frames) < 1).float()[:, None, None].expand(batch, 1, frames, rows, columns)
    inputs = {
        "hidden_states": _latents(batch, odd, 4),
        "encoder_hidden_states": randn(2, batch, text_length(odd), 20),
        "timestep": steps[:, None, None, None, None] * (1 - given) if image else steps,
        "encoder_attention_mask": padding_mask(batch, text_length(odd), torch.int64) if mask else None,
        "guidance": 0.5 - 0.1 * torch.arange(batch) if guidance else None,
    }
    if control:
        inputs["controlnet_block_samples"] = [randn(3, batch, frames * rows * columns, 64)]
    return inputs


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("hunyuan_video15", _hunyuan_video15, _hunyuan_video15_inputs, 4),
        Case("hunyuan_video15_text", _hunyuan_video15, partial(_hunyuan_video15_inputs, image=False), 4),
        Case(
            "hunyuan_video15_meanflow",
            partial(_hunyuan_video15, True),
            partial(_hunyuan_video15_inputs, meanflow=True),
            4,
        ),
        Case("hunyuan_video_framepack", partial(_framepack, True), partial(_framepack_inputs, guidance=True), 4),
        Case(
            "hunyuan_video_framepack_plain",
            partial(_framepack, False),
            partial(_framepack_inputs, guidance=False),
            4,
        ),
        Case("ltx2", _ltx2, _ltx2_inputs, 4),
        Case("ltx2_nomask", _ltx2, partial(_ltx2_inputs, mask=False), 4),
        Case("ltx2_i2v", _ltx2, partial(_ltx2_inputs, mode="image"), 4),
        Case("ltx2_places", _ltx2, partial(_ltx2_inputs, mask=False, mode="places"), 4),
        Case("ltx2_reference", _ltx2, partial(_ltx2_inputs, mode="reference"), 4),
        Case("ltx2_isolated", _ltx2, partial(_ltx2_inputs, mode="isolated"), 4),
        Case("ltx2_v23", partial(_ltx2, "2.3"), partial(_ltx2_inputs, version="2.3"), 4),
        Case("ltx2_v23_i2v", partial(_ltx2, "2.3"), partial(_ltx2_inputs, version="2.3", mode="image"), 4),
        Case("ltx2_v23_guided", partial(_ltx2, "2.3"), partial(_ltx2_inputs, version="2.3", mode="guided"), 4),
        Case(
            "ltx2_v23_guided_one",
            partial(_ltx2, "2.3"),
            partial(_ltx2_inputs, version="2.3", mode="guided one"),
            4,
        ),
        Case("ltx2_v25", partial(_ltx2, "2.5"), partial(_ltx2_inputs, version="2.5", mode="keyframes"), 4),
        Case("cosmos", partial(_cosmos, "1"), _cosmos_inputs, 4),
        Case("cosmos_mask", partial(_cosmos, "1"), partial(_cosmos_inputs, mask=True), 4),
        Case("cosmos_v2w", partial(_cosmos, "2"), partial(_cosmos_inputs, version="2"), 4),
        Case("cosmos_transfer", partial(_cosmos, "transfer"), partial(_cosmos_inputs, version="transfer"), 4),
        Case("skyreels_v2", _skyreels_v2, _skyreels_v2_inputs, 4),
        Case("skyreels_v2_i2v", partial(_skyreels_v2, True), partial(_skyreels_v2_inputs, image=True), 3),
        Case(
            "skyreels_v2_pair",  # first and last frame given
            partial(_skyreels_v2, True, True),
            partial(_skyreels_v2_inputs, image=True, pair=True),
            3,
        ),
        Case(
            "skyreels_v2_fps",
            partial(_skyreels_v2, fps=True),
            partial(_skyreels_v2_inputs, fps=True),
            4,
        ),
        Case("skyreels_v2_forcing", _skyreels_v2, partial(_skyreels_v2_inputs, forcing=True), 4),
        Case(
            "skyreels_v2_forcing_fps",
            partial(_skyreels_v2, fps=True),
            partial(_skyreels_v2_inputs, forcing=True, fps=True),
            4,
        ),
        Case(
            "skyreels_v2_causal",
            partial(_skyreels_v2, block=2),
            partial(_skyreels_v2_inputs, forcing=True, even=True),
            4,
        ),
        Case("wan_vace", partial(_wan_vace, False), _wan_vace_inputs, 4),
        Case("wan_vace_plain", partial(_wan_vace, False), partial(_wan_vace_inputs, scale=False), 4),
        Case("wan_vace_short", partial(_wan_vace, False), partial(_wan_vace_inputs, short=True), 4),
        Case("wan_vace_i2v", partial(_wan_vace, True), partial(_wan_vace_inputs, image=True), 3),
        Case("wan_animate", partial(_wan_animate, True), partial(_wan_animate_inputs, image=True), 3),
        Case("wan_animate_noimage", partial(_wan_animate, False), _wan_animate_inputs, 4),
        Case("kandinsky5", partial(_kandinsky5, False), partial(_kandinsky5_inputs, condition=False), 4, 1e-4),
        Case("kandinsky5_i2v", partial(_kandinsky5, True), partial(_kandinsky5_inputs, condition=True), 4, 1e-4),
        Case(
            "kandinsky5_nabla",
            partial(_kandinsky5, False, True),
            partial(_kandinsky5_inputs, condition=False, nabla=True),
            4,
            1e-4,  # the last bit of its inputs alone changes its own results by 5e-5
        ),
        Case("allegro", _allegro, _allegro_inputs, 4),
        Case("allegro_nomask", _allegro, partial(_allegro_inputs, mask=False), 4),
        Case("allegro_padded", _allegro, partial(_allegro_inputs, padded=True), 4),
        Case("easy_animate", _easy_animate, _easy_animate_inputs, 4),
        Case("easy_animate_mixed", partial(_easy_animate, mixed=True), partial(_easy_animate_inputs, t5=True), 4),
        Case(
            "easy_animate_inpaint",
            partial(_easy_animate, 9),
            partial(_easy_animate_inputs, extra="inpaint_latents"),
            4,
        ),
        Case(
            "easy_animate_control",
            partial(_easy_animate, 8),
            partial(_easy_animate_inputs, extra="control_latents"),
            4,
        ),
        Case("sana_video", partial(_sana_video, False), _sana_video_inputs, 4),
        Case("sana_video_nomask", partial(_sana_video, False), partial(_sana_video_inputs, mask=False), 4),
        Case("sana_video_i2v", partial(_sana_video, False), partial(_sana_video_inputs, image=True), 4),
        Case("sana_video_guidance", partial(_sana_video, True), partial(_sana_video_inputs, guidance=True), 4),
        Case("sana_video_control", partial(_sana_video, False), partial(_sana_video_inputs, control=True), 4),
    )
}
