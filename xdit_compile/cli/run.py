"""Run a pipeline in parallel and keep what it makes: what the command ``run`` does."""

from __future__ import annotations

import inspect
import os
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from xdit_compile.api import parallelize
from xdit_compile.cli.run_result import Run
from xdit_compile.errors import XditError
from xdit_compile.pipelines.loading import PipelineSource, load, only_one_speaks, pictures, pipeline_class
from xdit_compile.pipelines.output_files import save
from xdit_compile.pipelines.report import said_of_steps
from xdit_compile.runtime.launch import launch, place_of
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
    """

    source: PipelineSource
    spec: ShardingSpec
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
    first = os.environ.get("RANK", "0") == "0"
    only_one_speaks(first)
    started = time.perf_counter()
    with _told() as notes:
        pipe = load(request.source, getattr(torch, _dtype_name(request, place)))
        pipe = pipe if request.offload else pipe.to(place)
        pipe.set_progress_bar_config(disable=None if first else True)
        load_seconds = time.perf_counter() - started
        arguments = agreed(type(pipe), request) | {n: pictures(f) for n, f in request.pictures.items()}
        parallel = parallelize(pipe, request.spec)
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
        peaks = parallel.parallel_group.gather(torch.cuda.max_memory_allocated(place)) if place.type == "cuda" else ()
        counts = parallel.parallel_group.counts
        if request.spec.approximate:
            notes.append(f"the result is approximate, as {request.spec.approximate} asks for" + (
                f": {said_of_steps(counts['skipped'], counts['decided'])}" if counts["decided"] else ""))
        files: list[Path] = []
        if first:
            rate = request.frame_rate or int(_value(parallel, arguments, "frame_rate") or FRAME_RATE)
            files, others = save(result, request.output, rate)
            notes += others
            if request.frame_rate and not any(f.suffix in (".gif", ".mp4") for f in files):
                notes.append("--fps had no effect: no video was made")
    return Run(
        request.source.model, type(pipe).__name__, request.spec, place.type, _dtype_name(request, place), load_seconds,
        seconds, _steps(parallel, arguments), request.warmup_calls, tuple(peaks), tuple(map(str, files)),
        tuple(dict.fromkeys(notes)))


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
    if request.offload and (request.device == "cpu" or not torch.cuda.is_available()):
        raise XditError("--enable_model_cpu_offload moves components between a GPU and the CPU, but the pipeline runs "
                        "on the CPU; leave it out")
    try:
        if os.environ.get("RANK", "0") == "0":
            request.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise XditError(f"cannot write to {request.output}: {error.strerror}; choose another --output") from error


def agreed(cls: type, request: Request) -> dict[str, Any]:
    """The arguments of the pipeline's call, without pictures, if they suit it."""
    taken = dict(inspect.signature(cls.__call__).parameters)
    taken.pop("self", None)
    kinds = {p.kind for p in taken.values()}
    given = {**request.arguments, **request.pictures}
    if inspect.Parameter.VAR_KEYWORD not in kinds and (unknown := given.keys() - taken.keys()):
        raise XditError(f"{cls.__name__} takes no {', '.join(sorted(unknown))}; it takes {', '.join(taken)}")
    missing = [n for n, p in taken.items() if p.default is p.empty and n not in given
               and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if missing:
        raise XditError(f"{cls.__name__} needs {', '.join(missing)}; give --arg {missing[0]}=VALUE, or "
                        f"--image {missing[0]}=FILE if it is a picture")
    return {n: v for n, v in request.habits.items() if n in taken} | dict(request.arguments)


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
    try:
        return pipe(**arguments, **drawn)
    except ValueError as error:
        # Pipelines of diffusers look at their arguments in a method of this name, and say what does not fit.
        if any(frame.name == "check_inputs" for frame in traceback.extract_tb(error.__traceback__)):
            raise XditError(f"{type(pipe).__name__} refuses its arguments: {error}") from error
        raise


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
