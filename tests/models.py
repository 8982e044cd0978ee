"""Tiny, randomly initialised diffusion transformers with inputs, for exactness tests.

Every entry of ``CASES`` is one model (or one way of calling it).  ``build(name, seed)`` gives the model in
eval mode and float32 with every parameter redrawn, so that no zero initialisation switches a branch off; the
case's ``inputs(batch, odd)`` gives the keyword arguments of its forward.

``cases`` says what the sizes are.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

if __package__:
    from . import handwritten
    from .cases import Case, Inputs, frame_count, made, padding_mask, patch_grid, randn, rotary, text_length, timesteps
else:
    import handwritten
    from cases import Case, Inputs, frame_count, made, padding_mask, patch_grid, randn, rotary, text_length, timesteps


# --------------------------------------------------------------------------------------------------
# Images


def _dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=3,
        sample_size=10, patch_size=2, num_embeds_ada_norm=1000, norm_num_groups=1,
    )  # fmt: skip


def _dit_inputs(batch: int, odd: bool) -> Inputs:
    """Square images only (the class takes the root of the token count): 5x5 or 4x4 patches.  No text."""
    side = 10 if odd else 8
    return {
        "hidden_states": randn(1, batch, 4, side, side),
        "timestep": timesteps(batch),
        "class_labels": 3 + 5 * torch.arange(batch),
    }


def _pixart(heads: int, alpha: bool) -> nn.Module:
    """Alpha takes resolution and aspect ratio; these need a hidden size divisible by 3 (48 here)."""
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=48 // heads, in_channels=4, out_channels=8,
        num_layers=3, cross_attention_dim=48, sample_size=16, patch_size=2, caption_channels=20,
        norm_num_groups=1, use_additional_conditions=alpha,
    )  # fmt: skip


def _pixart_inputs(batch: int, odd: bool, alpha: bool, mask: bool) -> Inputs:
    """Mask: (batch, text) int64, 1 = keep, as the tokenizer gives it."""
    rows, columns = patch_grid(odd)
    size = {"resolution": None, "aspect_ratio": None}
    if alpha:
        side = torch.tensor([[1024.0, 768.0]]) - 64 * torch.arange(batch)[:, None]
        size = {"resolution": side, "aspect_ratio": side[:, :1] / side[:, 1:]}
    return {
        "hidden_states": randn(1, batch, 4, 2 * rows, 2 * columns),
        "encoder_hidden_states": randn(2, batch, text_length(odd), 20),
        "timestep": timesteps(batch),
        "added_cond_kwargs": size,
        "encoder_attention_mask": padding_mask(batch, text_length(odd), torch.int64) if mask else None,
    }


def _sd3(dual: bool) -> nn.Module:
    """Dual: the first two blocks attend to the image alone a second time; q and k normalised; 6 heads."""
    from diffusers import SD3Transformer2DModel

    heads, head_dim = (6, 8) if dual else (4, 16)
    return SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=4 if dual else 3,
        attention_head_dim=head_dim, num_attention_heads=heads, joint_attention_dim=20,
        caption_projection_dim=heads * head_dim, pooled_projection_dim=24, out_channels=4,
        pos_embed_max_size=12, dual_attention_layers=(0, 1) if dual else (),
        qk_norm="rms_norm" if dual else None,
    )  # fmt: skip


def _sd3_inputs(batch: int, odd: bool) -> Inputs:
    """No mask in this class."""
    rows, columns = patch_grid(odd)
    return {
        "hidden_states": randn(1, batch, 4, 2 * rows, 2 * columns),
        "encoder_hidden_states": randn(2, batch, text_length(odd), 20),
        "pooled_projections": randn(3, batch, 24),
        "timestep": timesteps(batch),
    }


def _flux(guidance: bool) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=3, num_single_layers=3, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=20, pooled_projection_dim=24,
        guidance_embeds=guidance, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def _flux_inputs(batch: int, odd: bool, guidance: bool) -> Inputs:
    """Tokens come packed, (batch, tokens, channels); ids are (tokens, 3), no batch; timestep in 0..1."""
    rows, columns = patch_grid(odd)
    places = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns)).float()
    inputs = {
        "hidden_states": randn(1, batch, rows * columns, 16),
        "encoder_hidden_states": randn(2, batch, text_length(odd), 20),
        "pooled_projections": randn(3, batch, 24),
        "timestep": timesteps(batch) / 1000,
        "img_ids": places,
        "txt_ids": torch.zeros(text_length(odd), 3),
    }
    if guidance:
        inputs |= {"guidance": 3.5 - torch.arange(batch), "return_dict": False}
    return inputs


def _hunyuan_dit(style: bool) -> nn.Module:
    """Six blocks: the last two take the outputs of the second and the first (long skips)."""
    from diffusers import HunyuanDiT2DModel

    return HunyuanDiT2DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, patch_size=2, sample_size=16,
        hidden_size=64, num_layers=6, cross_attention_dim=20, cross_attention_dim_t5=24,
        pooled_projection_dim=28, text_len=6 if style else 5, text_len_t5=8,
        use_style_cond_and_image_meta_size=style,
    )  # fmt: skip


def _hunyuan_dit_inputs(batch: int, odd: bool, style: bool) -> Inputs:
    """Two texts, with (batch, text) int64 masks, of lengths which parameters fix: 5 + 8, or 6 + 8 with style.

    The timestep is floating point: its dtype is the one in which the class embeds it.
    """
    rows, columns = patch_grid(odd)
    clip = 6 if style else 5
    inputs = {
        "hidden_states": randn(1, batch, 4, 2 * rows, 2 * columns),
        "timestep": timesteps(batch).float(),
        "encoder_hidden_states": randn(2, batch, clip, 20),
        "text_embedding_mask": padding_mask(batch, clip, torch.int64),
        "encoder_hidden_states_t5": randn(3, batch, 8, 24),
        "text_embedding_mask_t5": padding_mask(batch, 8, torch.int64),
        "image_rotary_emb": rotary(rows * columns, 16),
    }
    if style:
        sizes = torch.tensor([[1024.0, 768.0, 1024.0, 768.0, 0.0, 32.0]])
        inputs |= {"image_meta_size": sizes.repeat(batch, 1), "style": torch.zeros(batch, dtype=torch.int64)}
    return inputs


def _qwen_image() -> nn.Module:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=20, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def _qwen_image_inputs(batch: int, odd: bool, mask: bool) -> Inputs:
    """Tokens come packed; the grid comes as Python integers; mask: (batch, text) int64; timestep in 0..1."""
    rows, columns = patch_grid(odd)
    return {
        "hidden_states": randn(1, batch, rows * columns, 16),
        "encoder_hidden_states": randn(2, batch, text_length(odd), 20),
        "encoder_hidden_states_mask": padding_mask(batch, text_length(odd), torch.int64) if mask else None,
        "timestep": timesteps(batch) / 1000,
        "img_shapes": [[(1, rows, columns)]] * batch,
    }


# --------------------------------------------------------------------------------------------------
# Videos


def _latte() -> nn.Module:
    from diffusers import LatteTransformer3DModel

    return LatteTransformer3DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=3,
        cross_attention_dim=64, attention_bias=True, sample_size=16, patch_size=2,
        activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
        norm_elementwise_affine=False, norm_eps=1e-6, caption_channels=20, video_length=5,
    )  # fmt: skip


def _latte_inputs(batch: int, odd: bool, mask: bool) -> Inputs:
    """Always 5 frames (a buffer fixes them), 175 or 120 tokens; attention within each frame, then over time.

    The class hands the mask to attention as it is, so it is a bias: (batch * frames, 1, text), 0 = keep.
    """
    rows, columns = patch_grid(odd)
    bias = -10000.0 * (1 - padding_mask(batch, text_length(odd), torch.float32))
    return {
        "hidden_states": randn(1, batch, 4, 5, 2 * rows, 2 * columns),
        "timestep": timesteps(batch),
        "encoder_hidden_states": randn(2, batch, text_length(odd), 20),
        "encoder_attention_mask": bias.repeat_interleave(5, dim=0)[:, None] if mask else None,
    }


def _cogvideox(rotary: bool, odd: bool = True) -> nn.Module:
    """Without rotary the positions are a buffer for the sizes of ``odd``."""
    from diffusers import CogVideoXTransformer3DModel

    rows, columns = patch_grid(odd)
    return CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=24,
        text_embed_dim=20, num_layers=3, sample_width=2 * columns, sample_height=2 * rows,
        sample_frames=4 * frame_count(odd) - 3, patch_size=2, max_text_seq_length=text_length(odd),
        use_rotary_positional_embeddings=rotary,
    )  # fmt: skip


def _cogvideox_inputs(batch: int, odd: bool, turned: bool = True) -> Inputs:
    """Video is (batch, frames, channels, height, width).

    Without rotary a model takes the sizes of its buffer only: another text length does not fit it, and at
    another video size the class makes new positions through ``.data``, which torch.export cannot trace.
    """
    rows, columns = patch_grid(odd)
    frames = frame_count(odd)
    return {
        "hidden_states": randn(1, batch, frames, 4, 2 * rows, 2 * columns),
        "encoder_hidden_states": randn(2, batch, text_length(odd), 20),
        "timestep": timesteps(batch),
        "image_rotary_emb": rotary(frames * rows * columns, 16) if turned else None,
    }


def _cogvideox_fixed(batch: int, odd: bool, size: bool) -> Inputs:
    """The inputs without rotary, of the one ``size`` that the model takes, whatever ``odd`` asks for."""
    return _cogvideox_inputs(batch, size, turned=False)


def _mochi() -> nn.Module:
    from diffusers import MochiTransformer3DModel

    return MochiTransformer3DModel(
        patch_size=2, num_attention_heads=4, attention_head_dim=16, num_layers=3,
        pooled_projection_dim=32, in_channels=4, text_embed_dim=24, time_embed_dim=28,
        max_sequence_length=11,
    )  # fmt: skip


def _mochi_inputs(batch: int, odd: bool) -> Inputs:
    """Mask: (batch, text) bool; the class picks the kept text tokens with ``nonzero``, element by element."""
    rows, columns = patch_grid(odd)
    return {
        "hidden_states": randn(1, batch, 4, frame_count(odd), 2 * rows, 2 * columns),
        "encoder_hidden_states": randn(2, batch, text_length(odd), 24),
        "timestep": timesteps(batch),
        "encoder_attention_mask": padding_mask(batch, text_length(odd), torch.bool),
    }


def _wan(image: bool) -> nn.Module:
    """With an image (image-to-video): 3 heads and a second set of keys and values in cross attention."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=3 if image else 4, attention_head_dim=16,
        in_channels=4, out_channels=4, text_dim=20, freq_dim=24, ffn_dim=96, num_layers=3,
        rope_max_seq_len=32, image_dim=28 if image else None, added_kv_proj_dim=48 if image else None,
    )  # fmt: skip


