"""Run a pipeline in parallel and keep what it makes: what the command ``run`` does."""

from __future__ import annotations

import inspect
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from xdit_compile.api import parallelize
from xdit_compile.cli.artifact_components import named, pipeline_with
from xdit_compile.cli.run_result import Run
from xdit_compile.errors import ArgumentError, XditError
from xdit_compile.pipelines.call_signature import CallSignature, refusals_told
from xdit_compile.pipelines.loading import (
    PipelineSource,
    load,
    only_one_speaks,
    pictures,
    pipeline_class,
    pipeline_config,
)
from xdit_compile.pipelines.output_files import kept_apart, save
from xdit_compile.pipelines.report import said_of_steps
from xdit_compile.planner.auto import Auto
from xdit_compile.progress import speaks
from xdit_compile.runtime.launch import launch, place_of
from xdit_compile.runtime.parallel_group import ParallelGroup
from xdit_compile.spec import ShardingSpec

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Auto: bfloat16 on a GPU, float32 on a CPU."""
FRAME_RATE = 8
"""Of videos whose pipeline takes none."""


@dataclass(frozen=True)
class Request:
    """What a user wants made.

    Attributes:
        arguments: of the pipeline's call, given by the user; one that the pipeline does not have is an error.
        habits: further arguments, for those pipelines that have them.
        pictures: files or addresses of pictures, by the argument of the call they are for.
        offload: keep each component on the CPU until it is called.
        warmup_calls: whole calls before the one that is timed and kept.
        frame_rate: frames a second of a video that is written.
        overwrite: whether results of an earlier run may be replaced.
        artifacts: exported models in the places of components, by their names; of one the name may be empty.
    """

    source: PipelineSource
    spec: ShardingSpec | Auto
    output: Path
    arguments: Mapping[str, Any] = field(default_factory=dict)
    habits: Mapping[str, Any] = field(default_factory=dict)
    pictures: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    seed: int = 42
    dtype: str = "auto"
    device: str | None = None
    offload: bool = False
    warmup_calls: int = 0
    frame_rate: int | None = None
    overwrite: bool = False
    artifacts: Mapping[str, str] = field(default_factory=dict)


def run(request: Request) -> Run:
    """Carry out a request: in the job that this process is a rank of, or in processes of its own.

    Raises:
        XditError: what was asked cannot be done, which is mostly found before a process starts or a weight is read.
    """
    world = request.spec.world_size
    if "RANK" in os.environ or world == 1:
        return run_rank(request)
    check(request)
    threads = max(1, torch.get_num_threads() // world)
    return launch(run_rank, request, world_size=world, device=request.device, threads=threads)[0]


def run_rank(request: Request) -> Run:
    """What one rank does. All have the same request; rank 0 writes the files."""
    check(request)
    place = place_of(request.spec.world_size, request.device)
    first = speaks()
    only_one_speaks(first)
    started = time.perf_counter()
    with _told() as notes:
        parallel, group = _loaded(request, place)
        parallel.set_progress_bar_config(disable=None if first else True)
        load_seconds = time.perf_counter() - started
        arguments = agreed(type(parallel), request) | {n: pictures(f) for n, f in request.pictures.items()}
        if request.offload:
            parallel.enable_model_cpu_offload(gpu_id=place.index)
        for _ in range(request.warmup_calls):
            call(parallel, arguments, request.seed)
        if place.type == "cuda":
            torch.cuda.reset_peak_memory_stats(place)
        started = time.perf_counter()
        result = call(parallel, arguments, request.seed)
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        seconds = time.perf_counter() - started
        peaks = group.gather("the peaks of memory", torch.cuda.max_memory_allocated(place)) if (
            place.type == "cuda") else ()
        if group.spec.approximate:
            notes.append(f"the result is approximate, as {group.spec.approximate} asks for" + (
                f": {said_of_steps(group.counts['skipped'], group.counts['decided'])}"
                if group.counts["decided"] else ""))
        files: list[Path] = []
        if first:
            rate = request.frame_rate or int(_value(parallel, arguments, "frame_rate") or FRAME_RATE)
            files, others = save(result, request.output, rate)
            notes += others
            if request.frame_rate and not any(f.suffix in (".gif", ".mp4") for f in files):
                notes.append("--fps had no effect: no video was made")
    return Run(
        request.source.model, type(parallel).__name__, group.spec, place.type, _dtype_name(request, place),
        load_seconds, seconds, _steps(parallel, arguments), request.warmup_calls, tuple(peaks), tuple(map(str, files)),
        tuple(dict.fromkeys(notes)))


def _loaded(request: Request, place: torch.device) -> tuple[Any, ParallelGroup]:
    """The parallel pipeline, and who runs it."""
    dtype = getattr(torch, _dtype_name(request, place))
    if request.artifacts and isinstance(request.spec, ShardingSpec):
        artifacts = named(request.artifacts, pipeline_config(request.source), request.source.model)
        without = {**request.source.further, **dict.fromkeys(artifacts)}
        pipe = load(replace(request.source, further=without), dtype).to(place)
        return pipeline_with(pipe, artifacts, request.source.model, request.spec, place)
    pipe = load(request.source, dtype)
    parallel = parallelize(pipe if request.offload else pipe.to(place), request.spec)
    return parallel, parallel.parallel_group


def check(request: Request) -> None:
    """Find what is wrong with a request without processes and without weights.

    Raises:
        XditError: saying what.
    """
    request.spec.check_world(int(os.environ.get("WORLD_SIZE", request.spec.world_size)))
    cls = pipeline_class(request.source)
    if cls is not None:
        agreed(cls, request)
    for file in (f for files in request.pictures.values() for f in files):
        if not file.startswith(("http://", "https://")) and not Path(file).is_file():
            raise XditError(f"there is no picture {file}")
    if request.artifacts and (request.offload or request.source.adapters):
        raise XditError("an artifact stays where it is, with the weights that it was exported for: leave "
                        "--enable_model_cpu_offload and --lora out, or give no --artifact")
    if request.artifacts:
        named(request.artifacts, pipeline_config(request.source), request.source.model)
    if request.offload and (request.device == "cpu" or not torch.cuda.is_available()):
        raise XditError("--enable_model_cpu_offload moves components between a GPU and the CPU, but the pipeline runs "
                        "on the CPU; leave it out")
    try:
        if speaks():
            kept_apart(request.output, request.overwrite)
            request.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise XditError(f"cannot write to {request.output}: {error.strerror}; choose another --output") from error


def agreed(cls: type, request: Request) -> dict[str, Any]:
    """The arguments of the pipeline's call, without pictures, if they suit it."""
    signature, given = CallSignature.of(cls.__name__, cls.__call__), {**request.arguments, **request.pictures}
    signature.check_names(given)
    if missing := signature.missing(given):
        raise ArgumentError(f"{cls.__name__} needs {', '.join(missing)}; give --arg {missing[0]}=VALUE, or "
                            f"--image {missing[0]}=FILE if it is a picture")
    return {n: v for n, v in request.habits.items() if n in signature.kinds} | dict(request.arguments)


