"""Tiny configurations of diffusers' image transformers, first part: the ones in widest use.

Lists what ``models`` does not.  A variant stands for each way of calling a class that changes what it computes.
``zoo_images_more`` has the other classes, ``cases`` says what the sizes are.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

if __package__:
    from .cases import Case, Inputs, padding_mask, patch_grid, randn, text_length, timesteps
else:
    from cases import Case, Inputs, padding_mask, patch_grid, randn, text_length, timesteps


def places(frame: int, rows: int, columns: int, *last: int) -> Tensor:
    """Coordinates of a grid of patches, (patches, 3) int64, or one more column for each of ``last``."""
    axes = [torch.tensor([frame]), torch.arange(rows), torch.arange(columns)] + [torch.tensor([n]) for n in last]
    return torch.cartesian_prod(*axes)


def reference_grid(odd: bool) -> tuple[int, int]:
    """Rows and columns of patches of a reference image."""
    return (3, 5) if odd else (2, 4)


# --------------------------------------------------------------------------------------------------
# Flux and what follows it: packed tokens, ids for the rotary embedding


def _chroma() -> nn.Module:
    """Modulations come from an approximator that knows the timestep only; it needs 3 * 3 + 12 * 2 + 2 outputs."""
    from diffusers import ChromaTransformer2DModel

    return ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=20, axes_dims_rope=(4, 6, 6),
        approximator_num_channels=16, approximator_hidden_dim=32, approximator_layers=2,
    )  # fmt: skip


def _chroma_inputs(batch: int, odd: bool, mask: bool, control: bool = False) -> Inputs:
    """Mask: (batch, text + image) bool, which hides tokens as queries too; ids have no batch; timestep in 0..1.

    Control: residuals of a ControlNet, one for two joint blocks and two for three single blocks.
    """
    rows, columns = patch_grid(odd)
    text, image = text_length(odd), rows * columns
    inputs = {
        "hidden_states": randn(1, batch, image, 16),
        "encoder_hidden_states": randn(2, batch, text, 20),
        "timestep": timesteps(batch) / 1000,
        "img_ids": places(0, rows, columns).float(),
        "txt_ids": torch.zeros(text, 3),
    }
    if mask:
        kept = padding_mask(batch, text, torch.bool)
        inputs["attention_mask"] = torch.cat([kept, torch.ones(batch, image, dtype=torch.bool)], dim=1)
    if control:
        inputs["controlnet_block_samples"] = [randn(3, batch, image, 64)]
        inputs["controlnet_single_block_samples"] = [randn(4 + i, batch, image, 64) for i in range(2)]
    return inputs


def _flux2(guidance: bool, processor: str = "default") -> nn.Module:
    """Blocks share their modulations.  Processor "cache" keeps keys and values of references, as Klein KV does."""
    from diffusers import Flux2Transformer2DModel
    from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor

    model = Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=20, timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4), guidance_embeds=guidance,
    )  # fmt: skip
    if processor == "cache":
        for block in model.transformer_blocks:
            block.attn.set_processor(Flux2KVAttnProcessor())
        for block in model.single_transformer_blocks:
            block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    if processor == "fused":
        model.fuse_qkv_projections()
    return model


def _flux2_inputs(batch: int, odd: bool, guidance: bool, reference: str = "none") -> Inputs:
    """Ids are (batch, tokens, 4) int64, the fourth column counts text; timestep in 0..1.

    Reference: "after" puts a second image's tokens behind the image's; "extract" puts them first and has the class
    return their keys and values; "cached" gives these back in place of the tokens.
    """
    from diffusers.models.transformers.transformer_flux2 import Flux2KVCache

    rows, columns = patch_grid(odd)
    text = text_length(odd)
    others = places(10, *reference_grid(odd), 0)
    ids, cache = [places(0, rows, columns, 0)], {}
    if reference == "after":
        ids = [*ids, others]
    if reference == "extract":
        ids = [others, *ids]
        cache = {"kv_cache_mode": "extract", "num_ref_tokens": len(others)}
    if reference == "cached":
        kept = Flux2KVCache(2, 3)
        kept.num_ref_tokens = len(others)
        for i, layer in enumerate(kept.double_block_caches + kept.single_block_caches):
            layer.store(randn(10 + i, batch, len(others), 4, 16), randn(20 + i, batch, len(others), 4, 16))
        cache = {"kv_cache_mode": "cached", "kv_cache": kept}
    ids = torch.cat(ids)
    words = torch.cartesian_prod(torch.arange(1), torch.arange(1), torch.arange(1), torch.arange(text))
    return {
        "hidden_states": randn(1, batch, len(ids), 16),
        "encoder_hidden_states": randn(2, batch, text, 20),
        "timestep": timesteps(batch) / 1000,
        "guidance": 4.0 - torch.arange(batch) if guidance else None,
        "img_ids": ids.repeat(batch, 1, 1),
        "txt_ids": words.repeat(batch, 1, 1),
        "return_dict": False,
        **cache,
    }


def _flux3(flow_map: bool) -> nn.Module:
    """Text, image and reference image pass blocks of their own first, then all meet."""
    from diffusers import Flux3Transformer2DModel

    return Flux3Transformer2DModel(
        in_channels=16, cond_in_channels=12, num_layers=2, num_single_layers=3, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=20, timestep_channels=32, axes_dims_rope=(4, 4, 4, 4),
        flow_map=flow_map,
    )  # fmt: skip


def _flux3_inputs(batch: int, odd: bool, reference: bool, flow_map: bool) -> Inputs:
    """Ids are (tokens, 4) without a batch, floating point; a flow map takes the timestep it jumps to as well."""
    rows, columns = patch_grid(odd)
    text = text_length(odd)
    words = torch.cartesian_prod(torch.arange(1), torch.arange(1), torch.arange(1), torch.arange(text))
    inputs = {
        "hidden_states": randn(1, batch, rows * columns, 16),
        "encoder_hidden_states": randn(2, batch, text, 20),
        "timestep": timesteps(batch) / 1000,
        "img_ids": places(0, rows, columns, 0).float(),
        "txt_ids": words.float(),
    }
    if reference:
        inputs["image_cond_ids"] = places(10, *reference_grid(odd), 0).float()
        inputs["image_cond_hidden_states"] = randn(3, batch, len(inputs["image_cond_ids"]), 12)
    if flow_map:
        inputs["target_timestep"] = timesteps(batch) / 1000 - 0.25
    return inputs


def _bria() -> nn.Module:
    from diffusers import BriaTransformer2DModel

    return BriaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=20, axes_dims_rope=(4, 6, 6), time_theta=100,
    )  # fmt: skip


def _bria_inputs(batch: int, odd: bool, control: bool) -> Inputs:
    """Timestep in thousands; control: residuals of a ControlNet, one for both joint blocks."""
    rows, columns = patch_grid(odd)
    return {
        "hidden_states": randn(1, batch, rows * columns, 16),
        "encoder_hidden_states": randn(2, batch, text_length(odd), 20),
        "timestep": timesteps(batch),
        "img_ids": places(0, rows, columns).float(),
        "txt_ids": torch.zeros(text_length(odd), 3),
        "controlnet_block_samples": [randn(3, batch, rows * columns, 64)] if control else None,
    }


def _bria_fibo(guidance: bool) -> nn.Module:
    """Before each block the second half of a text token's channels is replaced by a layer of the text encoder."""
    from diffusers import BriaFiboTransformer2DModel

    return BriaFiboTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=20, axes_dims_rope=(4, 6, 6), text_encoder_dim=12,
        guidance_embeds=guidance,
    )  # fmt: skip