def _wan_inputs(batch: int, odd: bool, image: bool = False, per_token: bool = False) -> Inputs:
    """No mask.  With an image the class takes the last 512 condition tokens for the text, so there are 512.

    ``per_token`` gives one timestep for each token, (batch, tokens), as Wan 2.2's 5B model takes it.
    """
    rows, columns = patch_grid(odd)
    tokens = frame_count(odd) * rows * columns
    steps = timesteps(batch)
    inputs = {
        "hidden_states": randn(1, batch, 4, frame_count(odd), 2 * rows, 2 * columns),
        "timestep": steps[:, None] - torch.arange(tokens) if per_token else steps,
        "encoder_hidden_states": randn(2, batch, 512 if image else text_length(odd), 20),
    }
    if image:
        inputs["encoder_hidden_states_image"] = randn(3, batch, 5 if odd else 4, 28)
    return inputs


def _ltx() -> nn.Module:
    from diffusers import LTXVideoTransformer3DModel

    return LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=16,
        cross_attention_dim=64, num_layers=3, caption_channels=20,
    )  # fmt: skip


def _ltx_inputs(batch: int, odd: bool, mask: bool) -> Inputs:
    """Tokens come packed, the grid as Python integers; mask: (batch, text) bool."""
    rows, columns = patch_grid(odd)
    frames = frame_count(odd)
    return {
        "hidden_states": randn(1, batch, frames * rows * columns, 8),
        "encoder_hidden_states": randn(2, batch, text_length(odd), 20),
        "timestep": timesteps(batch),
        "encoder_attention_mask": padding_mask(batch, text_length(odd), torch.bool) if mask else None,
        "num_frames": frames,
        "height": rows,
        "width": columns,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


def _hunyuan_video(guidance: bool, image_condition: str | None = None) -> nn.Module:
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=16, num_layers=3,
        num_single_layers=3, num_refiner_layers=2, patch_size=2, patch_size_t=1,
        guidance_embeds=guidance, text_embed_dim=20, pooled_projection_dim=24, rope_axes_dim=(4, 6, 6),
        image_condition_type=image_condition,
    )  # fmt: skip


