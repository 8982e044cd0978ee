"""The nodes: a loader, a loader of LoRAs, and a sampler, in the place of ComfyUI's own.

The sampling loop stays in ComfyUI, with its samplers, schedulers, guidance, ControlNets and areas; the diffusion model
alone runs elsewhere, on all ranks of an engine (`xdit_remote`).
"""

from __future__ import annotations

from typing import Any

import folder_paths
import torch
from comfy_extras.nodes_custom_sampler import SamplerCustomAdvanced
from nodes import UNETLoader

from .xdit_remote import LORAS, RemotePatcher, load, remote_of

CATEGORY = "xdit_compile"


class LoadDiffusionModel:
    """"Load Diffusion Model", with a spec that says how devices share the work."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        own = UNETLoader.INPUT_TYPES()["required"]
        return {"required": {**own, "spec": ("STRING", {
            "default": "ulysses=2", "tooltip": "As of xdit_compile: ulysses=2,ring=2; cfg=2; tensor=2; pipefusion=4"})}}

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"
    CATEGORY = CATEGORY
    DESCRIPTION = "Loads a diffusion model into one process per device, which share its work as the spec says."

    def load(self, unet_name: str, weight_dtype: str, spec: str) -> tuple[RemotePatcher]:
        path = folder_paths.get_full_path_or_raise("diffusion_models", unet_name)
        return (load(path, _model_options(weight_dtype), spec.strip()),)


class LoadLora:
    """"LoraLoaderModelOnly" for a model that is in other processes: they read the file themselves."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {
            "model": ("MODEL",), "lora_name": (folder_paths.get_filename_list("loras"),),
            "strength_model": ("FLOAT", {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01})}}

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"
    CATEGORY = CATEGORY
    DESCRIPTION = "Adds a LoRA to a model of 'Load Diffusion Model (xDiT)'; several may follow each other."

    def load(self, model: RemotePatcher, lora_name: str, strength_model: float) -> tuple[RemotePatcher]:
        remote_of(model)
        changed = model.clone()
        path = folder_paths.get_full_path_or_raise("loras", lora_name)
        changed.set_attachments(LORAS, (*(model.get_attachment(LORAS) or ()), (path, float(strength_model))))
        return (changed,)


class Sampler(SamplerCustomAdvanced):
    """"SamplerCustomAdvanced", which first says what of the model cannot be sent to the ranks."""

    CATEGORY = CATEGORY
    DESCRIPTION = "SamplerCustomAdvanced for a model of 'Load Diffusion Model (xDiT)': checks its patches beforehand."

    def sample(self, noise: Any, guider: Any, sampler: Any, sigmas: Any, latent_image: Any) -> Any:
        remote = remote_of(guider.model_patcher)
        remote.check(guider.model_options.get("transformer_options", {}))
        return super().sample(noise, guider, sampler, sigmas, latent_image)


def _model_options(weight_dtype: str) -> dict[str, Any]:
    if weight_dtype == "default":
        return {}
    fast = weight_dtype.endswith("_fast")
    options: dict[str, Any] = {"dtype": getattr(torch, "float8_" + weight_dtype.split("_", 1)[1].removesuffix("_fast"))}
    return options | ({"fp8_optimizations": True} if fast else {})


NODE_CLASS_MAPPINGS = {"XDiTLoadDiffusionModel": LoadDiffusionModel, "XDiTLoadLora": LoadLora, "XDiTSampler": Sampler}
NODE_DISPLAY_NAME_MAPPINGS = {"XDiTLoadDiffusionModel": "Load Diffusion Model (xDiT)",
                              "XDiTLoadLora": "Load LoRA (xDiT)", "XDiTSampler": "SamplerCustomAdvanced (xDiT)"}
