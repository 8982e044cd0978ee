"""Tiny models of the classes for audio, time and molecules, and more ways of calling the classes of ``models``.

The second half takes a case of ``models`` and adds what changes its graph: residuals of a ControlNet, an
IP-Adapter, skipped layers, several images for each sample. Audio has 37 frames (odd) or 32.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

if __package__:
    from . import models
    from .cases import Case, Inputs, frame_count, padding_mask, patch_grid, randn, rotary, text_length, timesteps
else:
    import models
    from cases import Case, Inputs, frame_count, padding_mask, patch_grid, randn, rotary, text_length, timesteps


def _audio_frames(odd: bool) -> int:
    """Latent frames of a piece of audio."""
    return 37 if odd else 32


def _half_rotary(tokens: int, dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (tokens, dim), of a rotary embedding that turns one half against the other."""
    rates = 100.0 ** (-torch.arange(0, dim, 2) / dim)
    angles = torch.outer(torch.arange(tokens).float(), rates).repeat(1, 2)
    return angles.cos(), angles.sin()


# --------------------------------------------------------------------------------------------------
# Audio


def _ace_step() -> nn.Module:
    """The first and third blocks attend within 3 tokens, the second to all; 2 key and value heads for 4."""
    from diffusers import AceStepTransformer1DModel

    return AceStepTransformer1DModel(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, in_channels=24, audio_acoustic_hidden_dim=8, patch_size=2,
        sliding_window=3, encoder_hidden_size=20,
    )  # fmt: skip


def _ace_step_inputs(batch: int, odd: bool) -> Inputs:
    """No mask. Two frames are a token: the class pads 37 frames to 38."""
    steps = timesteps(batch) / 1000
    return {
        "hidden_states": randn(1, batch, _audio_frames(odd), 8),
        "timestep": steps,
        "timestep_r": steps / 2,
        "encoder_hidden_states": randn(2, batch, text_length(odd), 20),
        "context_latents": randn(3, batch, _audio_frames(odd), 16),
    }


def _longcat_audio(local: bool) -> nn.Module:
    """A convolution over the text. Local: each block computes its modulation, and there is no long skip."""
    from diffusers import LongCatAudioDiTTransformer

    return LongCatAudioDiTTransformer(
        dit_dim=64, dit_depth=3, dit_heads=4, dit_text_dim=20, latent_dim=8, ff_mult=2.0,
        adaln_type="local" if local else "global", long_skip=not local, cross_attn_norm=local,
        qk_norm=not local,
    )  # fmt: skip


def _longcat_audio_inputs(batch: int, odd: bool, condition: bool) -> Inputs:
    """Masks (batch, text) and (batch, frames) bool; with a condition, latents that continue the prompt's audio."""
    frames = _audio_frames(odd)
    return {
        "hidden_states": randn(1, batch, frames, 8),
        "encoder_hidden_states": randn(2, batch, text_length(odd), 20),
        "encoder_attention_mask": padding_mask(batch, text_length(odd), torch.bool),
        "timestep": timesteps(batch) / 1000,
        "attention_mask": padding_mask(batch, frames, torch.bool),
        "latent_cond": randn(3, batch, frames, 8) if condition else None,
    }


def _minimax_music() -> nn.Module:
    """Rotary positions turn 8 of 16 channels of a head."""
    from diffusers import MiniMaxMusic3Transformer1DModel

    return MiniMaxMusic3Transformer1DModel(
        in_channels=8, condition_dim=20, num_layers=3, num_attention_heads=4, attention_head_dim=16,
        ff_inner_dim=96, rotary_dim=8, fourier_embedding_dim=24,
    )  # fmt: skip


def _minimax_music_inputs(batch: int, odd: bool) -> Inputs:
    """No text: a condition for each frame. The timestep is one more token before the frames."""
    return {
        "hidden_states": randn(1, batch, 8, _audio_frames(odd)),
        "timestep": timesteps(batch) / 1000,
        "encoder_hidden_states": randn(2, batch, _audio_frames(odd), 20),
    }


