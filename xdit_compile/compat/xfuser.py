"""What scripts for xDiT import from ``xfuser``: with this module in its place they run as they are.

    from xdit_compile.compat.xfuser import FlexibleArgumentParser, get_world_group, xDiTParallel, xFuserArgs

Flags that ask for what is not built are refused by name (``docs/from-xdit.md``). Whatever the pipeline is, the compiler
runs it: there are no classes for single models.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from xdit_compile.api import parallelize
from xdit_compile.cli import run_flags as flags
from xdit_compile.cli.flag_parser import FlagParser
from xdit_compile.errors import SpecError, did_you_mean
from xdit_compile.pipelines.output_files import save
from xdit_compile.runtime.launch import init_from_env
from xdit_compile.spec import ShardingSpec

DEFAULTS: Mapping[str, Any] = {
    "height": 1024, "width": 1024, "num_frames": 49, "num_inference_steps": 20, "max_sequence_length": 256,
    "guidance_scale": 3.5, "output_type": "pil", "prompt": "", "negative_prompt": "",
}
"""What xDiT takes for arguments of the pipeline's call that were not given; scripts pass them on."""


class FlexibleArgumentParser(FlagParser):
    """An argument parser for which dashes and underscores in names of flags mean the same."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        return super().parse_known_args(flags.spelled(sys.argv[1:] if args is None else args), namespace)


@dataclass(frozen=True)
class EngineConfig:
    """How a pipeline is to run.

    Attributes:
        model_config: ``model``, ``download_dir``, ``trust_remote_code``.
        runtime_config: what else was asked for, by the flags' names.
        parallel_config: degrees, by xDiT's names.
        spec: the same as this package says it.
    """

    model_config: SimpleNamespace
    runtime_config: SimpleNamespace
    parallel_config: SimpleNamespace
    spec: ShardingSpec


class xFuserArgs:
    """Everything that xDiT's flags say, as attributes of their names.

    Args:
        given: values by the names of flags; others have their defaults.

    Raises:
        SpecError: there is no such flag.
    """

    def __init__(self, **given: Any) -> None:
        parser = xFuserArgs.add_cli_args(FlexibleArgumentParser(add_help=False))
        made = vars(parser.parse_args(["--model", str(given.get("model", ""))]))
        for name in given.keys() - made.keys():
            raise SpecError(f"xFuserArgs has no {name}{did_you_mean(name, made)}")
        self.__dict__.update(made | {name: _as_parsed(name, value) for name, value in given.items()})

    @staticmethod
    def add_cli_args(parser: Any) -> Any:
        """Add all flags to ``parser``, and give it back."""
        flags.add_arguments(parser)
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> xFuserArgs:
        """What a parser read that has the flags of ``add_cli_args``."""
        made = cls.__new__(cls)
        made.__dict__.update(vars(args))
        return made

    def create_config(self) -> tuple[EngineConfig, SimpleNamespace]:
        """How the pipeline is to run, and the arguments of its call. Joins the job that torchrun started.

        Raises:
            XditError: a flag asks for what is not there, or two contradict each other.
        """
        options = argparse.Namespace(**vars(self))
        spec = flags.request(options).spec
        if not isinstance(spec, ShardingSpec):
            raise SpecError("an xFuserArgs has degrees, which auto would choose later; give the spec to parallelize()")
        if not dist.is_initialized() and "RANK" in os.environ:
            init_from_env(self.__dict__.get("device"))
        spec.check_world(dist.get_world_size() if dist.is_initialized() else 1)
        call = {name: self.__dict__[name] if self.__dict__[name] not in (None, []) else default
                for name, default in DEFAULTS.items()}
        prompts = call["prompt"]
        images = self.__dict__["image"]
        inputs = SimpleNamespace(
            **call, seed=self.__dict__["seed"], use_resolution_binning=not self.__dict__["no_use_resolution_binning"],
            batch_size=len(prompts) if isinstance(prompts, list) else 1,
            img_file_path=images[0] if images else None)
        given = {n: v for n, v in vars(self).items() if n not in inputs.__dict__}
        return EngineConfig(
            SimpleNamespace(**{n: given[n] for n in ("model", "download_dir", "trust_remote_code")}),
            SimpleNamespace(**given), _degrees(spec), spec), inputs


class xDiTParallel:
    """A pipeline of diffusers that runs in parallel: called as the pipeline is, with its attributes.

    Args:
        pipe: any pipeline of diffusers, as it was loaded.
        engine_config: of ``xFuserArgs.create_config``.
        input_config: not needed; taken because xDiT takes it.
    """

    def __init__(self, pipe: Any, engine_config: EngineConfig, input_config: Any = None) -> None:
        for method in ("enable_tiling", "enable_slicing"):
            if getattr(engine_config.runtime_config, method):
                getattr(pipe.vae, method)()
        self.pipe = parallelize(pipe, engine_config.spec)
        self._result: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._result = self.pipe(*args, **kwargs)
        return self._result

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["pipe"], name)

    def save(self, directory: str | Path, prefix: str) -> list[Path]:
        """Write what the last call made into ``directory``, with names that begin with ``prefix``; rank 0 does."""
        if get_world_group().rank != 0:
            return []
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        files, _ = save(self._result, folder, 8)
        return [file.rename(folder / f"{prefix}_{file.name}") for file in files]


@dataclass(frozen=True)
class WorldGroup:
    """The ranks of the job, as this one sees them."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def rank_in_group(self) -> int:
        return self.rank

    @property
    def is_first_rank(self) -> bool:
        return self.rank == 0

    @property
    def is_last_rank(self) -> bool:
        return self.rank == self.world_size - 1

    @staticmethod
    def barrier() -> None:
        """Wait for all ranks."""
        if dist.is_initialized():
            dist.barrier()


def get_world_group() -> WorldGroup:
    """The job that torchrun started this process for; one rank alone without torchrun."""
    if not dist.is_initialized() and "RANK" not in os.environ:
        return WorldGroup(0, 0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    device = init_from_env("cpu" if dist.is_initialized() and dist.get_backend() == "gloo" else None)
    rank = dist.get_rank()
    return WorldGroup(rank, int(os.environ.get("LOCAL_RANK", rank)), dist.get_world_size(), device)


def _as_parsed(name: str, value: Any) -> Any:
    """A value given by name as a parser would have read it."""
    if name in flags.VALUES and value is not None:
        return [str(value)]
    several = name in ("prompt", "negative_prompt")
    return [value] if several and isinstance(value, str) else list(value) if several and isinstance(
        value, Sequence) else value


def _degrees(spec: ShardingSpec) -> SimpleNamespace:
    return SimpleNamespace(
        world_size=spec.world_size, dit_parallel_size=spec.world_size, vae_parallel_size=0, dp_degree=spec.data_degree,
        cfg_degree=spec.cfg_degree, sp_degree=spec.sequence_degree, ulysses_degree=spec.ulysses_degree,
        ring_degree=spec.ring_degree, tp_degree=spec.tensor_degree, pp_degree=spec.pipefusion_degree,
        num_pipeline_patch=spec.patches)
