"""Tiny ControlNets of every transformer that has one: they return lists of residuals, one for each block.

All give half the strength (``conditioning_scale``), so that it takes part. The classes for many ControlNets unpack
what the single ones return, which only works without ``return_dict``, as their pipelines call them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if __package__:
    from . import models
    from .cases import Case, Inputs, frame_count, padding_mask, patch_grid, randn, text_length, timesteps
else:
    import models
    from cases import Case, Inputs, frame_count, padding_mask, patch_grid, randn, text_length, timesteps


def _image(seed: int, batch: int, odd: bool, channels: int = 4) -> Tensor:
    """A latent image."""
    rows, columns = patch_grid(odd)
    return randn(seed, batch, channels, 2 * rows, 2 * columns)


def _packed(seed: int, batch: int, odd: bool, channels: int = 16) -> Tensor:
    """A latent image as tokens, (batch, tokens, channels)."""
    rows, columns = patch_grid(odd)
    return randn(seed, batch, rows * columns, channels)


# --------------------------------------------------------------------------------------------------
# Cosmos


def _resize(image: Tensor, size: list[int], interpolation: str) -> Tensor:
    return F.interpolate(image, size=size, mode=interpolation)


def _cosmos(image: bool, learned: bool) -> nn.Module:
    """Control latents of 4 channels, which the class fills up with zeros to 8. Image: its features, too, in attention.

    The class resizes its padding mask with torchvision; where that is not installed, with the same in torch.
    """
    from diffusers.models.controlnets import controlnet_cosmos

    if not hasattr(controlnet_cosmos, "transforms"):
        controlnet_cosmos.transforms = SimpleNamespace(
            functional=SimpleNamespace(resize=_resize), InterpolationMode=SimpleNamespace(NEAREST="nearest")
        )
    return controlnet_cosmos.CosmosControlNetModel(
        n_controlnet_blocks=3, in_channels=10, latent_channels=6, model_channels=64, num_attention_heads=4,
        attention_head_dim=16, mlp_ratio=2.0, text_embed_dim=20, adaln_lora_dim=12, max_size=(8, 16, 16),
        extra_pos_embed_type="learnable" if learned else None, img_context_dim_in=28 if image else None,
        img_context_dim_out=64, use_crossattn_projection=True, crossattn_proj_in_channels=24,
        encoder_hidden_states_channels=20,
    )  # fmt: skip


def _cosmos_inputs(batch: int, odd: bool, image: bool = False, frames: bool = True) -> Inputs:
    """Video. Frames: one timestep for each, (batch, 1, frames, 1, 1), as the pipeline gives it, 0 for the first.

    The padding mask, of the size of pixels, is (1, 1, height, width) for any batch.
    """
    rows, columns = patch_grid(odd)
    count = frame_count(odd)
    given = torch.zeros(batch, 1, count, 1, 1)
    given[:, :, 0] = 1
    steps = timesteps(batch) / 1000
    text = randn(3, batch, text_length(odd), 24)
    return {
        "controls_latents": randn(1, batch, 4, count, 2 * rows, 2 * columns),
        "latents": randn(2, batch, 4, count, 2 * rows, 2 * columns),
        "timestep": steps.view(-1, 1, 1, 1, 1) * (1 - given) if frames else steps,
        "encoder_hidden_states": (text, randn(4, batch, 5 if odd else 4, 28)) if image else text,
        "condition_mask": given.expand(-1, -1, -1, 2 * rows, 2 * columns),
        "conditioning_scale": [0.5, 0.7, 0.9] if frames else 0.5,
        "padding_mask": torch.zeros(1, 1, 16 * rows, 16 * columns),
        "fps": None if frames else 16,
    }


# --------------------------------------------------------------------------------------------------
# FLUX


def _flux(modes: int | None = None, guidance: bool = False, picture: bool = False) -> nn.Module:
    """Picture: the condition comes as pixels, and there is one kind of blocks only, as in the XLabs models."""
    from diffusers import FluxControlNetModel

    return FluxControlNetModel(
        patch_size=2 if picture else 1, in_channels=16, num_layers=3, num_single_layers=0 if picture else 2,
        attention_head_dim=16, num_attention_heads=4, joint_attention_dim=20, pooled_projection_dim=24,
        guidance_embeds=guidance, axes_dims_rope=(4, 6, 6), num_mode=modes,
        conditioning_embedding_channels=4 if picture else None,
    )  # fmt: skip


def _flux_inputs(batch: int, odd: bool, union: bool = False, guidance: bool = False, picture: bool = False) -> Inputs:
    """As for the transformer, the condition as tokens. Union: its kind, (batch, 1), is one more token of text."""
    rows, columns = patch_grid(odd)
    inputs = models.CASES["flux_guidance" if guidance else "flux"].inputs(batch, odd) | {
        "controlnet_cond": randn(5, batch, 3, 16 * rows, 16 * columns) if picture else _packed(5, batch, odd),
        "conditioning_scale": 0.5,
    }
    return inputs | {"controlnet_mode": 1 + torch.arange(batch)[:, None]} if union else inputs


def _flux_many(modes: int | None) -> nn.Module:
    """Two ControlNets, or one of the union kind, which runs for each condition."""
    from diffusers import FluxMultiControlNetModel

    return FluxMultiControlNetModel([_flux(modes)] if modes else [_flux(), _flux()])


def _flux_many_inputs(batch: int, odd: bool) -> Inputs:
    """Two conditions with a kind, (batch,), and a strength each."""
    return models.CASES["flux"].inputs(batch, odd) | {
        "controlnet_cond": [_packed(5, batch, odd), _packed(6, batch, odd)],
        "controlnet_mode": [torch.full((batch,), 1), torch.full((batch,), 3)],
        "conditioning_scale": [0.5, 0.8],
        "return_dict": False,
    }


# --------------------------------------------------------------------------------------------------
# Hunyuan-DiT


def _hunyuan_dit(style: bool) -> nn.Module:
    """Three blocks, as for a transformer of eight."""
    from diffusers import HunyuanDiT2DControlNetModel

    return HunyuanDiT2DControlNetModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, patch_size=2, sample_size=16,
        hidden_size=64, transformer_num_layers=8, cross_attention_dim=20, cross_attention_dim_t5=24,
        pooled_projection_dim=28, text_len=6 if style else 5, text_len_t5=8,
        use_style_cond_and_image_meta_size=style,
    )  # fmt: skip


def _hunyuan_dit_inputs(batch: int, odd: bool, style: bool) -> Inputs:
    """As for the transformer."""
    return models.CASES["hunyuan_dit_style" if style else "hunyuan_dit"].inputs(batch, odd) | {
        "controlnet_cond": _image(5, batch, odd),
        "conditioning_scale": 0.5,
    }


def _hunyuan_dit_many() -> nn.Module:
    from diffusers.models.controlnets import HunyuanDiT2DMultiControlNetModel

    return HunyuanDiT2DMultiControlNetModel([_hunyuan_dit(False), _hunyuan_dit(False)])


# --------------------------------------------------------------------------------------------------
# Stable Diffusion 3


def _sd3(extra: int = 0) -> nn.Module:
    """Extra: channels for inpainting; with them the first block attends to the image a second time, q and k normed."""
    from diffusers import SD3ControlNetModel

    return SD3ControlNetModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=20, caption_projection_dim=64, pooled_projection_dim=24,
        out_channels=4, pos_embed_max_size=12, extra_conditioning_channels=extra,
        dual_attention_layers=(0,) if extra else (), qk_norm="rms_norm" if extra else None,
    )  # fmt: skip


def _sd3_inputs(batch: int, odd: bool, extra: int = 0) -> Inputs:
    """As for the transformer."""
    condition = {"controlnet_cond": _image(5, batch, odd, 4 + extra), "conditioning_scale": 0.5}
    return models.CASES["sd3"].inputs(batch, odd) | condition


def _sd3_large() -> nn.Module:
    """The one for SD3.5's 8B model: no text, and the transformer has embedded the image."""
    from diffusers import SD3ControlNetModel

    return SD3ControlNetModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=None, pooled_projection_dim=24, out_channels=4,
        pos_embed_type=None, use_pos_embed=False,
    )  # fmt: skip