def _minimax_depth() -> nn.Module:
    """A causal decoder over the codes of one audio frame; its heads and embeddings take no part in forward."""
    from diffusers.models.transformers.minimax_music3_rvq_depth_decoder import MiniMaxMusic3RVQDepthDecoder

    return MiniMaxMusic3RVQDepthDecoder(
        hidden_size=64, num_layers=3, num_attention_heads=4, intermediate_size=96, audio_vocab_size=10,
    )  # fmt: skip


def _minimax_depth_inputs(batch: int, odd: bool) -> Inputs:
    """Embeddings of 11 or 8 steps; the learned positions are for 16."""
    return {"inputs_embeds": randn(1, batch, text_length(odd), 64)}


def _stable_audio() -> nn.Module:
    """2 key and value heads for 4, in cross attention only."""
    from diffusers import StableAudioDiTModel

    return StableAudioDiTModel(
        sample_size=64, in_channels=8, num_layers=3, attention_head_dim=16, num_attention_heads=4,
        num_key_value_attention_heads=2, out_channels=8, cross_attention_dim=32, time_proj_dim=24,
        global_states_input_dim=28, cross_attention_input_dim=20,
    )  # fmt: skip


def _stable_audio_inputs(batch: int, odd: bool, mask: bool) -> Inputs:
    """A global token before the frames. Masks, which the pipeline never gives: (batch, frames), (batch, text) bool."""
    frames = _audio_frames(odd)
    inputs = {
        "hidden_states": randn(1, batch, 8, frames),
        "timestep": timesteps(batch) / 1000,
        "encoder_hidden_states": randn(2, batch, text_length(odd), 20),
        "global_hidden_states": randn(3, batch, 1, 28),
        "rotary_embedding": _half_rotary(frames + 1, 8),
    }
    if mask:
        inputs |= {
            "attention_mask": padding_mask(batch, frames, torch.bool),
            "encoder_attention_mask": padding_mask(batch, text_length(odd), torch.bool),
        }
    return inputs


def _stable_audio3(plain: bool) -> nn.Module:
    """Attention is the difference of two, with 5 tokens of memory; plain: neither, and two frames are a token."""
    from diffusers import StableAudio3DiTModel

    return StableAudio3DiTModel(
        io_channels=8, patch_size=2 if plain else 1, embed_dim=64, depth=3, num_heads=4, cond_token_dim=20,
        global_cond_dim=28, local_add_cond_dim=9, timestep_features_dim=24, ff_mult=2.0,
        num_memory_tokens=0 if plain else 5, use_differential_attention=not plain,
    )  # fmt: skip


def _stable_audio3_inputs(batch: int, odd: bool, plain: bool = False, inpaint: bool = False) -> Inputs:
    """Mask: (batch, text) bool; the class puts a learned token where it is 0. Plain: 38 frames for 37, no mask."""
    frames = _audio_frames(odd) + (odd and plain)
    inputs = {
        "hidden_states": randn(1, batch, 8, frames),
        "timestep": timesteps(batch) / 1000,
        "encoder_hidden_states": randn(2, batch, text_length(odd), 20),
        "global_hidden_states": randn(3, batch, 28),
        "encoder_attention_mask": None if plain else padding_mask(batch, text_length(odd), torch.bool),
    }
    if inpaint:
        inputs["local_add_cond"] = randn(4, batch, 9, frames)
    return inputs


def _t5_film() -> nn.Module:
    from diffusers import T5FilmDecoder

    return T5FilmDecoder(input_dims=8, targets_length=40, d_model=64, num_layers=3, num_heads=4, d_kv=16, d_ff=96)


def _t5_film_inputs(batch: int, odd: bool) -> Inputs:
    """Two encodings, of notes and of the audio before, each with a (batch, tokens) float mask; time in 0..1."""
    notes, before = text_length(odd), 7 if odd else 6
    return {
        "encodings_and_masks": [
            (randn(2, batch, notes, 64), padding_mask(batch, notes, torch.float32)),
            (randn(3, batch, before, 64), padding_mask(batch, before, torch.float32)),
        ],
        "decoder_input_tokens": randn(1, batch, _audio_frames(odd), 8),
        "decoder_noise_time": timesteps(batch) / 1000,
    }


