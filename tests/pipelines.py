"""Every test pipeline: built once into a folder, loaded from there as a published one is, and run.

``folder`` writes it, ``load`` reads it, ``run`` calls it and gives the latents (or the pixels, where there is no other
way), the same each time for a seed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pipelines_images
import pipelines_modes
import pipelines_videos
import torch
from pipelines_parts import PipelineCase, made
from torch import Tensor

PIPELINES: dict[str, PipelineCase] = pipelines_images.CASES | pipelines_videos.CASES | pipelines_modes.CASES


def folder(name: str, root: Path) -> Path:
    """The folder of a pipeline under ``root``, written if it is not there: whole or not at all."""
    path = Path(root) / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = tempfile.mkdtemp(prefix=f".{name}-", dir=path.parent)
        made(PIPELINES[name]).save_pretrained(draft)
        try:
            os.rename(draft, path)
        except OSError:  # another process was faster
            shutil.rmtree(draft)
    return path


def load(path: Path) -> Any:
    """The pipeline in a folder which ``folder`` wrote."""
    import transformers
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    pipe = DiffusionPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    for name, value in PIPELINES[Path(path).name].attributes.items():
        setattr(pipe, name, value)
    return pipe


def run(pipe: Any, case: PipelineCase, seed: int = 0, **overrides: Any) -> Tensor:
    """What a call gives, with noise from ``seed``; some pipelines encode a picture with torch's own generator."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    result = pipe(**(case.call() | overrides), generator=generator, return_dict=False)[0]
    return torch.as_tensor(result)