def _bria_fibo_inputs(batch: int, odd: bool, mask: bool, guidance: bool = False) -> Inputs:
    """A list of five layers of text; mask: (batch, 1, 1, text + image) bool, in the attention's keyword arguments."""
    rows, columns = patch_grid(odd)
    text, image = text_length(odd), rows * columns
    inputs = {
        "hidden_states": randn(1, batch, image, 16),
        "encoder_hidden_states": randn(2, batch, text, 20),
        "text_encoder_layers": [randn(3 + i, batch, text, 12) for i in range(5)],
        "timestep": timesteps(batch),
        "img_ids": places(0, rows, columns).float(),
        "txt_ids": torch.zeros(text, 3),
        "guidance": 5.0 - torch.arange(batch) if guidance else None,
    }
    if mask:
        kept = torch.cat([padding_mask(batch, text, torch.bool), torch.ones(batch, image, dtype=torch.bool)], dim=1)
        inputs["joint_attention_kwargs"] = {"attention_mask": kept[:, None, None, :]}
    return inputs


def _bria_fibo2() -> nn.Module:
    """Queries condense the text to 4 to 8 gist tokens, by its length; the second layer attends to text besides."""
    from diffusers import BriaFibo2Transformer2DModel

    return BriaFibo2Transformer2DModel(
        in_channels=4, patch_size=2, dim=64, n_layers=3, n_refiner_layers=2, n_heads=4, cap_feat_dim=20,
        injection_layer_ids=(1,), perceiver_num_layers=2, min_num_gist_tokens=4, max_num_gist_tokens=8, gist_step=1,
        gist_min_text_len=4, gist_max_text_len=12, axes_dims=(4, 6, 6), axes_lens=(32, 16, 16),
    )  # fmt: skip