# --------------------------------------------------------------------------------------------------
# Time alone, molecules


def _temporal() -> nn.Module:
    """The motion module of a U-Net: attention over frames, twice in a block, at each pixel apart."""
    from diffusers import TransformerTemporalModel

    return TransformerTemporalModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=8, num_layers=2, norm_num_groups=2,
        positional_embeddings="sinusoidal", num_positional_embeddings=8,
    )  # fmt: skip


def _temporal_inputs(batch: int, odd: bool) -> Inputs:
    """Frames come in the batch: (batch * frames, channels, 5, 7), or 4x6; no step and no text."""
    rows, columns = patch_grid(odd)
    return {
        "hidden_states": randn(1, batch * frame_count(odd), 8, rows, columns),
        "num_frames": frame_count(odd),
    }


def _proteina() -> nn.Module:
    """Residues and pairs of residues: attention takes a bias from the pairs, which two blocks of three renew."""
    from diffusers.models.transformers.transformer_rfd4_proteina import RFD4ProteinaTransformer

    return RFD4ProteinaTransformer(
        nlayers=3, token_dim=64, nheads=4, dim_cond=32, pair_repr_dim=24, latent_dim=8, token_type_emb_dim=8,
        cath_emb_dim=4, t_emb_dim=16, seq_sep_dim=6, xt_pair_dist_dim=10, update_pair_repr_every_n=1,
        tri_mult_c=16, num_sequence_classes=21, recycle_conditioning_dim=2,
    )  # fmt: skip


