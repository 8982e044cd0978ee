"""Custom nodes for the tests of ComfyUI: text without a text encoder, and patches as node packages make them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Text:
    """What a text encoder would give, drawn from a seed."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"seed": ("INT",), "tokens": ("INT",), "width": ("INT",), "pooled": ("INT",)}}

    def make(self, seed: int, tokens: int, width: int, pooled: int) -> Any:
        drawn = torch.Generator().manual_seed(seed)
        return ([[torch.randn(1, tokens, width, generator=drawn),
                  {"pooled_output": torch.randn(1, pooled, generator=drawn)}]],)


class Adapter(nn.Module):
    """Lets the picture's tokens of a block attend to those of another picture: an IP-Adapter."""

    def __init__(self, width: int, strength: float) -> None:
        super().__init__()
        drawn = torch.Generator().manual_seed(7)
        self.strength, self.scale = strength, width**-0.5
        self.keys = nn.Linear(16, width, bias=False)
        self.keys.weight = nn.Parameter(torch.randn(width, 16, generator=drawn), requires_grad=False)
        self.tokens = torch.randn(1, 4, 16, generator=drawn)

    def forward(self, args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        image = args["img"]
        out = extra["original_block"](args)
        found = self.keys(self.tokens.to(image))
        weights = torch.softmax(image @ found.transpose(1, 2) * self.scale, dim=-1)
        return {**out, "img": out["img"] + self.strength * (weights @ found)}


class ApplyAdapter:
    """Sets the adapter, as an object or as a function made on the spot."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "width": ("INT",), "strength": ("FLOAT",), "closure": ("BOOLEAN",)}}

    def apply(self, model: Any, width: int, strength: float, closure: bool) -> Any:
        changed, adapter = model.clone(), Adapter(width, strength)

        def on_the_spot(args: Any, extra: Any) -> Any:
            return adapter(args, extra)

        changed.set_model_patch_replace(on_the_spot if closure else adapter, "dit", "double_block", 0)
        return (changed,)


NODE_CLASS_MAPPINGS = {"TestText": Text, "TestAdapter": ApplyAdapter}