def _sd3_large_inputs(batch: int, odd: bool) -> Inputs:
    """The image as tokens, the condition as an image."""
    return _sd3_inputs(batch, odd) | {"hidden_states": _packed(1, batch, odd, 64), "encoder_hidden_states": None}


def _sd3_many() -> nn.Module:
    from diffusers import SD3MultiControlNetModel

    return SD3MultiControlNetModel([_sd3(), _sd3()])


def _two_images(batch: int, odd: bool, inputs: Callable[[int, bool], Inputs]) -> Inputs:
    """The inputs of one ControlNet for two of them."""
    return inputs(batch, odd) | {
        "controlnet_cond": [_image(5, batch, odd), _image(6, batch, odd)],
        "conditioning_scale": [0.5, 0.8],
        "return_dict": False,
    }


# --------------------------------------------------------------------------------------------------
# Qwen-Image


def _qwen_image(extra: int = 0) -> nn.Module:
    """Extra: channels for inpainting."""
    from diffusers import QwenImageControlNetModel

    return QwenImageControlNetModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=20, axes_dims_rope=(4, 6, 6), extra_condition_channels=extra,
    )  # fmt: skip


def _qwen_image_inputs(batch: int, odd: bool, extra: int = 0, mask: bool = False) -> Inputs:
    """As for the transformer, and the condition as tokens."""
    return models.CASES["qwen_image_mask" if mask else "qwen_image"].inputs(batch, odd) | {
        "controlnet_cond": _packed(5, batch, odd, 16 + extra),
        "conditioning_scale": 0.5,
    }