def _dtype_name(request: Request, place: torch.device) -> str:
    if request.dtype != "auto":
        return request.dtype
    return "float32" if place.type == "cpu" else "bfloat16"


def call(pipe: Any, arguments: Mapping[str, Any], seed: int) -> Any:
    """One call with noise from ``seed``, on the CPU so that it is the same wherever the pipeline runs."""
    torch.manual_seed(seed)  # some draw noise without the generator
    drawn = {}
    if "generator" in inspect.signature(type(pipe).__call__).parameters:
        drawn["generator"] = torch.Generator("cpu").manual_seed(seed)
    with refusals_told(type(pipe).__name__):
        return pipe(**arguments, **drawn)


def _steps(pipe: Any, arguments: Mapping[str, Any]) -> int:
    """How many steps the last call made: fewer than asked for where it began with a picture."""
    steps = getattr(pipe, "num_timesteps", None) or _value(pipe, arguments, "num_inference_steps")
    return steps if isinstance(steps, int) else 0


def _value(pipe: Any, arguments: Mapping[str, Any], name: str) -> Any:
    """An argument of the call as it was given or is by default; None where there is none."""
    taken = inspect.signature(type(pipe).__call__).parameters
    return arguments.get(name, taken[name].default) if name in taken else None


@contextmanager
def _told() -> Iterator[list[str]]:
    """Collects what is warned of, in place of printing it."""
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        yield notes
    notes[:0] = [f"{w.message}" for w in caught if not issubclass(w.category, (DeprecationWarning, FutureWarning))]