def _proteina_inputs(batch: int, odd: bool, passes: int) -> Inputs:
    """37 or 32 residues of 37 atoms; passes: how often the blocks run. No chirality: its shapes depend on values.

    The padding mask is (batch, residues) bool. Annotations come as a dictionary in the preprocessor's words.
    """
    tokens = _audio_frames(odd)

    def codes(seed: int, count: int, *shape: int) -> Tensor:
        return torch.randint(count, (batch, *shape), generator=torch.Generator().manual_seed(seed))

    chain = (torch.arange(tokens) // 10).expand(batch, -1)
    bonds = codes(5, 9, tokens, tokens)
    atoms = ("hbond", "pistack", "pication", "saltbridge", "hydrophobic", "metal-coord")
    return {
        "bb_ca": randn(1, batch, tokens, 3),
        "local_latents": randn(2, batch, tokens, 8),
        "bb_ca_time": timesteps(batch) / 1000,
        "local_latents_time": timesteps(batch) / 800,
        "padding_mask": padding_mask(batch, tokens, torch.bool),
        "token_type": codes(3, 7, tokens),
        "atom37_mask": codes(4, 2, tokens, 37).bool(),
        "conditioning": {
            "is_in_context_conditioning": codes(6, 5, tokens) == 0,
            "supports_local_latent": codes(7, 5, tokens) > 0,
            "molecule_iid": chain,
            "molecule_entity_id": chain // 2,
            "token_bond_path_length": bonds,
            "bond_mask": bonds == 1,
            "condition_index-group_1_token": chain % 2,
            "condition_cath-label_1_residue": codes(8, 5, tokens, 3),
            "condition_secondary-structure_1_residue": codes(9, 4, tokens),
            "condition_coordinate_1_atom": randn(10, batch, tokens, 37, 3),
            **{f"condition_{name}_1_atom": codes(11 + i, 4, tokens, 37) for i, name in enumerate(atoms)},
        },
        "recycle_depth": passes,
    }


# --------------------------------------------------------------------------------------------------
# More ways of calling the classes of ``models``


def _residuals(seed: int, count: int, batch: int, tokens: int) -> list[Tensor]:
    """Outputs of a ControlNet, (batch, tokens, 64) each."""
    return [randn(seed + i, batch, tokens, 64) for i in range(count)]


def _tokens(odd: bool) -> int:
    """Tokens of an image."""
    rows, columns = patch_grid(odd)
    return rows * columns


def _sd3_control_inputs(batch: int, odd: bool) -> Inputs:
    """Two residuals for three blocks, of which the last takes none."""
    residuals = _residuals(10, 2, batch, _tokens(odd))
    return models.CASES["sd3"].inputs(batch, odd) | {"block_controlnet_hidden_states": residuals}


def _sd3_skip_inputs(batch: int, odd: bool) -> Inputs:
    """Without the second block."""
    return models.CASES["sd3"].inputs(batch, odd) | {"skip_layers": [1]}


def _sd3_image() -> nn.Module:
    """With an IP-Adapter: a resampler of image features, and attention of the image to these in each block."""
    from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
    from diffusers.models.embeddings import IPAdapterTimeImageProjection

    model = models.CASES["sd3"].build()
    model.set_attn_processor(
        {name: SD3IPAdapterJointAttnProcessor2_0(64, 64, 16, timesteps_emb_dim=48) for name in model.attn_processors}
    )
    model.image_proj = IPAdapterTimeImageProjection(
        embed_dim=28, output_dim=64, hidden_dim=48, depth=2, dim_head=12, heads=4, num_queries=5, ffn_ratio=2,
        timestep_in_dim=24,
    )  # fmt: skip
    return model


def _sd3_image_inputs(batch: int, odd: bool) -> Inputs:
    """7 or 6 image features, which the model resamples to 5."""
    image = {"ip_adapter_image_embeds": randn(10, batch, 7 if odd else 6, 28)}
    return models.CASES["sd3"].inputs(batch, odd) | {"joint_attention_kwargs": image}


def _flux_control_inputs(batch: int, odd: bool, repeat: bool) -> Inputs:
    """Residuals for both kinds of blocks: two for three, the first again or, with repeat, one after the other."""
    return models.CASES["flux"].inputs(batch, odd) | {
        "controlnet_block_samples": _residuals(10, 2, batch, _tokens(odd)),
        "controlnet_single_block_samples": _residuals(20, 2, batch, _tokens(odd)),
        "controlnet_blocks_repeat": repeat,
    }


def _flux_image() -> nn.Module:
    """With two IP-Adapters: in the first kind of blocks, the image attends to the features of two more images."""
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    model = models.CASES["flux"].build()
    processors = dict(model.attn_processors)
    for name in processors:
        if not name.startswith("single"):
            processors[name] = FluxIPAdapterAttnProcessor(64, 28, num_tokens=(5, 4), scale=[0.7, 0.4])
    model.set_attn_processor(processors)
    return model


def _flux_image_inputs(batch: int, odd: bool) -> Inputs:
    """Projected features, 5 and 4 tokens."""
    features = [randn(10, batch, 5, 28), randn(11, batch, 4, 28)]
    return models.CASES["flux"].inputs(batch, odd) | {"joint_attention_kwargs": {"ip_hidden_states": features}}


def _qwen_image(**config: bool) -> nn.Module:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=20, axes_dims_rope=(4, 6, 6), **config,
    )  # fmt: skip


def _qwen_image_inputs(batch: int, odd: bool, layers: int = 1, mask: bool = False) -> Inputs:
    """An image in layers, and after it a reference of 3x5 patches, in one row of tokens."""
    rows, columns = patch_grid(odd)
    return models.CASES["qwen_image_mask" if mask else "qwen_image"].inputs(batch, odd) | {
        "hidden_states": randn(1, batch, layers * rows * columns + 15, 16),
        "img_shapes": [[(1, rows, columns)] * layers + [(1, 3, 5)]] * batch,
    }


def _qwen_layered_inputs(batch: int, odd: bool) -> Inputs:
    """Three layers and the reference; whether the reference is opaque comes as an index, (batch,)."""
    return _qwen_image_inputs(batch, odd, layers=3) | {"additional_t_cond": torch.arange(batch) % 2}