def _bria_fibo2_inputs(batch: int, odd: bool, mask: bool, context: bool) -> Inputs:
    """Text: (batch, 2 layers of the encoder, text, 20); mask: bool; context: clean images of another size."""
    rows, columns = patch_grid(odd)
    height, width = reference_grid(odd)
    images = [randn(3 + i, batch, 4, 2 * height, 2 * width) for i in range(2)]
    return {
        "hidden_states": randn(1, batch, 4, 2 * rows, 2 * columns),
        "timestep": timesteps(batch) / 1000,
        "encoder_hidden_states": randn(2, batch, 2, text_length(odd), 20),
        "encoder_attention_mask": padding_mask(batch, text_length(odd), torch.bool) if mask else None,
        "context_latents": images if context else None,
    }


# --------------------------------------------------------------------------------------------------
# Latent images, patched by the class


def _aura_flow(fused: bool) -> nn.Module:
    """Eight register tokens lead the text.  Learned positions for 8x8 patches."""
    from diffusers import AuraFlowTransformer2DModel

    model = AuraFlowTransformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_mmdit_layers=2, num_single_dit_layers=3,
        attention_head_dim=16, num_attention_heads=4, joint_attention_dim=20, caption_projection_dim=64,
        out_channels=4, pos_embed_max_size=64,
    )  # fmt: skip
    if fused:
        model.fuse_qkv_projections()
    return model


def _aura_flow_inputs(batch: int, odd: bool) -> Inputs:
    """No mask in this class; timestep in 0..1."""
    rows, columns = patch_grid(odd)
    return {
        "hidden_states": randn(1, batch, 4, 2 * rows, 2 * columns),
        "encoder_hidden_states": randn(2, batch, text_length(odd), 20),
        "timestep": timesteps(batch) / 1000,
    }


def _cogview4() -> nn.Module:
    """The rotary embedding samples an 8x8 grid; queries and keys of the image are rotated in place."""
    from diffusers import CogView4Transformer2DModel

    return CogView4Transformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16,
        num_attention_heads=4, text_embed_dim=20, time_embed_dim=24, condition_dim=8, pos_embed_max_size=8,
        sample_size=16, rope_axes_dim=(8, 8),
    )  # fmt: skip


def _cogview3_plus() -> nn.Module:
    """A sine table of 8x8 positions."""
    from diffusers import CogView3PlusTransformer2DModel

    return CogView3PlusTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16,
        num_attention_heads=4, text_embed_dim=20, time_embed_dim=24, condition_dim=8, pos_embed_max_size=8,
        sample_size=16,
    )  # fmt: skip


def _cogview_inputs(batch: int, odd: bool, mask: bool) -> Inputs:
    """Sizes as in SDXL; mask: (batch, text) int64, which the class turns into a bias of 1 or 0."""
    rows, columns = patch_grid(odd)
    sizes = torch.tensor([[1024.0, 768.0]]) - 64 * torch.arange(batch)[:, None]
    inputs = {
        "hidden_states": randn(1, batch, 4, 2 * rows, 2 * columns),
        "encoder_hidden_states": randn(2, batch, text_length(odd), 20),
        "timestep": timesteps(batch),
        "original_size": sizes,
        "target_size": sizes - 128,
        "crop_coords": torch.zeros(batch, 2),
    }
    if mask:
        inputs["attention_mask"] = padding_mask(batch, text_length(odd), torch.int64)
    return inputs


def _lumina2(kv_heads: int) -> nn.Module:
    """Refiners for text and image, then joint layers; grouped queries when there are fewer key heads."""
    from diffusers import Lumina2Transformer2DModel

    return Lumina2Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, hidden_size=64, num_layers=3, num_refiner_layers=2,
        num_attention_heads=4, num_kv_heads=kv_heads, multiple_of=32, axes_dim_rope=(4, 6, 6), axes_lens=(32, 16, 16),
        cap_feat_dim=20,
    )  # fmt: skip


