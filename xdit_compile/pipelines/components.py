"""What the modules of a pipeline are there for, told from how they are called."""

from __future__ import annotations

import inspect
from enum import Enum

from torch import nn

from xdit_compile.ir.step_inputs import TIMES


class Role(Enum):
    """Why a pipeline has a module."""

    DENOISER = "runs at each step"  # transformers, UNets, and what feeds them: ControlNets, adapters
    AUTOENCODER = "to latents and back"
    ENCODER = "turns conditions into embeddings"


def role_of(module: nn.Module) -> Role:
    """A denoiser takes a time; an autoencoder encodes and decodes; all else encodes conditions."""
    module = getattr(module, "_orig_mod", module)  # inside of a wrapper of torch.compile
    if TIMES & inspect.signature(module.forward).parameters.keys():
        return Role.DENOISER
    if all(callable(getattr(module, name, None)) for name in ("encode", "decode")):
        return Role.AUTOENCODER
    return Role.ENCODER