def _qwen_control_inputs(batch: int, odd: bool) -> Inputs:
    """Two residuals for three blocks."""
    residuals = _residuals(10, 2, batch, _tokens(odd))
    return models.CASES["qwen_image"].inputs(batch, odd) | {"controlnet_block_samples": residuals}


class _Copying(nn.Module):
    """Gives the model a copy of the list of residuals, as its class takes them off the list it is given."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, hidden_states: Tensor, controlnet_block_samples: list[Tensor], inputs: Inputs) -> Tensor:
        """The model's first output; ``inputs`` holds the other keyword arguments of the model."""
        residuals = list(controlnet_block_samples)
        return self.model(hidden_states, controlnet_block_samples=residuals, return_dict=False, **inputs)[0]


def _hunyuan_dit_control() -> nn.Module:
    return _Copying(models.CASES["hunyuan_dit"].build())


def _hunyuan_dit_control_inputs(batch: int, odd: bool) -> Inputs:
    """Six blocks, two long skips, a residual for each skip."""
    inputs = dict(models.CASES["hunyuan_dit"].inputs(batch, odd))
    return {
        "hidden_states": inputs.pop("hidden_states"),
        "controlnet_block_samples": _residuals(10, 2, batch, _tokens(odd)),
        "inputs": inputs,
    }


def _latte_spatial_inputs(batch: int, odd: bool) -> Inputs:
    """Without the attention over time."""
    return models.CASES["latte"].inputs(batch, odd) | {"enable_temporal_attentions": False}


def _cogvideox15(offset: bool) -> nn.Module:
    """A patch is two frames deep. Offset: a second embedded scalar, as the image-to-video model has it."""
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=24,
        ofs_embed_dim=24 if offset else None, text_embed_dim=20, num_layers=3, sample_width=14,
        sample_height=10, sample_frames=9, patch_size=2, patch_size_t=2, max_text_seq_length=11,
        use_rotary_positional_embeddings=True, patch_bias=False,
    )  # fmt: skip


def _cogvideox15_inputs(batch: int, odd: bool, offset: bool) -> Inputs:
    """Twice as many frames as elsewhere, which makes as many tokens; the offset is (1,) whatever the batch."""
    rows, columns = patch_grid(odd)
    frames = frame_count(odd)
    return {
        "hidden_states": randn(1, batch, 2 * frames, 4, 2 * rows, 2 * columns),
        "encoder_hidden_states": randn(2, batch, text_length(odd), 20),
        "timestep": timesteps(batch),
        "ofs": torch.full((1,), 2.0) if offset else None,
        "image_rotary_emb": rotary(frames * rows * columns, 16),
    }


