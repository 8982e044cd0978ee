"""Every test model: the transformers and control nets of diffusers in all their modes, and research styles.

A case whose name continues another's (``flux2_edit`` after ``flux2``) is a mode of the same class.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import ModuleType

import models
import research
import zoo_controls
import zoo_images
import zoo_images_more
import zoo_others
import zoo_videos
import zoo_videos_more
from cases import Case, basic
from torch import nn

MODULES = (models, research, zoo_controls, zoo_images, zoo_images_more, zoo_others, zoo_videos, zoo_videos_more)

CASES: dict[str, Case] = {name: case for module in MODULES for name, case in module.CASES.items()}

BASIC = basic(CASES)
"""One case of each class, or few."""


def library_classes() -> Iterator[str]:
    """The transformers of the installed diffusers, and the control nets that are transformers themselves."""
    import diffusers.models.controlnets as controls
    import diffusers.models.transformers as transformers

    def modules(package: ModuleType) -> dict[str, type]:
        return {n: c for n, c in vars(package).items() if inspect.isclass(c) and issubclass(c, nn.Module)}

    yield from modules(transformers)
    # Convolutional ones belong to UNets; several side by side have no file of their own kind.
    unets = ("controlnet", "controlnet_union", "controlnet_xs", "controlnet_sparsectrl", "multicontrolnet",
             "multicontrolnet_union")  # fmt: skip
    yield from (n for n, c in modules(controls).items() if c.__module__.rpartition(".")[2] not in unets)
