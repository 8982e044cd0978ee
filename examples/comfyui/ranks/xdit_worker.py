"""What a rank does: it loads the model file as ComfyUI does, and parallelizes the diffusion model in it.

Not imported by ComfyUI: ranks are told this file's name. Whoever imports ComfyUI's modules decides by the command line
what device they use and how they attend; ranks decide as ComfyUI's own process did.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any
from unittest.mock import patch

import torch
from xdit_patches import Reader

import xdit_compile

MODULES = ("comfy", "comfy_extras", "torch.nn", "collections")
"""Packages whose classes and functions patches may name, beside custom nodes."""


class Rank:
    """One rank's model, with the LoRAs and patches of the call."""

    def __init__(self, patcher: Any, spec: str, reader: Reader) -> None:
        self._patcher, self._loaded, self._loras = patcher, patcher, [[]]
        self._read, self._fixed = reader, (0, {})
        self._device = patcher.load_device
        self._load([])
        self._model = xdit_compile.parallelize(patcher.model.diffusion_model.eval(), spec)

    def __call__(self, arguments: dict[str, Any], options: dict[str, Any], loras: list[Any]) -> dict[str, Any]:
        """One forward; its result, or none where the patches that it was called with are not here.

        Args:
            arguments: by name, packed; options: of the transformer, as `Sent.message` has them; loras: path, strength
                and time of each.
        """
        if options["number"] and options["fixed"] is not None:
            self._fixed = options["number"], self._read(options["fixed"], self._device)
        if options["number"] and options["number"] != self._fixed[0]:
            return {"result": None}
        if loras != self._loras:
            self._load(loras)
        fixed = self._fixed[1] if options["number"] else {}
        given = self._read(arguments, self._device)
        given["transformer_options"] = {**self._read(options["step"], self._device), **fixed}
        return {"result": self._model(**given)}

    def _load(self, loras: list[Any]) -> None:
        """Weights with these LoRAs, computed by ComfyUI from those of the file."""
        utils, sd = importlib.import_module("comfy.utils"), importlib.import_module("comfy.sd")
        self._loaded.unpatch_model()
        self._loras, changed = [], self._patcher
        for path, strength, _ in loras:
            state = utils.load_torch_file(path, safe_load=True)
            changed, _ = sd.load_lora_for_models(changed, None, state, strength, 0)
        changed.patch_model(self._device)
        self._loaded, self._loras = changed, loras


def make(spec: str, path: str, options: dict[str, Any], argv: list[str], comfyui: str, nodes: list[str]) -> Rank:
    """The model of a file, as `UNETLoader` would load it."""
    if comfyui not in sys.path:
        sys.path.insert(0, comfyui)
    importlib.import_module("comfy.options").enable_args_parsing()
    with patch.object(sys, "argv", ["main.py", *argv]):
        importlib.import_module("comfy.cli_args")
    sd = importlib.import_module("comfy.sd")
    with torch.no_grad():
        return Rank(sd.load_diffusion_model(path, model_options=options), spec, Reader(MODULES, nodes))
