"""ComfyUI's own model classes in tiny configurations, with the arguments that ComfyUI's sampling gives them.

Imports a checkout of ComfyUI (``XDIT_COMPILE_COMFYUI``, the path to it) when a case is built, not before.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from cases import Case, Inputs, frame_count, padding_mask, patch_grid, randn, text_length
from torch import nn

HEADS, HEAD_DIM = 4, 32
WIDTH = HEADS * HEAD_DIM


def checkout() -> Path | None:
    """Where ComfyUI is, if anyone said so."""
    path = os.environ.get("XDIT_COMPILE_COMFYUI")
    return Path(path) if path else None


def comfy(module: str) -> Any:
    """A module of ComfyUI's, which reads its command line at its first import: here that of a machine without GPU."""
    place = checkout()
    assert place is not None
    if "comfy.cli_args" not in sys.modules:
        sys.path.insert(0, str(place))
        importlib.import_module("comfy.options").enable_args_parsing()
        with patch.object(sys, "argv", ["main.py", "--cpu", "--use-pytorch-cross-attention"]):
            importlib.import_module("comfy.cli_args")
    return importlib.import_module(module)


def build(module: str, name: str, **config: Any) -> nn.Module:
    """A class of ComfyUI's with its layers, which cast weights to the type of what they are given."""
    operations = comfy("comfy.ops").manual_cast
    return getattr(comfy(f"comfy.ldm.{module}"), name)(**config, dtype=torch.float32, operations=operations)


def options(batch: int) -> dict[str, Any]:
    """What sampling tells a model at each step beside its inputs."""
    return {"cond_or_uncond": [0], "sigmas": 0.7 - 0.1 * torch.arange(batch).float(),
            "sample_sigmas": torch.linspace(1, 0, 5), "wrappers": {}, "callbacks": {}}


def image(batch: int, odd: bool, channels: int, text: int, **more: Any) -> Inputs:
    """A picture's latent in patches of two, its time, and text."""
    rows, columns = patch_grid(odd)
    return dict(x=randn(1, batch, channels, 2 * rows, 2 * columns), context=randn(2, batch, text_length(odd), text),
                transformer_options=options(batch), **more)


def video(batch: int, odd: bool, channels: int, text: int, **more: Any) -> Inputs:
    rows, columns = patch_grid(odd)
    return dict(x=randn(1, batch, channels, frame_count(odd), 2 * rows, 2 * columns),
                context=randn(2, batch, text_length(odd), text), transformer_options=options(batch), **more)


def times(batch: int) -> torch.Tensor:
    return 0.7 - 0.1 * torch.arange(batch).float()


def _flux() -> nn.Module:
    return build("flux.model", "Flux", in_channels=4, out_channels=4, vec_in_dim=16, context_in_dim=24,
                 hidden_size=WIDTH, mlp_ratio=2.0, num_heads=HEADS, depth=2, depth_single_blocks=2,
                 axes_dim=[8, 12, 12], theta=10000, patch_size=2, qkv_bias=True, guidance_embed=True)


def _flux_inputs(batch: int, odd: bool) -> Inputs:
    return image(batch, odd, 4, 24, timestep=times(batch), y=randn(3, batch, 16), guidance=torch.full((batch,), 3.5))


def _flux_kontext(batch: int, odd: bool) -> Inputs:
    return _flux_inputs(batch, odd) | {"ref_latents": [randn(5, batch, 4, 8, 6)]}


def _flux_control(batch: int, odd: bool) -> Inputs:
    rows, columns = patch_grid(odd)

    def residual(seed: int) -> torch.Tensor:
        return 0.1 * randn(seed, batch, rows * columns, WIDTH)

    return _flux_inputs(batch, odd) | {"control": {"input": [residual(5), None], "output": [residual(6)]}}


def _sd3() -> nn.Module:
    return build("modules.diffusionmodules.mmdit", "OpenAISignatureMMDITWrapper", input_size=None, in_channels=16,
                 depth=2, num_patches=1024, pos_embed_max_size=32, pos_embed_scaling_factor=None, adm_in_channels=32,
                 context_embedder_config={"target": "torch.nn.Linear", "params": {
                     "in_features": 24, "out_features": 128}}, qk_norm="rms", x_block_self_attn_layers=[0])


def _sd3_inputs(batch: int, odd: bool) -> Inputs:
    return image(batch, odd, 16, 24, timesteps=1000 * times(batch), y=randn(3, batch, 32))


