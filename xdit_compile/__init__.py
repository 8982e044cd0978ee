"""xdit_compile: a compiler that runs any Diffusion Transformer on many devices, with the answer of one."""

from xdit_compile import log
from xdit_compile.api import capture, parallelize
from xdit_compile.artifact.export import export
from xdit_compile.artifact.inspection import inspect
from xdit_compile.artifact.load import load
from xdit_compile.decorator import parallel
from xdit_compile.diagnostics.approximation import verify_approximate
from xdit_compile.diagnostics.explain import explain
from xdit_compile.diagnostics.timeline import timeline
from xdit_compile.diagnostics.verify import verify
from xdit_compile.engine.handle import Engine, start
from xdit_compile.errors import (
    ArgumentError,
    ArtifactError,
    CaptureError,
    LaunchError,
    PlanError,
    RankFailure,
    RankMismatch,
    SpecError,
    XditError,
)
from xdit_compile.runtime.launch import init_from_env, launch
from xdit_compile.spec import ShardingSpec

__version__ = "0.2.0"

log.configure()

__all__ = [
    "ArgumentError",
    "ArtifactError",
    "CaptureError",
    "Engine",
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
    "start",
    "timeline",
    "verify",
    "verify_approximate",
]