def _qwen_image_many() -> nn.Module:
    """One ControlNet, which runs for each condition; the class takes no more."""
    from diffusers import QwenImageMultiControlNetModel

    return QwenImageMultiControlNetModel([_qwen_image()])


def _qwen_image_many_inputs(batch: int, odd: bool) -> Inputs:
    """Two conditions."""
    return _qwen_image_inputs(batch, odd, mask=True) | {
        "controlnet_cond": [_packed(5, batch, odd), _packed(6, batch, odd)],
        "conditioning_scale": [0.5, 0.8],
        "return_dict": False,
    }


# --------------------------------------------------------------------------------------------------
# Sana, Z-Image


def _sana() -> nn.Module:
    """Linear attention over the image, and a convolution over it in each block."""
    from diffusers import SanaControlNetModel

    return SanaControlNetModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=16, num_layers=3,
        num_cross_attention_heads=4, cross_attention_head_dim=16, cross_attention_dim=64,
        caption_channels=20, mlp_ratio=2.0, sample_size=16, patch_size=1,
    )  # fmt: skip


def _sana_inputs(batch: int, odd: bool, mask: bool) -> Inputs:
    """A patch is one pixel. Mask: (batch, text) int64."""
    rows, columns = patch_grid(odd)
    return {
        "hidden_states": randn(1, batch, 4, rows, columns),
        "encoder_hidden_states": randn(2, batch, text_length(odd), 20),
        "timestep": timesteps(batch),
        "controlnet_cond": randn(3, batch, 4, rows, columns),
        "conditioning_scale": 0.5,
        "encoder_attention_mask": padding_mask(batch, text_length(odd), torch.int64) if mask else None,
    }