def _sd3_control(batch: int, odd: bool) -> Inputs:
    rows, columns = patch_grid(odd)
    return _sd3_inputs(batch, odd) | {"control": {"output": [0.1 * randn(5, batch, rows * columns, 128)]}}


def _wan(name: str = "WanModel", **config: Any) -> nn.Module:
    return build("wan.model", name, in_dim=8, out_dim=4, dim=WIDTH, ffn_dim=96, freq_dim=32, text_dim=24,
                 num_heads=HEADS, num_layers=2, **config)


def _wan_inputs(batch: int, odd: bool) -> Inputs:
    return video(batch, odd, 8, 24, timestep=1000 * times(batch))


def _wan_i2v(batch: int, odd: bool) -> Inputs:
    return _wan_inputs(batch, odd) | {"clip_fea": randn(5, batch, 257, 1280)}


def _hunyuan_video() -> nn.Module:
    return build("hunyuan_video.model", "HunyuanVideo", in_channels=4, out_channels=4, vec_in_dim=16,
                 context_in_dim=24, hidden_size=WIDTH, mlp_ratio=2.0, num_heads=HEADS, depth=2, depth_single_blocks=2,
                 axes_dim=[8, 12, 12], theta=256, patch_size=[1, 2, 2], qkv_bias=True, guidance_embed=True,
                 byt5=False, meanflow=False)


def _hunyuan_video_inputs(batch: int, odd: bool) -> Inputs:
    return video(batch, odd, 4, 24, timestep=times(batch), y=randn(3, batch, 16), guidance=torch.full((batch,), 6.0),
                 attention_mask=padding_mask(1, text_length(odd), torch.int64))


def _lumina() -> nn.Module:
    return build("lumina.model", "NextDiT", in_channels=4, dim=WIDTH, n_layers=2, n_refiner_layers=1, n_heads=HEADS,
                 n_kv_heads=2, qk_norm=True, cap_feat_dim=24, axes_dims=[8, 12, 12], axes_lens=[64, 64, 64])


def _lumina_inputs(batch: int, odd: bool) -> Inputs:
    return image(batch, odd, 4, 24, timesteps=times(batch), num_tokens=text_length(odd))


def _aura() -> nn.Module:
    return build("aura.mmdit", "MMDiT", in_channels=4, out_channels=4, dim=WIDTH, n_layers=3, n_double_layers=1,
                 n_heads=HEADS, global_conddim=WIDTH, cond_seq_dim=24, max_seq=256)


def _aura_inputs(batch: int, odd: bool) -> Inputs:
    return image(batch, odd, 4, 24, timestep=times(batch))


def _pixart() -> nn.Module:
    return build("pixart.pixartms", "PixArtMS", input_size=16, hidden_size=WIDTH, depth=2, num_heads=HEADS,
                 caption_channels=24, micro_condition=False, model_max_length=12, pe_interpolation=1)


def _pixart_inputs(batch: int, odd: bool) -> Inputs:
    # Its positions are undefined for pictures below 256 pixels.
    return image(batch, odd, 4, 24, timesteps=1000 * times(batch)) | {"x": randn(1, batch, 4, 34, 42 if odd else 40)}


def _ltx() -> nn.Module:
    return build("lightricks.model", "LTXVModel", in_channels=8, cross_attention_dim=WIDTH, caption_channels=24,
                 attention_head_dim=HEAD_DIM, num_attention_heads=HEADS, num_layers=2)


def _ltx_inputs(batch: int, odd: bool) -> Inputs:
    return video(batch, odd, 8, 24, timestep=times(batch),
                 attention_mask=padding_mask(batch, text_length(odd), torch.int64))


def _cosmos2() -> nn.Module:
    return build("cosmos.predict2", "MiniTrainDIT", max_img_h=64, max_img_w=64, max_frames=16, in_channels=4,
                 out_channels=4, patch_spatial=2, patch_temporal=1, model_channels=WIDTH, num_blocks=2,
                 num_heads=HEADS, mlp_ratio=2.0, crossattn_emb_channels=24, pos_emb_cls="rope3d", use_adaln_lora=True,
                 adaln_lora_dim=16, concat_padding_mask=True, extra_per_block_abs_pos_emb=False)


def _cosmos2_inputs(batch: int, odd: bool) -> Inputs:
    return video(batch, odd, 4, 24, timesteps=times(batch))


