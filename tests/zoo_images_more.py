"""Tiny configurations of diffusers' image transformers, second part; see ``zoo_images``."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

if __package__:
    from .cases import Case, Inputs, padding_mask, patch_grid, randn, text_length, timesteps
    from .zoo_images import places, reference_grid
else:
    from cases import Case, Inputs, padding_mask, patch_grid, randn, text_length, timesteps
    from zoo_images import places, reference_grid


# --------------------------------------------------------------------------------------------------
# Packed tokens


def _longcat_image() -> nn.Module:
    from diffusers import LongCatImageTransformer2DModel

    return LongCatImageTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=20, pooled_projection_dim=20, axes_dims_rope=[4, 6, 6],
    )  # fmt: skip


def _longcat_image_inputs(batch: int, odd: bool, edit: bool) -> Inputs:
    """The first column of the ids is the modality (double precision with a reference, which is 2); no mask."""
    rows, columns = patch_grid(odd)
    text = text_length(odd)
    start = torch.tensor([0, text, text])
    ids = (places(1, rows, columns) + start).float()
    if edit:
        ids = torch.cat([ids, (places(2, *reference_grid(odd)) + start).double()])
    return {
        "hidden_states": randn(1, batch, len(ids), 16),
        "encoder_hidden_states": randn(2, batch, text, 20),
        "timestep": timesteps(batch) / 1000,
        "img_ids": ids,
        "txt_ids": torch.arange(text)[:, None] * torch.tensor([0.0, 1.0, 1.0]),
    }


def _ovis_image() -> nn.Module:
    """Gated feed-forwards, also in the single blocks."""
    from diffusers import OvisImageTransformer2DModel

    return OvisImageTransformer2DModel(
        patch_size=1, in_channels=16, out_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=20, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def _ovis_image_inputs(batch: int, odd: bool) -> Inputs:
    """Text counts along both axes of the grid; no mask."""
    rows, columns = patch_grid(odd)
    return {
        "hidden_states": randn(1, batch, rows * columns, 16),
        "encoder_hidden_states": randn(2, batch, text_length(odd), 20),
        "timestep": timesteps(batch) / 1000,
        "img_ids": places(0, rows, columns).float(),
        "txt_ids": torch.arange(text_length(odd))[:, None] * torch.tensor([0.0, 1.0, 1.0]),
    }


def _ideogram4() -> nn.Module:
    """One sequence of text and image; attention within segments."""
    from diffusers import Ideogram4Transformer2DModel

    return Ideogram4Transformer2DModel(
        in_channels=8, num_layers=3, attention_head_dim=16, num_attention_heads=4, intermediate_size=96,
        adaln_dim=24, llm_features_dim=20, rope_theta=10000, mrope_section=(4, 2, 2),
    )  # fmt: skip


def _ideogram4_inputs(batch: int, odd: bool, text: bool = True, per_token: bool = False) -> Inputs:
    """Text is padded on the left, the padding being segment -1; without text, as for guidance, only the image.

    Latents are zero where text is, text features are zero where the image is; timestep in 0..1 or for each token.
    """
    rows, columns = patch_grid(odd)
    words, image = text_length(odd) if text else 0, rows * columns
    length = words + image
    steps = 1 - timesteps(batch) / 1000
    positions = torch.cat([torch.zeros(words, 3).long(), places(0, rows, columns) + 100]).repeat(batch, 1, 1)
    segments, roles = torch.ones(2, batch, length, dtype=torch.int64).unbind()
    roles = roles * (torch.arange(length) >= words) * 2
    for row, kept in enumerate(padding_mask(batch, words, torch.int64).sum(1) if text else ()):
        positions[row, words - kept : words] = torch.arange(kept)[:, None]
        segments[row, : words - kept] = -1
        roles[row, words - kept : words] = 3
    return {
        "hidden_states": torch.cat([torch.zeros(batch, words, 8), randn(1, batch, image, 8)], dim=1),
        "timestep": steps[:, None] + torch.arange(length) / 1000 if per_token else steps,
        "encoder_hidden_states": torch.cat([randn(2, batch, words, 20), torch.zeros(batch, image, 20)], dim=1),
        "position_ids": positions,
        "segment_ids": segments,
        "indicator": roles,
    }


def _krea2(kv_heads: int) -> nn.Module:
    """Text first attends between the three layers of its encoder, then between tokens; attention outputs are gated."""
    from diffusers import Krea2Transformer2DModel

    return Krea2Transformer2DModel(
        in_channels=16, num_layers=3, attention_head_dim=16, num_attention_heads=4, num_key_value_heads=kv_heads,
        intermediate_size=96, timestep_embed_dim=32, text_hidden_dim=24, num_text_layers=3, text_num_attention_heads=4,
        text_num_key_value_heads=kv_heads, text_intermediate_size=40, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def _krea2_inputs(batch: int, odd: bool, mask: bool) -> Inputs:
    """Text: (batch, text, 3 layers, 24); mask: (batch, text) bool; positions of text and image, without a batch."""
    rows, columns = patch_grid(odd)
    text = text_length(odd)
    return {
        "hidden_states": randn(1, batch, rows * columns, 16),
        "encoder_hidden_states": randn(2, batch, text, 3, 24),
        "timestep": timesteps(batch) / 1000,
        "position_ids": torch.cat([torch.zeros(text, 3), places(0, rows, columns)]),
        "encoder_attention_mask": padding_mask(batch, text, torch.bool) if mask else None,
    }


def _nucleus_moe_image(experts: str, kv_heads: int = 2, sigmoid: bool = False) -> nn.Module:
    """Text gives keys and values only.  Experts choose their tokens, from the whole image, by capacity."""
    from diffusers import NucleusMoEImageTransformer2DModel

    return NucleusMoEImageTransformer2DModel(
        patch_size=1, in_channels=16, out_channels=16, num_layers=3, attention_head_dim=16, num_attention_heads=4,
        num_key_value_heads=kv_heads, joint_attention_dim=20, axes_dims_rope=(4, 6, 6), dense_moe_strategy=experts,
        num_experts=4, moe_intermediate_dim=32, capacity_factors=2.0, use_sigmoid=sigmoid,
    )  # fmt: skip


def _nucleus_moe_image_inputs(batch: int, odd: bool, mask: bool = False, cached: bool = False) -> Inputs:
    """The grid comes as Python integers; timestep in 0..1.

    Cached: keys and values of the text, the same for all blocks, replace the text.
    """
    rows, columns = patch_grid(odd)
    text = text_length(odd)
    kept = {"cached_txt_key": randn(3, batch, text, 2, 16), "cached_txt_value": randn(4, batch, text, 2, 16)}
    return {
        "hidden_states": randn(1, batch, rows * columns, 16),
        "img_shapes": [(1, rows, columns)] * batch,
        "encoder_hidden_states": randn(2, batch, text, 20),
        "encoder_hidden_states_mask": padding_mask(batch, text, torch.int64) if mask else None,
        "timestep": timesteps(batch) / 1000,
        "attention_kwargs": kept if cached else None,
    }


def _qwen_image21(causal: bool) -> nn.Module:
    """Causal: text and clean images see what comes before them, and are modulated as at time zero."""
    from diffusers import QwenImage21Transformer2DModel

    return QwenImage21Transformer2DModel(
        patch_size=1, in_channels=16, out_channels=16, num_layers=3, attention_head_dim=16, num_attention_heads=4,
        context_in_dim=20, axes_dims_rope=(4, 6, 6), causal_condition=causal,
    )  # fmt: skip


def _qwen_image21_inputs(batch: int, odd: bool, mask: bool, edit: bool = False, cache: str | None = None) -> Inputs:
    """A slot of the layout stands for four image tokens, so the grid is 6x10 (odd) or 4x6 tokens.

    Edit: a clean image of 2x6 or 2x4 tokens comes after three text tokens.  Mask: (batch, text and slots) int64.
    Cache: "extract" stores keys and values of all that comes before the image, "cached" uses them.
    """
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

    rows, columns = (6, 10) if odd else (4, 6)
    shapes = [(1, 2, 6 if odd else 4)] * edit + [(1, rows, columns)]
    tokens = [height * width for _, height, width in shapes]
    text = text_length(odd)
    clean = sum(tokens[:-1]) // 4
    words = torch.zeros(text, dtype=torch.bool)
    layout = torch.cat([words[:3], torch.ones(clean).bool(), words[3:], torch.ones(tokens[-1] // 4).bool()])
    inputs = {
        "hidden_states": randn(1, batch, sum(tokens), 16),
        "encoder_hidden_states": randn(2, batch, text + clean, 20),
        "timestep": timesteps(batch) / 1000,
        "img_shapes": [shapes] * batch,
        "img_mask": layout.repeat(batch, 1),
        "encoder_hidden_states_mask": padding_mask(batch, text + clean, torch.int64) if mask else None,
        "return_dict": False,
    }
    if cache is not None:
        kept = QwenImage21KVCache(3)
        inputs |= {"kv_cache": kept, "kv_cache_mode": cache}
        for i, layer in enumerate(kept.layer_caches if cache == "cached" else ()):
            layer.store(randn(10 + i, batch, text + 4 * clean, 4, 16), randn(20 + i, batch, text + 4 * clean, 4, 16))
    return inputs


# --------------------------------------------------------------------------------------------------
# Latent images, patched by the class


def _ernie_image() -> nn.Module:
    """Hidden states are (tokens, batch, channels) between attentions; the image comes before the text."""
    from diffusers import ErnieImageTransformer2DModel

    return ErnieImageTransformer2DModel(
        hidden_size=64, num_attention_heads=4, num_layers=3, ffn_hidden_size=96, in_channels=4, out_channels=4,
        patch_size=2, text_in_dim=20, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip


def _ernie_image_inputs(batch: int, odd: bool) -> Inputs:
    """Lengths of the texts, (batch,) int64, instead of a mask."""
    rows, columns = patch_grid(odd)
    return {
        "hidden_states": randn(1, batch, 4, 2 * rows, 2 * columns),
        "timestep": timesteps(batch).float(),
        "text_bth": randn(2, batch, text_length(odd), 20),
        "text_lens": padding_mask(batch, text_length(odd), torch.int64).sum(1),
    }


def _glm_image() -> nn.Module:
    """A token of a language model is added to each patch; queries and keys of the image are rotated in place."""
    from diffusers import GlmImageTransformer2DModel

    return GlmImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=4,
        text_embed_dim=20, time_embed_dim=24, condition_dim=8, prior_vq_quantizer_codebook_size=40,
    )  # fmt: skip


def _glm_image_inputs(
    batch: int, odd: bool, drop: bool = False, mask: bool = False, cache: str | None = None
) -> Inputs:
    """Drop: the language model's tokens are zeroed, by a bool mask; mask: (batch, text) int64.

    Cache: "write" takes a reference image without text and stores keys and values, "read" prepends such of 15 or 8
    tokens, which are kept for each sample.
    """
    from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

    rows, columns = patch_grid(odd)
    text = 0 if cache == "write" else text_length(odd)
    height, width = reference_grid(odd)
    inputs = {
        "hidden_states": randn(1, batch, 4, 2 * rows, 2 * columns),
        "encoder_hidden_states": randn(2, batch, text, 20),
        "prior_token_id": torch.arange(batch * rows * columns).reshape(batch, -1) * 7 % 40,
        "prior_token_drop": torch.full((batch, rows * columns), drop),
        "timestep": timesteps(batch),
        "target_size": torch.tensor([[1024.0, 768.0]]) - 64 * torch.arange(batch)[:, None],
        "crop_coords": torch.zeros(batch, 2),
    }
    if mask:
        inputs["attention_mask"] = padding_mask(batch, text, torch.int64)
    if cache is not None:
        kept = inputs["kv_caches"] = GlmImageKVCache(3)
        kept.set_mode(cache)
        for i in range(batch if cache == "read" else 0):
            for j in range(3):
                kept[j].store(*randn(10 + 3 * i + j, 2, 1, height * width, 4, 16).unbind())
            kept.next_sample()
    return inputs


def _prx(resolution: bool) -> nn.Module:
    """Text gives keys and values only.  Resolution: the image's size is embedded, patches pass a bottleneck."""
    from diffusers import PRXTransformer2DModel

    return PRXTransformer2DModel(
        in_channels=4, patch_size=2, context_in_dim=20, hidden_size=64, num_heads=4, depth=3, axes_dim=[8, 8],
        bottleneck_size=12 if resolution else None, resolution_embeds=resolution,
    )  # fmt: skip