def _lumina2_inputs(batch: int, odd: bool, mask: bool) -> Inputs:
    """Mask: (batch, text) int64; its lengths are read out and each row's image follows its own text."""
    rows, columns = patch_grid(odd)
    text = text_length(odd)
    return {
        "hidden_states": randn(1, batch, 4, 2 * rows, 2 * columns),
        "timestep": 1 - timesteps(batch) / 1000,
        "encoder_hidden_states": randn(2, batch, text, 20),
        "encoder_attention_mask": padding_mask(batch, text, torch.int64) if mask else torch.ones(batch, text).long(),
    }


def _lumina_next(kv_heads: int, qk_norm: bool) -> nn.Module:
    """Attention to the image and to the text share their queries' input; their sum is projected once."""
    from diffusers import LuminaNextDiT2DModel

    return LuminaNextDiT2DModel(
        sample_size=16, patch_size=2, in_channels=4, hidden_size=64, num_layers=3, num_attention_heads=4,
        num_kv_heads=kv_heads, multiple_of=32, qk_norm=qk_norm, cross_attention_dim=20,
    )  # fmt: skip


def _lumina_next_inputs(batch: int, odd: bool, proportional: bool) -> Inputs:
    """Mask: (batch, text) int64; a complex rotary table of 16x16 positions.

    Proportional: attention is scaled by how many tokens there are against a base of 16.
    """
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    rows, columns = patch_grid(odd)
    return {
        "hidden_states": randn(1, batch, 4, 2 * rows, 2 * columns),
        "timestep": 1 - timesteps(batch) / 1000,
        "encoder_hidden_states": randn(2, batch, text_length(odd), 20),
        "encoder_mask": padding_mask(batch, text_length(odd), torch.int64),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(16, 16, 16),
        "cross_attention_kwargs": {"base_sequence_length": 16} if proportional else {},
    }


def _sana(heads: int, sprint: bool = False, positions: bool = False) -> nn.Module:
    """Linear attention to the image, softmax attention (4 heads) to the text, a convolution of 3x3 between tokens.

    Sprint embeds the guidance and normalises queries and keys across heads; positions adds a sine table.
    """
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=heads, attention_head_dim=64 // heads, num_layers=3,
        num_cross_attention_heads=4, cross_attention_head_dim=16, cross_attention_dim=64, caption_channels=20,
        sample_size=8, patch_size=1, guidance_embeds=sprint, qk_norm="rms_norm_across_heads" if sprint else None,
        interpolation_scale=1 if positions else None,
    )  # fmt: skip


def _sana_inputs(batch: int, odd: bool, mask: bool, sprint: bool = False, control: bool = False) -> Inputs:
    """Mask: (batch, text) int64.  Sprint takes timestep and guidance below 1; control: residuals of a ControlNet."""
    rows, columns = patch_grid(odd)
    residuals = tuple(randn(3 + i, batch, rows * columns, 64) for i in range(2))
    return {
        "hidden_states": randn(1, batch, 4, rows, columns),
        "encoder_hidden_states": randn(2, batch, text_length(odd), 20),
        "timestep": timesteps(batch) / 1000 if sprint else timesteps(batch),
        "guidance": 0.45 - 0.1 * torch.arange(batch) if sprint else None,
        "encoder_attention_mask": padding_mask(batch, text_length(odd), torch.int64) if mask else None,
        "controlnet_block_samples": residuals if control else None,
    }


def _hidream_image(experts: int, head_dim: int = 16) -> nn.Module:
    """Each block sees a layer of Llama of its own; experts 0 makes the feed-forward dense.

    A head dimension of 32 is twice the rotary embedding's, which then turns the first half.
    """
    from diffusers import HiDreamImageTransformer2DModel

    return HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=head_dim,
        num_attention_heads=4, caption_channels=[20, 24], text_emb_dim=28, num_routed_experts=experts,
        num_activated_experts=2, axes_dims_rope=(8, 4, 4), max_resolution=(16, 16), llama_layers=[0, 2, 1, 1],
    )  # fmt: skip