def _hunyuan_video_inputs(batch: int, odd: bool, guidance: bool) -> Inputs:
    """Mask: (batch, text) in the model's own dtype, as the pipeline gives it; guidance in thousands."""
    rows, columns = patch_grid(odd)
    return {
        "hidden_states": randn(1, batch, 4, frame_count(odd), 2 * rows, 2 * columns),
        "timestep": timesteps(batch),
        "encoder_hidden_states": randn(2, batch, text_length(odd), 20),
        "encoder_attention_mask": padding_mask(batch, text_length(odd), torch.float32),
        "pooled_projections": randn(3, batch, 24),
        "guidance": 6000.0 - 1000 * torch.arange(batch) if guidance else None,
    }


# --------------------------------------------------------------------------------------------------
# Written by hand


def _fused_inputs(batch: int, odd: bool) -> Inputs:
    """An image and a class label.  The learned positions cover a grid of 8x8 patches."""
    rows, columns = patch_grid(odd)
    return {
        "image": randn(1, batch, 4, 2 * rows, 2 * columns),
        "step": timesteps(batch) / 1000,
        "label": 1 + torch.arange(batch),
    }


def _views_inputs(batch: int, odd: bool) -> Inputs:
    """Latents (batch, 2 frames, 3 views, tokens, channels), 35 or 24 tokens; text (batch, text, 20)."""
    rows, columns = patch_grid(odd)
    return {
        "latents": randn(1, batch, 2, 3, rows * columns, 8),
        "step": timesteps(batch) / 1000,
        "text": randn(2, batch, text_length(odd), 20),
    }


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("dit", _dit, _dit_inputs, 4),
        Case("pixart_alpha", partial(_pixart, 4, True), partial(_pixart_inputs, alpha=True, mask=True), 4),
        Case("pixart_sigma", partial(_pixart, 3, False), partial(_pixart_inputs, alpha=False, mask=True), 3),
        Case(
            "pixart_sigma_nomask",
            partial(_pixart, 4, False),
            partial(_pixart_inputs, alpha=False, mask=False),
            4,
        ),
        Case("sd3", partial(_sd3, False), _sd3_inputs, 4),
        Case("sd3_dual", partial(_sd3, True), _sd3_inputs, 6),
        Case("flux", partial(_flux, False), partial(_flux_inputs, guidance=False), 4),
        Case("flux_guidance", partial(_flux, True), partial(_flux_inputs, guidance=True), 4),
        Case("hunyuan_dit", partial(_hunyuan_dit, False), partial(_hunyuan_dit_inputs, style=False), 4),
        Case("hunyuan_dit_style", partial(_hunyuan_dit, True), partial(_hunyuan_dit_inputs, style=True), 4),
        Case("qwen_image", _qwen_image, partial(_qwen_image_inputs, mask=False), 4),
        Case("qwen_image_mask", _qwen_image, partial(_qwen_image_inputs, mask=True), 4),
        Case("latte", _latte, partial(_latte_inputs, mask=False), 4),
        Case("latte_mask", _latte, partial(_latte_inputs, mask=True), 4),
        Case("cogvideox", partial(_cogvideox, False, True), partial(_cogvideox_fixed, size=True), 4),
        Case("cogvideox_even", partial(_cogvideox, False, False), partial(_cogvideox_fixed, size=False), 4),
        Case("cogvideox_rotary", partial(_cogvideox, True), _cogvideox_inputs, 4),
        Case("mochi", _mochi, _mochi_inputs, 4),
        Case("wan", partial(_wan, False), _wan_inputs, 4),
        Case("wan_i2v", partial(_wan, True), partial(_wan_inputs, image=True), 3),
        Case("wan_steps", partial(_wan, False), partial(_wan_inputs, per_token=True), 4),
        Case("ltx", _ltx, partial(_ltx_inputs, mask=True), 4),
        Case("ltx_nomask", _ltx, partial(_ltx_inputs, mask=False), 4),
        Case(
            "hunyuan_video", partial(_hunyuan_video, True), partial(_hunyuan_video_inputs, guidance=True), 4
        ),
        Case(
            "hunyuan_video_plain",
            partial(_hunyuan_video, False),
            partial(_hunyuan_video_inputs, guidance=False),
            4,
        ),
        Case(
            "hunyuan_video_token_replace",  # the first frame's tokens are modulated apart from the others
            partial(_hunyuan_video, True, "token_replace"),
            partial(_hunyuan_video_inputs, guidance=True),
            4,
        ),
        Case("fused", handwritten.FusedDiT, _fused_inputs, 4),
        Case("views", handwritten.ViewsDiT, _views_inputs, 4),
    )
}


def build(name: str, seed: int = 0) -> nn.Module:
    """The named case's model, float32, in eval mode, with parameters drawn from ``seed``."""
    return made(CASES[name], seed)