def _prx_inputs(batch: int, odd: bool, mask: bool) -> Inputs:
    """Mask: (batch, text) bool.  One timestep for the whole batch, (1,), as the pipeline gives it."""
    rows, columns = patch_grid(odd)
    return {
        "hidden_states": randn(1, batch, 4, 2 * rows, 2 * columns),
        "timestep": timesteps(1) / 1000,
        "encoder_hidden_states": randn(2, batch, text_length(odd), 20),
        "attention_mask": padding_mask(batch, text_length(odd), torch.bool) if mask else None,
    }


# --------------------------------------------------------------------------------------------------
# The older, general classes


def _transformer2d(continuous: bool = True, **options: object) -> nn.Module:
    """Continuous: the pixels of a feature map are the tokens; it is added to the output."""
    from diffusers import Transformer2DModel

    if continuous:
        options = {"in_channels": 12, "norm_num_groups": 3, "cross_attention_dim": 20} | options
    return Transformer2DModel(num_attention_heads=4, attention_head_dim=16, num_layers=3, **options)


def _transformer2d_inputs(
    batch: int, odd: bool, text: bool = True, mask: bool = False, objects: bool = False
) -> Inputs:
    """Masks: (batch, tokens) and (batch, text) int64; objects: three of GLIGEN's, to which gated layers attend."""
    rows, columns = patch_grid(odd)
    inputs = {"hidden_states": randn(1, batch, 12, rows, columns), "timestep": timesteps(batch)}
    if text:
        inputs["encoder_hidden_states"] = randn(2, batch, text_length(odd), 20)
    if mask:
        inputs["attention_mask"] = padding_mask(batch, rows * columns, torch.int64)
        inputs["encoder_attention_mask"] = padding_mask(batch, text_length(odd), torch.int64)
    if objects:
        inputs["cross_attention_kwargs"] = {"gligen": {"objs": randn(3, batch, 3, 20)}}
    return inputs