def _hidream_image_inputs(batch: int, odd: bool, form: str) -> Inputs:
    """Llama: (3 layers, batch, text, 24).

    Form "square" is 5x5 or 4x4 patches; the class pads a "wide" image to 64 tokens and masks the keys; "tokens" are
    patched and padded (by 5) outside, with mask, ids and grid given.
    """
    rows, columns = patch_grid(odd)
    if form == "square":
        rows = columns = 5 if odd else 4
    inputs = {
        "hidden_states": randn(1, batch, 4, 2 * rows, 2 * columns),
        "timesteps": timesteps(batch),
        "encoder_hidden_states_t5": randn(2, batch, text_length(odd), 20),
        "encoder_hidden_states_llama3": randn(3, 3, batch, 6, 24),
        "pooled_embeds": randn(4, batch, 28),
    }
    if form == "tokens":
        ids = torch.cat([places(0, rows, columns), torch.zeros(5, 3)])
        inputs["hidden_states"] = randn(1, batch, len(ids), 16)
        inputs["hidden_states_masks"] = (torch.arange(len(ids)) < rows * columns).float().repeat(batch, 1)
        inputs["img_ids"] = ids.repeat(batch, 1, 1)
        inputs["img_sizes"] = [(rows, columns)] * batch
    return inputs


def _z_image(siglip: bool) -> nn.Module:
    """Tokens of image and text are padded to multiples of 32 with learned tokens."""
    from diffusers import ZImageTransformer2DModel

    return ZImageTransformer2DModel(
        in_channels=16, dim=64, n_layers=3, n_refiner_layers=2, n_heads=4, n_kv_heads=4, cap_feat_dim=20,
        siglip_feat_dim=24 if siglip else None, axes_dims=[4, 6, 6], axes_lens=[128, 16, 16],
    )  # fmt: skip


def _z_image_inputs(batch: int, odd: bool, uneven: bool = False, control: bool = False) -> Inputs:
    """Lists with an image (16, 1, height, width) and a caption (text, 20) for each sample.

    Uneven: the second sample has 40 tokens of text and 7x7 patches, so rows are padded and attention is masked.
    Control: residuals of a ControlNet, by the layer's number.
    """
    rows, columns = patch_grid(odd)
    texts, grids = [text_length(odd)] * batch, [(rows, columns)] * batch
    if uneven:
        texts[1:], grids[1:] = [40] * (batch - 1), [(7, 7)] * (batch - 1)
    tokens = 96 if odd else 64
    return {
        "x": [randn(10 + i, 16, 1, 2 * rows, 2 * columns) for i, (rows, columns) in enumerate(grids)],
        "t": timesteps(batch) / 1000,
        "cap_feats": [randn(20 + i, text, 20) for i, text in enumerate(texts)],
        "controlnet_block_samples": {i: randn(30 + i, batch, tokens, 64) for i in (0, 2)} if control else None,
    }


def _z_image_omni_inputs(batch: int, odd: bool, reference: bool) -> Inputs:
    """Lists of lists: with a reference, two images (clean, noisy), three captions and features of the first image."""
    rows, columns = patch_grid(odd)
    height, width = reference_grid(odd)
    text = text_length(odd)
    images = [[randn(10 + i, 16, 1, 2 * rows, 2 * columns)] for i in range(batch)]
    captions = [[randn(20 + i, text, 20)] for i in range(batch)]
    features, noisy = [None] * batch, [[1]] * batch
    if reference:
        images = [[randn(40 + i, 16, 1, 2 * height, 2 * width), *row] for i, row in enumerate(images)]
        captions = [[randn(50 + i, 4, 20), *row, randn(60 + i, 3, 20)] for i, row in enumerate(captions)]
        features, noisy = [[randn(70 + i, height, width, 24), None] for i in range(batch)], [[0, 1]] * batch
    return {
        "x": images,
        "t": timesteps(batch) / 1000,
        "cap_feats": captions,
        "siglip_feats": features,
        "image_noise_mask": noisy,
    }


def _omnigen() -> nn.Module:
    """One sequence of text, timestep and image in a causal language model.  Fewer key heads fail in this class."""
    from diffusers import OmniGenTransformer2DModel

    return OmniGenTransformer2DModel(
        in_channels=4, patch_size=2, hidden_size=64, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=96, num_layers=3, pad_token_id=2, vocab_size=40, pos_embed_max_size=8, time_step_dim=32,
        rope_scaling={"short_factor": [1.0] * 8, "long_factor": [1.5] * 8},
    )  # fmt: skip


