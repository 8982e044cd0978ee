"""A diffusion model of ComfyUI's that is elsewhere: here are its class and its shapes, its weights are in the ranks."""

from __future__ import annotations

import inspect
import logging
import sys
import weakref
from collections.abc import Mapping
from concurrent.futures import TimeoutError as NotYet
from pathlib import Path
from typing import Any
from unittest.mock import patch

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import folder_paths
import torch
from torch import nn

import xdit_compile

from .ranks.xdit_patches import Sent, Unsendable, packed

LORAS = "xdit_loras"
"""Attachment of a model: (path, strength) of each LoRA, in the order of the nodes."""
RANKS = Path(__file__).with_name("ranks")
"""What ranks import. No package: this one imports ComfyUI, which ranks may only once they have its command line."""
HERE = ("wrappers", "callbacks")
"""Options that ComfyUI's own code reads around the model, in this process."""


class RemotePatcher(comfy.model_patcher.ModelPatcher):
    """ComfyUI's handle on a model; there are no weights here to move or to change."""

    def load(self, device_to: Any = None, lowvram_model_memory: int = 0, force_patch_weights: bool = False,
             full_load: bool = False) -> None:
        self.model.device = device_to
        self.model.model_loaded_weight_memory = self.size
        self.model.current_weight_patches_uuid = self.patches_uuid
        for callback in self.get_all_callbacks(comfy.model_patcher.CallbacksMP.ON_LOAD):
            callback(self, device_to, lowvram_model_memory, force_patch_weights, full_load)

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
        super().unpatch_model(None, unpatch_weights)

    def partially_unload(self, device_to: Any, memory_to_free: int = 0) -> int:
        return 0

    def add_patches(self, patches: Mapping[Any, Any], *args: Any, **kwargs: Any) -> Any:
        raise ValueError("the weights of this model are in other processes, where patches of weights do not reach: use "
                         "the node 'Load LoRA (xDiT)' for a LoRA; merges of models want ComfyUI's own loader")

    def add_weight_wrapper(self, name: str, function: Any) -> None:
        self.add_patches({})

    def add_hook_patches(self, *args: Any, **kwargs: Any) -> Any:
        self.add_patches({})

    def add_object_patch(self, name: str, obj: Any) -> None:
        if name.startswith("diffusion_model") or name == "manual_cast_dtype":
            raise ValueError(f"{name} is in other processes and cannot be replaced by {obj!r} here: use ComfyUI's own "
                             "loader for this model")
        super().add_object_patch(name, obj)


class RemoteModel:
    """What takes the place of a diffusion model's forward: it runs on all ranks of an engine."""

    def __init__(self, engine: xdit_compile.Engine, model: comfy.model_base.BaseModel) -> None:
        self._engine, self._model = engine, weakref.ref(model)
        self._name = type(model.diffusion_model).__name__
        self._signature = inspect.signature(_method(model.diffusion_model))
        self._sent = Sent()

    def check(self, options: Mapping[str, Any]) -> None:
        """Whether patches can be sent.

        Raises:
            Unsendable: naming the one that cannot, and where it is.
        """
        packed({k: v for k, v in options.items() if k not in HERE})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self._signature.bind(*args, **kwargs)
        given = dict(bound.arguments)
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= given.pop(name, {})
        options = given.pop("transformer_options", None)
        options = {k: v for k, v in (options or {}).items() if k not in HERE}
        model = self._model()
        patcher = None if model is None else model.current_patcher
        loras = [] if patcher is None else [[p, s, _state(p)] for p, s in patcher.get_attachment(LORAS) or ()]
        device = next(v.device for v in given.values() if isinstance(v, torch.Tensor))
        try:
            again = False
            while True:
                # A call draws a seed, and samplers may draw from the same numbers.
                with torch.random.fork_rng(devices=[]):
                    call = self._engine.submit(arguments=packed(given), loras=loras,
                                               options=self._sent.message(options, again))
                found = self._waited(call)
                if found["result"] is not None or again:
                    return _moved(found["result"], device)
                again = True  # the ranks were started anew, and have no patches yet
        except Unsendable:
            raise
        except xdit_compile.XditError as error:
            raise RuntimeError(f"{self._name} on {self._engine}: {error}") from error

    def _waited(self, call: Any) -> Any:
        while True:
            try:
                return call.result(timeout=0.5)
            except NotYet:
                if call.done():
                    raise
                try:
                    comfy.model_management.throw_exception_if_processing_interrupted()
                except BaseException:
                    call.cancel()
                    raise


def load(path: str, model_options: dict[str, Any], spec: str) -> RemotePatcher:
    """A model file, as ComfyUI would load it, in one process for each rank of ``spec``."""
    def outside(model: comfy.model_base.BaseModel, state: dict[str, Any], unet_prefix: str = "") -> Any:
        # What is in no block is small, and ControlNets read it here. Tensors of a file are read when they are used.
        found = model.model_config.process_unet_state_dict(dict(state))
        model.diffusion_model.load_state_dict({k: v for k, v in found.items() if not _in_block(k)}, strict=False)
        state.clear()
        return model

    # ComfyUI makes layers of memory that nobody has touched yet, which costs nothing.
    with patch.object(comfy.model_base.BaseModel, "load_model_weights", outside):
        found = comfy.sd.load_diffusion_model(path, model_options=model_options)
    model = found.model
    for name, module in model.diffusion_model.named_modules():
        if _in_block(name):
            module.to("meta")
    # What type weights have may depend on free memory: it is decided here alone.
    arguments = {"path": str(path), "options": {**model_options, "dtype": model.get_dtype()}, "argv": sys.argv[1:],
                 "comfyui": str(Path(comfy.sd.__file__).parents[1]),
                 "nodes": folder_paths.get_folder_paths("custom_nodes")}
    device = "cpu" if comfy.model_management.get_torch_device().type == "cpu" else None
    engine = xdit_compile.start(f"{RANKS / 'xdit_worker.py'}:make", spec, device=device,
                                arguments=arguments)
    logging.info("%s runs on %s", type(model.diffusion_model).__name__, engine)
    remote = RemoteModel(engine, model)
    # ComfyUI's wrappers around the model run here, where the class's own forward calls them.
    setattr(model.diffusion_model, _method(model.diffusion_model).__name__, remote)
    return RemotePatcher(model, found.load_device, found.offload_device, size=1)


def remote_of(patcher: Any) -> RemoteModel:
    """The remote model of a MODEL.

    Raises:
        ValueError: it was loaded by another node.
    """
    if not isinstance(patcher, RemotePatcher):
        raise ValueError("this node is for a model of 'Load Diffusion Model (xDiT)'; of another loader's take "
                         "ComfyUI's own node")
    own = patcher.model.diffusion_model
    return vars(own)[_method(own).__name__]


def _method(model: nn.Module) -> Any:
    """What computes: ``_forward`` where ``forward`` only calls wrappers around that."""
    return getattr(type(model), "_forward", type(model).forward).__get__(model)


def _in_block(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def _state(path: str) -> list[int]:
    found = Path(path).stat()
    return [found.st_mtime_ns, found.st_size]


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return type(value)(_moved(v, device) for v in value) if isinstance(value, (list, tuple)) else value