def _transformer2d_patches(labels: bool) -> nn.Module:
    """As DiT (labels) or as PixArt, whose captions are projected and whose size is embedded in 16 + 16 + 16."""
    from diffusers import Transformer2DModel

    options = {
        "norm_type": "ada_norm_zero" if labels else "ada_norm_single",
        "num_embeds_ada_norm": 1000,
        "attention_bias": True,
        "activation_fn": "gelu-approximate",
        "norm_elementwise_affine": False,
        "in_channels": 4,
        "out_channels": 8,
        "sample_size": 16,
        "patch_size": 2,
    }
    if not labels:
        options |= {"cross_attention_dim": 48, "caption_channels": 20, "use_additional_conditions": True}
    return Transformer2DModel(num_attention_heads=4, attention_head_dim=16 if labels else 12, num_layers=3, **options)


def _transformer2d_patches_inputs(batch: int, odd: bool, labels: bool) -> Inputs:
    """With labels square images only: 5x5 or 4x4 patches; else text with a (batch, text) int64 mask."""
    rows, columns = patch_grid(odd)
    if labels:
        side = 10 if odd else 8
        return {
            "hidden_states": randn(1, batch, 4, side, side),
            "timestep": timesteps(batch),
            "class_labels": 3 + 5 * torch.arange(batch),
        }
    sides = torch.tensor([[1024.0, 768.0]]) - 64 * torch.arange(batch)[:, None]
    return {
        "hidden_states": randn(1, batch, 4, 2 * rows, 2 * columns),
        "encoder_hidden_states": randn(2, batch, text_length(odd), 20),
        "timestep": timesteps(batch),
        "added_cond_kwargs": {"resolution": sides, "aspect_ratio": sides[:, :1] / sides[:, 1:]},
        "encoder_attention_mask": padding_mask(batch, text_length(odd), torch.int64),
    }