def _omnigen_inputs(batch: int, odd: bool, image: bool) -> Inputs:
    """Padding is on the left, by the row's number; mask: (batch, all, all), 1 = see: causal, the image's rows see all.

    Image: six text tokens hold the place of 2x3 patches, and see each other.
    """
    rows, columns = patch_grid(odd)
    text, tokens = text_length(odd), rows * columns
    length = text + 1 + tokens
    ids = 3 + torch.arange(batch * text).reshape(batch, text) * 7 % 37
    mask, positions = torch.ones(batch, length, length).tril(), torch.zeros(batch, length, dtype=torch.int64)
    mask[:, text + 1 :] = 1
    for row in range(batch):
        ids[row, :row] = 2
        mask[row, :, :row] = 0
        mask[row, :row] = 1
        positions[row, row:] = torch.arange(length - row)
        if image:
            mask[row, row + 1 : row + 7, row + 1 : row + 7] = 1
    return {
        "hidden_states": randn(1, batch, 4, 2 * rows, 2 * columns),
        "timestep": timesteps(batch) / 1000,
        "input_ids": ids,
        "input_img_latents": [randn(2 + i, 1, 4, 4, 6) for i in range(batch)] if image else [],
        "input_image_sizes": {row: [[row + 1, row + 7]] for row in range(batch)} if image else {},
        "attention_mask": mask,
        "position_ids": positions,
    }


def _hunyuan_image(
    glyphs: bool = False, guidance: bool = False, meanflow: bool = False, frames: bool = False
) -> nn.Module:
    """Glyphs: a second text, of ByT5 (its projection is 2048 wide).  Frames: patches have three dimensions."""
    from diffusers import HunyuanImageTransformer2DModel

    return HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=16, num_layers=2,
        num_single_layers=3, num_refiner_layers=2, patch_size=(1, 2, 2) if frames else (2, 2),
        guidance_embeds=guidance, text_embed_dim=20, text_embed_2_dim=24 if glyphs else None,
        rope_axes_dim=(4, 6, 6) if frames else (8, 8), use_meanflow=meanflow,
    )  # fmt: skip


