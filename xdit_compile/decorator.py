"""The decorator: whatever pipeline or model a function is given runs in parallel inside it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from xdit_compile.api import parallelize
from xdit_compile.driver.parallel_model import Parallel
from xdit_compile.pipelines.auto_pipeline import AutoPipeline
from xdit_compile.pipelines.components import Role, role_of
from xdit_compile.pipelines.parallel_pipeline import ParallelPipeline, is_pipeline
from xdit_compile.planner.auto import Auto
from xdit_compile.runtime.deferred.deferred_tensor import materialize
from xdit_compile.spec import ShardingSpec

F = TypeVar("F", bound=Callable[..., Any])


def parallel(spec: str | dict | ShardingSpec, **options: Any) -> Callable[[F], F]:
    """Decorate a function, a method or a pipeline's ``__call__``: pipelines and denoising models among its arguments
    are made parallel under ``spec``, each once, however often the function is called.

        @xdit_compile.parallel("cfg=2,ulysses=2")
        def generate(pipe, prompt):
            return pipe(prompt).images

    Every process calls the function alike, as with ``parallelize``, whose ``options`` these are.

    Raises:
        SpecError: the spec cannot be read.
    """
    parsed = Auto.parse(spec) or ShardingSpec.parse(spec)

    def decorate(function: F) -> F:
        made: dict[int, tuple[Any, Any]] = {}  # by identity, with the original, which keeps its identity alive

        def in_parallel(value: Any) -> Any:
            if isinstance(value, (Parallel, ParallelPipeline, AutoPipeline)) or not _is_worth(value):
                return value
            if id(value) not in made:
                made[id(value)] = value, parallelize(value, parsed, **options)
            return made[id(value)][1]

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if function.__name__ == "__call__" and args and is_pipeline(args[0]):
                if not isinstance(args[0], ParallelPipeline):
                    # Its own call, which comes back here with a parallel pipeline.
                    return in_parallel(args[0])(*args[1:], **kwargs)
                return function(*args, **kwargs)
            given = [in_parallel(a) for a in args], {n: in_parallel(a) for n, a in kwargs.items()}
            return materialize(function(*given[0], **given[1]))

        return call  # type: ignore[return-value]

    return decorate


def _is_worth(value: Any) -> bool:
    return role_of(value) is Role.DENOISER if isinstance(value, nn.Module) else is_pipeline(value)