def _chroma() -> nn.Module:
    return build("chroma.model", "Chroma", in_channels=16, out_channels=16, context_in_dim=24, hidden_size=WIDTH,
                 mlp_ratio=2.0, num_heads=HEADS, depth=2, depth_single_blocks=2, axes_dim=[8, 12, 12], theta=10000,
                 patch_size=2, qkv_bias=True, in_dim=64, out_dim=WIDTH, hidden_dim=64, n_layers=2)


def _chroma_inputs(batch: int, odd: bool) -> Inputs:
    return image(batch, odd, 4, 24, timestep=times(batch), guidance=torch.zeros(batch))


def _qwen_image() -> nn.Module:
    return build("qwen_image.model", "QwenImageTransformer2DModel", in_channels=16, out_channels=4, num_layers=2,
                 attention_head_dim=HEAD_DIM, num_attention_heads=HEADS, joint_attention_dim=24,
                 axes_dims_rope=(8, 12, 12))


def _qwen_image_inputs(batch: int, odd: bool) -> Inputs:
    rows, columns = patch_grid(odd)
    return image(batch, odd, 4, 24, timestep=times(batch)) | {"x": randn(1, batch, 4, 1, 2 * rows, 2 * columns)}


def _omnigen2() -> nn.Module:
    return build("omnigen.omnigen2", "OmniGen2Transformer2DModel", in_channels=4, hidden_size=WIDTH, num_layers=2,
                 num_refiner_layers=1, num_attention_heads=HEADS, num_kv_heads=2, multiple_of=32,
                 axes_dim_rope=(8, 12, 12), axes_lens=(64, 64, 64), text_feat_dim=24)


def _omnigen2_inputs(batch: int, odd: bool) -> Inputs:
    return image(batch, odd, 4, 24, timesteps=times(batch), num_tokens=text_length(odd))


def _hidream() -> nn.Module:
    return build("hidream.model", "HiDreamImageTransformer2DModel", patch_size=2, in_channels=4, out_channels=4,
                 num_layers=1, num_single_layers=1, attention_head_dim=HEAD_DIM, num_attention_heads=HEADS,
                 caption_channels=[24, 24], text_emb_dim=16, num_routed_experts=2, num_activated_experts=1,
                 axes_dims_rope=(8, 12, 12), max_resolution=(32, 32), llama_layers=[0, 1])


def _hidream_inputs(batch: int, odd: bool) -> Inputs:
    found = image(batch, odd, 4, 24, t=1000 * times(batch), y=randn(3, batch, 16))
    return found | {"encoder_hidden_states_llama3": randn(4, batch, 2, text_length(odd), 24)}


def _hunyuan3d() -> nn.Module:
    return build("hunyuan3d.model", "Hunyuan3Dv2", in_channels=8, context_in_dim=24, hidden_size=WIDTH, mlp_ratio=2.0,
                 num_heads=HEADS, depth=1, depth_single_blocks=2)


def _hunyuan3d_inputs(batch: int, odd: bool) -> Inputs:
    return image(batch, odd, 8, 24, timestep=times(batch)) | {"x": randn(1, batch, 8, 35 if odd else 24)}


CASES = {case.name: case for case in [
    Case("flux", _flux, _flux_inputs, HEADS),
    Case("flux_kontext", _flux, _flux_kontext, HEADS),
    Case("flux_control", _flux, _flux_control, HEADS),
    Case("sd3", _sd3, _sd3_inputs, 2),
    Case("sd3_control", _sd3, _sd3_control, 2),
    Case("wan", _wan, _wan_inputs, HEADS),
    Case("wan_i2v", lambda: _wan(model_type="i2v"), _wan_i2v, HEADS),
    Case("hunyuan_video", _hunyuan_video, _hunyuan_video_inputs, HEADS),
    Case("lumina", _lumina, _lumina_inputs, HEADS),
    Case("aura", _aura, _aura_inputs, HEADS),
    Case("pixart", _pixart, _pixart_inputs, HEADS),
    Case("ltx", _ltx, _ltx_inputs, HEADS),
    Case("cosmos_predict2", _cosmos2, _cosmos2_inputs, HEADS),
    Case("chroma", _chroma, _chroma_inputs, HEADS),
    Case("qwen_image", _qwen_image, _qwen_image_inputs, HEADS),
    Case("omnigen2", _omnigen2, _omnigen2_inputs, HEADS),
    Case("hidream", _hidream, _hidream_inputs, HEADS),
    Case("hunyuan3d", _hunyuan3d, _hunyuan3d_inputs, HEADS),
]}  # fmt: skip
