"""xdit_compile: a compiler that runs any Diffusion Transformer on many devices, with the answer of one."""

from xdit_compile.api import capture, parallelize
from xdit_compile.artifact.export import export
from xdit_compile.artifact.inspect import inspect
from xdit_compile.artifact.load import load
from xdit_compile.decorator import parallel
from xdit_compile.errors import (
    ArtifactError,
    CaptureError,
    LaunchError,
    PlanError,
    RankFailure,
    RankMismatch,
    SpecError,
    XditError,
)
from xdit_compile.explain import explain
from xdit_compile.launch import init_from_env, launch
from xdit_compile.spec import ShardingSpec
from xdit_compile.timeline import timeline
from xdit_compile.verify import verify

__all__ = [
    "ArtifactError",
    "CaptureError",
    "LaunchError",
    "PlanError",
    "RankFailure",
    "RankMismatch",
    "ShardingSpec",
    "SpecError",
    "XditError",
    "capture",
    "explain",
    "export",
    "init_from_env",
    "inspect",
    "launch",
    "load",
    "parallel",
    "parallelize",
    "timeline",
    "verify",
]