def _transformer2d_codes_inputs(batch: int, odd: bool) -> Inputs:
    """Codes of a quantised image, (batch, tokens) int64 below 30, learned positions for 36; one timestep, no batch."""
    rows, columns = patch_grid(odd)
    return {
        "hidden_states": torch.arange(batch * rows * columns).reshape(batch, -1) * 7 % 30,
        "encoder_hidden_states": randn(2, batch, text_length(odd), 20),
        "timestep": torch.tensor(700),
    }


def _dual_transformer2d() -> nn.Module:
    """Two transformers read a part of the text each: the first six tokens and the next five."""
    from diffusers.models.transformers.dual_transformer_2d import DualTransformer2DModel

    model = DualTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=12, num_layers=2, norm_num_groups=3,
        cross_attention_dim=20,
    )  # fmt: skip
    model.condition_lengths = [6, 5]
    return model


def _dreamlite(self_attention: bool) -> nn.Module:
    """The tokens are the pixels of a feature map; two key heads for four, with the U-Net's own processor."""
    from diffusers.models.transformers.transformer_2d_dreamlite import DreamLiteTransformer2DModel
    from diffusers.models.unets.unet_dreamlite import DreamLiteAttnProcessor2_0

    model = DreamLiteTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=12, num_layers=3, norm_num_groups=3,
        cross_attention_dim=20, use_linear_projection=self_attention, use_self_attention=self_attention,
        qk_norm="rms_norm", num_kv_heads=2, ff_mult=3,
    )  # fmt: skip
    for block in model.transformer_blocks:
        for attention in (block.attn1, block.attn2):
            if attention is not None:
                attention.set_processor(DreamLiteAttnProcessor2_0())
    return model