def _wan_frames() -> nn.Module:
    """First and last frame to video: positions for the features of two images, 10 tokens in all."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=4,
        text_dim=20, freq_dim=24, ffn_dim=96, num_layers=3, rope_max_seq_len=32, image_dim=28,
        added_kv_proj_dim=64, pos_embed_seq_len=10,
    )  # fmt: skip


def _wan_frames_inputs(batch: int, odd: bool) -> Inputs:
    """Features of 5 tokens (the positions fix that), of two images for each sample: (2 * batch, 5, 28)."""
    return models.CASES["wan_i2v"].inputs(batch, odd) | {"encoder_hidden_states_image": randn(3, 2 * batch, 5, 28)}


def _ltx_condition_inputs(batch: int, odd: bool) -> Inputs:
    """One timestep for each token, and places of tokens, (batch, 3, tokens), in place of the size of the video."""
    inputs = models.CASES["ltx"].inputs(batch, odd)
    size = [inputs.pop(name) for name in ("num_frames", "height", "width")]
    inputs.pop("rope_interpolation_scale")
    places = torch.cartesian_prod(*map(torch.arange, size)).T * torch.tensor([[8 / 25], [32], [32]])
    tokens = places.shape[1]
    steps = timesteps(batch)[:, None] - torch.arange(tokens)
    steps[:, : tokens // size[0]] = 0  # the first frame is given
    return inputs | {"timestep": steps, "video_coords": places.expand(batch, -1, -1)}


def _hunyuan_video_concat() -> nn.Module:
    """Image to video: latents, those of the image and their mask in one tensor of channels; no guidance."""
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=4, attention_head_dim=16, num_layers=3,
        num_single_layers=3, num_refiner_layers=2, patch_size=2, patch_size_t=1, guidance_embeds=False,
        text_embed_dim=20, pooled_projection_dim=24, rope_axes_dim=(4, 6, 6),
        image_condition_type="latent_concat",
    )  # fmt: skip


def _hunyuan_video_concat_inputs(batch: int, odd: bool) -> Inputs:
    """As without an image, but nine channels."""
    rows, columns = patch_grid(odd)
    video = randn(1, batch, 9, frame_count(odd), 2 * rows, 2 * columns)
    return models.CASES["hunyuan_video_plain"].inputs(batch, odd) | {"hidden_states": video}


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("ace_step", _ace_step, _ace_step_inputs, 4),
        Case("longcat_audio", partial(_longcat_audio, False), partial(_longcat_audio_inputs, condition=True), 4),
        Case("longcat_audio_local", partial(_longcat_audio, True), partial(_longcat_audio_inputs, condition=False), 4),
        Case("minimax_music", _minimax_music, _minimax_music_inputs, 4),
        Case("minimax_depth", _minimax_depth, _minimax_depth_inputs, 4),
        Case("stable_audio", _stable_audio, partial(_stable_audio_inputs, mask=False), 4),
        Case("stable_audio_mask", _stable_audio, partial(_stable_audio_inputs, mask=True), 4),
        Case("stable_audio3", partial(_stable_audio3, False), _stable_audio3_inputs, 4),
        Case("stable_audio3_inpaint", partial(_stable_audio3, False), partial(_stable_audio3_inputs, inpaint=True), 4),
        Case("stable_audio3_plain", partial(_stable_audio3, True), partial(_stable_audio3_inputs, plain=True), 4),
        Case("t5_film", _t5_film, _t5_film_inputs, 4),
        Case("temporal", _temporal, _temporal_inputs, 4),
        Case("proteina", _proteina, partial(_proteina_inputs, passes=0), 4),
        Case("proteina_recycled", _proteina, partial(_proteina_inputs, passes=2), 4),
        Case("sd3_control", models.CASES["sd3"].build, _sd3_control_inputs, 4),
        Case("sd3_skip", models.CASES["sd3"].build, _sd3_skip_inputs, 4),
        Case("sd3_image", _sd3_image, _sd3_image_inputs, 4),
        Case("flux_control", models.CASES["flux"].build, partial(_flux_control_inputs, repeat=False), 4),
        Case("flux_control_repeat", models.CASES["flux"].build, partial(_flux_control_inputs, repeat=True), 4),
        Case("flux_image", _flux_image, _flux_image_inputs, 4),
        Case("qwen_image_edit", _qwen_image, partial(_qwen_image_inputs, mask=True), 4),
        Case("qwen_image_zero", partial(_qwen_image, zero_cond_t=True), _qwen_image_inputs, 4),
        Case(
            "qwen_image_layered",
            partial(_qwen_image, use_additional_t_cond=True, use_layer3d_rope=True),
            _qwen_layered_inputs,
            4,
        ),
        Case("qwen_image_control", _qwen_image, _qwen_control_inputs, 4),
        Case("hunyuan_dit_control", _hunyuan_dit_control, _hunyuan_dit_control_inputs, 4),
        Case("latte_spatial", models.CASES["latte"].build, _latte_spatial_inputs, 4),
        Case("cogvideox15", partial(_cogvideox15, False), partial(_cogvideox15_inputs, offset=False), 4),
        Case("cogvideox15_offset", partial(_cogvideox15, True), partial(_cogvideox15_inputs, offset=True), 4),
        Case("wan_frames", _wan_frames, _wan_frames_inputs, 4),
        Case("ltx_condition", models.CASES["ltx"].build, _ltx_condition_inputs, 4),
        Case("hunyuan_video_concat", _hunyuan_video_concat, _hunyuan_video_concat_inputs, 4),
    )
}