def _z_image(refine: str | None) -> nn.Module:
    """With the modules it shares with its transformer. Refine: which blocks make residuals for the image's refiner.

    None: plain blocks refine the condition instead; "control_layers": the same blocks as for the joint sequence.
    """
    from diffusers import ZImageControlNetModel, ZImageTransformer2DModel

    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=64, n_layers=3, n_refiner_layers=2, n_heads=4, n_kv_heads=4, cap_feat_dim=20,
        axes_dims=(4, 6, 6), axes_lens=(128, 32, 32),
    )  # fmt: skip
    controlnet = ZImageControlNetModel(
        control_layers_places=[0, 1, 2], control_refiner_layers_places=[0, 1] if refine else None,
        control_in_dim=5, add_control_noise_refiner=refine, dim=64, n_refiner_layers=2, n_heads=4, n_kv_heads=4,
    )  # fmt: skip
    return ZImageControlNetModel.from_transformer(controlnet, transformer)


def _z_image_inputs(batch: int, odd: bool) -> Inputs:
    """Lists of images (channels, 1 frame, height, width) and of captions, each caption 3 tokens shorter.

    The class fills both up to multiples of 32 tokens.
    """
    rows, columns = patch_grid(odd)
    return {
        "x": list(randn(1, batch, 4, 1, 2 * rows, 2 * columns)),
        "t": timesteps(batch) / 1000,
        "cap_feats": [randn(2 + i, text_length(odd) - 3 * i, 20) for i in range(batch)],
        "control_context": randn(9, batch, 5, 1, 2 * rows, 2 * columns),
        "conditioning_scale": 0.5,
    }


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("cosmos_net", partial(_cosmos, False, False), _cosmos_inputs, 4),
        Case("cosmos_net_image", partial(_cosmos, True, False), partial(_cosmos_inputs, image=True), 4),
        Case("cosmos_net_learned", partial(_cosmos, False, True), partial(_cosmos_inputs, frames=False), 4),
        Case("flux_net", _flux, _flux_inputs, 4),
        Case(
            "flux_net_union", partial(_flux, 4, guidance=True), partial(_flux_inputs, union=True, guidance=True), 4
        ),
        Case("flux_net_picture", partial(_flux, picture=True), partial(_flux_inputs, picture=True), 4),
        Case("flux_nets", partial(_flux_many, None), _flux_many_inputs, 4),
        Case("flux_nets_union", partial(_flux_many, 4), _flux_many_inputs, 4),
        Case("hunyuan_dit_net", partial(_hunyuan_dit, False), partial(_hunyuan_dit_inputs, style=False), 4),
        Case("hunyuan_dit_net_style", partial(_hunyuan_dit, True), partial(_hunyuan_dit_inputs, style=True), 4),
        Case(
            "hunyuan_dit_nets",
            _hunyuan_dit_many,
            partial(_two_images, inputs=partial(_hunyuan_dit_inputs, style=False)),
            4,
        ),
        Case("sd3_net", _sd3, _sd3_inputs, 4),
        Case("sd3_net_inpaint", partial(_sd3, 1), partial(_sd3_inputs, extra=1), 4),
        Case("sd3_net_large", _sd3_large, _sd3_large_inputs, 4),
        Case("sd3_nets", _sd3_many, partial(_two_images, inputs=_sd3_inputs), 4),
        Case("qwen_image_net", _qwen_image, _qwen_image_inputs, 4),
        Case("qwen_image_net_mask", _qwen_image, partial(_qwen_image_inputs, mask=True), 4),
        Case("qwen_image_net_inpaint", partial(_qwen_image, 4), partial(_qwen_image_inputs, extra=4), 4),
        Case("qwen_image_nets", _qwen_image_many, _qwen_image_many_inputs, 4),
        Case("sana_net", _sana, partial(_sana_inputs, mask=True), 4),
        Case("sana_net_nomask", _sana, partial(_sana_inputs, mask=False), 4),
        Case("z_image_net", partial(_z_image, None), _z_image_inputs, 4),
        Case("z_image_net_layers", partial(_z_image, "control_layers"), _z_image_inputs, 4),
        Case("z_image_net_refiner", partial(_z_image, "control_noise_refiner"), _z_image_inputs, 4),
    )
}