def _dreamlite_inputs(batch: int, odd: bool, mask: bool) -> Inputs:
    """Mask: (batch, text) int64."""
    rows, columns = patch_grid(odd)
    return {
        "hidden_states": randn(1, batch, 12, rows, columns),
        "encoder_hidden_states": randn(2, batch, text_length(odd), 20),
        "encoder_attention_mask": padding_mask(batch, text_length(odd), torch.int64) if mask else None,
    }


def _prior(shape: bool) -> nn.Module:
    """Predicts an image's embedding, one token; or, as Shap-E does, a shape's 35 tokens."""
    from diffusers import PriorTransformer

    options = {}
    if shape:
        options = {
            "norm_in_type": "layer",
            "embedding_proj_norm_type": "layer",
            "encoder_hid_proj_type": None,
            "added_emb_type": None,
            "embedding_proj_dim": 24,
            "time_embed_dim": 96,
        }
    return PriorTransformer(
        num_attention_heads=4, attention_head_dim=16, num_layers=3, embedding_dim=20,
        num_embeddings=35 if shape else 11, additional_embeddings=0 if shape else 4, **options,
    )  # fmt: skip


def _prior_inputs(batch: int, odd: bool, mask: bool) -> Inputs:
    """Always 11 text tokens (a parameter fixes them); mask: (batch, text) bool, joined with a causal one."""
    return {
        "hidden_states": randn(1 if odd else 4, batch, 20),
        "timestep": torch.tensor(700),
        "proj_embedding": randn(2, batch, 20),
        "encoder_hidden_states": randn(3, batch, 11, 20),
        "attention_mask": padding_mask(batch, 11, torch.bool) if mask else None,
    }