def _hunyuan_image_inputs(
    batch: int, odd: bool, glyphs: bool = False, guidance: bool = False, meanflow: bool = False, frames: bool = False
) -> Inputs:
    """Masks: (batch, text) int64; with glyphs, both texts' kept tokens are moved to the front of the sequence.

    The timestep is floating point: its dtype is the one in which the class embeds it.
    """
    rows, columns = patch_grid(odd)
    size = (2, 2 * rows, 2 * columns) if frames else (2 * rows, 2 * columns)
    inputs = {
        "hidden_states": randn(1, batch, 4, *size),
        "timestep": timesteps(batch).float(),
        "encoder_hidden_states": randn(2, batch, text_length(odd), 20),
        "encoder_attention_mask": padding_mask(batch, text_length(odd), torch.int64),
        "guidance": 3500.0 - 500 * torch.arange(batch) if guidance else None,
        "timestep_r": timesteps(batch) - 100.0 if meanflow else None,
    }
    if glyphs:
        inputs["encoder_hidden_states_2"] = randn(3, batch, 7, 24)
        inputs["encoder_attention_mask_2"] = padding_mask(batch, 7, torch.int64)
    return inputs


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("chroma", _chroma, partial(_chroma_inputs, mask=True), 4),
        Case("chroma_nomask", _chroma, partial(_chroma_inputs, mask=False), 4),
        Case("chroma_control", _chroma, partial(_chroma_inputs, mask=False, control=True), 4),
        Case("flux2", partial(_flux2, True), partial(_flux2_inputs, guidance=True), 4),
        Case("flux2_plain", partial(_flux2, False), partial(_flux2_inputs, guidance=False), 4),
        Case("flux2_fused", partial(_flux2, True, "fused"), partial(_flux2_inputs, guidance=True), 4),
        Case("flux2_edit", partial(_flux2, True), partial(_flux2_inputs, guidance=True, reference="after"), 4),
        Case(
            "flux2_extract",
            partial(_flux2, False, "cache"),
            partial(_flux2_inputs, guidance=False, reference="extract"),
            4,
        ),
        Case(
            "flux2_cached",
            partial(_flux2, False, "cache"),
            partial(_flux2_inputs, guidance=False, reference="cached"),
            4,
        ),
        Case("flux3", partial(_flux3, False), partial(_flux3_inputs, reference=False, flow_map=False), 4),
        Case("flux3_edit", partial(_flux3, False), partial(_flux3_inputs, reference=True, flow_map=False), 4),
        Case("flux3_flow_map", partial(_flux3, True), partial(_flux3_inputs, reference=True, flow_map=True), 4),
        Case("aura_flow", partial(_aura_flow, False), _aura_flow_inputs, 4),
        Case("aura_flow_fused", partial(_aura_flow, True), _aura_flow_inputs, 4),
        Case("cogview4", _cogview4, partial(_cogview_inputs, mask=False), 4),
        Case("cogview4_mask", _cogview4, partial(_cogview_inputs, mask=True), 4),
        Case("cogview3_plus", _cogview3_plus, partial(_cogview_inputs, mask=False), 4),
        Case("lumina2", partial(_lumina2, 2), partial(_lumina2_inputs, mask=True), 4),
        Case("lumina2_nomask", partial(_lumina2, 4), partial(_lumina2_inputs, mask=False), 4),
        Case("lumina_next", partial(_lumina_next, 2, True), partial(_lumina_next_inputs, proportional=False), 4),
        Case(
            "lumina_next_proportional",
            partial(_lumina_next, 4, False),
            partial(_lumina_next_inputs, proportional=True),
            4,
        ),
        Case("sana", partial(_sana, 4), partial(_sana_inputs, mask=True), 4),
        Case("sana_nomask", partial(_sana, 8, positions=True), partial(_sana_inputs, mask=False), 4),
        Case("sana_sprint", partial(_sana, 4, sprint=True), partial(_sana_inputs, mask=True, sprint=True), 4),
        Case("sana_control", partial(_sana, 4), partial(_sana_inputs, mask=True, control=True), 4),
        Case("hidream_image", partial(_hidream_image, 0), partial(_hidream_image_inputs, form="wide"), 4),
        Case("hidream_image_square", partial(_hidream_image, 0, 32), partial(_hidream_image_inputs, form="square"), 4),
        Case("hidream_image_tokens", partial(_hidream_image, 0), partial(_hidream_image_inputs, form="tokens"), 4),
        Case("hidream_image_experts", partial(_hidream_image, 4), partial(_hidream_image_inputs, form="square"), 4),
        Case("z_image", partial(_z_image, False), _z_image_inputs, 4),
        Case("z_image_uneven", partial(_z_image, False), partial(_z_image_inputs, uneven=True), 4),
        Case("z_image_control", partial(_z_image, False), partial(_z_image_inputs, control=True), 4),
        Case("z_image_omni", partial(_z_image, True), partial(_z_image_omni_inputs, reference=True), 4),
        Case("z_image_omni_text", partial(_z_image, True), partial(_z_image_omni_inputs, reference=False), 4),
        Case("omnigen", _omnigen, partial(_omnigen_inputs, image=False), 4),
        Case("omnigen_image", _omnigen, partial(_omnigen_inputs, image=True), 4),
        Case("hunyuan_image", _hunyuan_image, _hunyuan_image_inputs, 4),
        Case(
            "hunyuan_image_glyphs",
            partial(_hunyuan_image, glyphs=True),
            partial(_hunyuan_image_inputs, glyphs=True),
            4,
        ),
        Case(
            "hunyuan_image_distilled",
            partial(_hunyuan_image, guidance=True, meanflow=True),
            partial(_hunyuan_image_inputs, guidance=True, meanflow=True),
            4,
        ),
        Case(
            "hunyuan_image_refiner",
            partial(_hunyuan_image, guidance=True, frames=True),
            partial(_hunyuan_image_inputs, guidance=True, frames=True),
            4,
        ),
        Case("bria", _bria, partial(_bria_inputs, control=False), 4),
        Case("bria_control", _bria, partial(_bria_inputs, control=True), 4),
        Case("bria_fibo", partial(_bria_fibo, False), partial(_bria_fibo_inputs, mask=True), 4),
        Case("bria_fibo_nomask", partial(_bria_fibo, True), partial(_bria_fibo_inputs, mask=False, guidance=True), 4),
        Case("bria_fibo2", _bria_fibo2, partial(_bria_fibo2_inputs, mask=False, context=False), 4),
        Case("bria_fibo2_mask", _bria_fibo2, partial(_bria_fibo2_inputs, mask=True, context=False), 4),
        Case("bria_fibo2_context", _bria_fibo2, partial(_bria_fibo2_inputs, mask=True, context=True), 4),
    )
}