def _prior_shape_inputs(batch: int, odd: bool) -> Inputs:
    """Always 35 tokens (a parameter fixes them); an image's embedding instead of text; no mask."""
    return {
        "hidden_states": randn(1 if odd else 4, batch, 35, 20),
        "timestep": timesteps(batch),
        "proj_embedding": randn(2, batch, 24),
    }


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("longcat_image", _longcat_image, partial(_longcat_image_inputs, edit=False), 4),
        Case("longcat_image_edit", _longcat_image, partial(_longcat_image_inputs, edit=True), 4),
        Case("ovis_image", _ovis_image, _ovis_image_inputs, 4),
        Case("ideogram4", _ideogram4, _ideogram4_inputs, 4),
        Case("ideogram4_image", _ideogram4, partial(_ideogram4_inputs, text=False), 4),
        Case("ideogram4_steps", _ideogram4, partial(_ideogram4_inputs, per_token=True), 4),
        Case("krea2", partial(_krea2, 2), partial(_krea2_inputs, mask=True), 4),
        Case("krea2_nomask", partial(_krea2, 4), partial(_krea2_inputs, mask=False), 4),
        Case("nucleus_moe_image", partial(_nucleus_moe_image, "leave_first_block_dense"), _nucleus_moe_image_inputs, 4),
        Case(
            "nucleus_moe_image_sigmoid",
            partial(_nucleus_moe_image, "all_moe", 4, sigmoid=True),
            _nucleus_moe_image_inputs,
            4,
        ),
        Case("nucleus_moe_image_dense", partial(_nucleus_moe_image, "all_dense"), _nucleus_moe_image_inputs, 4),
        Case(
            "nucleus_moe_image_mask",
            partial(_nucleus_moe_image, "all_dense"),
            partial(_nucleus_moe_image_inputs, mask=True),
            4,
        ),
        Case(
            "nucleus_moe_image_cached",
            partial(_nucleus_moe_image, "all_dense"),
            partial(_nucleus_moe_image_inputs, cached=True),
            4,
        ),
        Case("qwen_image21", partial(_qwen_image21, True), partial(_qwen_image21_inputs, mask=False), 4),
        Case("qwen_image21_mask", partial(_qwen_image21, True), partial(_qwen_image21_inputs, mask=True), 4),
        Case("qwen_image21_edit", partial(_qwen_image21, True), partial(_qwen_image21_inputs, mask=True, edit=True), 4),
        Case("qwen_image21_steady", partial(_qwen_image21, False), partial(_qwen_image21_inputs, mask=False), 4),
        Case(
            "qwen_image21_extract",
            partial(_qwen_image21, True),
            partial(_qwen_image21_inputs, mask=False, edit=True, cache="extract"),
            4,
        ),
        Case(
            "qwen_image21_cached",
            partial(_qwen_image21, True),
            partial(_qwen_image21_inputs, mask=True, edit=True, cache="cached"),
            4,
        ),
        Case("ernie_image", _ernie_image, _ernie_image_inputs, 4),
        Case("glm_image", _glm_image, _glm_image_inputs, 4),
        Case("glm_image_drop", _glm_image, partial(_glm_image_inputs, drop=True), 4),
        Case("glm_image_mask", _glm_image, partial(_glm_image_inputs, mask=True), 4),
        Case("glm_image_write", _glm_image, partial(_glm_image_inputs, cache="write"), 4),
        Case("glm_image_read", _glm_image, partial(_glm_image_inputs, cache="read"), 4),
        Case("prx", partial(_prx, False), partial(_prx_inputs, mask=True), 4),
        Case("prx_pixel", partial(_prx, True), partial(_prx_inputs, mask=False), 4),
        Case("transformer2d", _transformer2d, _transformer2d_inputs, 4),
        Case(
            "transformer2d_mask",
            partial(_transformer2d, use_linear_projection=True),
            partial(_transformer2d_inputs, mask=True),
            4,
        ),
        Case(
            "transformer2d_only_cross",
            partial(_transformer2d, only_cross_attention=True, upcast_attention=True),
            _transformer2d_inputs,
            4,
        ),
        Case(
            "transformer2d_double_self",
            partial(_transformer2d, double_self_attention=True, cross_attention_dim=None),
            partial(_transformer2d_inputs, text=False),
            4,
        ),
        Case(
            "transformer2d_gated",
            partial(_transformer2d, attention_type="gated"),
            partial(_transformer2d_inputs, objects=True),
            4,
        ),
        Case(
            "transformer2d_labels",
            partial(_transformer2d_patches, True),
            partial(_transformer2d_patches_inputs, labels=True),
            4,
        ),
        Case(
            "transformer2d_patches",
            partial(_transformer2d_patches, False),
            partial(_transformer2d_patches_inputs, labels=False),
            4,
        ),
        Case(
            "transformer2d_codes",
            partial(
                _transformer2d,
                continuous=False,
                num_vector_embeds=31,
                sample_size=6,
                norm_type="ada_norm",
                num_embeds_ada_norm=1000,
                cross_attention_dim=20,
            ),
            _transformer2d_codes_inputs,
            4,
        ),
        Case("dual_transformer2d", _dual_transformer2d, _transformer2d_inputs, 4),
        Case("dreamlite", partial(_dreamlite, True), partial(_dreamlite_inputs, mask=True), 4),
        Case("dreamlite_cross", partial(_dreamlite, False), partial(_dreamlite_inputs, mask=False), 4),
        Case("prior", partial(_prior, False), partial(_prior_inputs, mask=True), 4),
        Case("prior_nomask", partial(_prior, False), partial(_prior_inputs, mask=False), 4),
        Case("prior_shape", partial(_prior, True), _prior_shape_inputs, 4),
    )
}
