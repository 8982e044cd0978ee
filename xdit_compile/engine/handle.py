"""The handle on an engine: called as the pipeline is, from one ordinary process."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from xdit_compile.engine.call import Call, OnPreview, OnStep
from xdit_compile.engine.dispatcher import CHOOSE, LOAD, UNLOAD, Dispatcher
from xdit_compile.engine.process_ranks import ProcessRanks
from xdit_compile.engine.ranks import Start
from xdit_compile.engine.ray_ranks import RayRanks, ray_library
from xdit_compile.engine.recipe import Recipe, named, size_of
from xdit_compile.errors import LaunchError, XditError
from xdit_compile.pipelines.call_signature import CallSignature
from xdit_compile.runtime.launch import already_a_rank, kind_for

Executor = Literal["processes", "ray"]


def start(source: str | Path | Callable[..., Any], spec: str = "", *, world_size: int | None = None,
          executor: Executor = "processes", device: str | None = None, dtype: str = "auto", threads: int | None = None,
          timeout: float = 600.0, artifact: str | Path | Mapping[str, str | Path] | None = None,
          weights: str | Path | None = None, native: bool = False, arguments: Mapping[str, Any] | None = None,
          options: Mapping[str, Any] | None = None) -> Engine:
    """Start an engine: one process per rank, which make what ``source`` names and wait for calls.

    This process stays what it is, a notebook or a server: workers import or load, nothing of the caller is sent but the
    arguments of calls. Returns when all of them are ready.

    Args:
        source: a folder of a pipeline or its name on the hub; an artifact; or a function that makes a pipeline, a
            model, or anything else that can be called, as itself if workers can import it, or as ``"file.py:function"``
            or ``"module:function"``. Pipelines and models are parallelized; others run as they are made, on each rank,
            and are handed ``spec`` if they take an argument of that name.
        spec: as for `parallelize`. An artifact has its own.
        world_size: how many ranks; by default as many as the spec asks for.
        executor: ``"processes"`` of this machine, or ``"ray"``: actors on a Ray cluster.
        device: cuda or cpu; cuda by default where every rank has a GPU.
        dtype: of a pipeline's weights: float32, bfloat16, float16, or auto (bfloat16 on GPUs, else float32).
        threads: of each rank on CPUs; by default this process's, shared out.
        timeout: seconds without any news (a step, an answer) after which a start or a call is given up.
        artifact: of a pipeline: an artifact in place of the model of its class, or several by component.
        weights: safetensors for an artifact that holds none; by default those in the pipeline's folder.
        native: run what artifacts hold compiled ahead, which is machine code: only where you trust them.
        arguments: of the function.
        options: fields of `PipelineSource`: ``{"scheduler": "EulerDiscreteScheduler"}``.

    Raises:
        LaunchError: this process is a rank itself, or ranks cannot be started. XditError: what they were to make cannot
            be made; says why.
    """
    if already_a_rank():
        raise LaunchError("start() starts ranks, but this process already is one. A script that is itself what workers "
                          "import calls start() under `if __name__ == '__main__':`")
    kind, name = named(source)
    artifacts = _by_component(artifact)
    if artifacts and kind != "pipeline":
        raise XditError("artifact= takes the place of a pipeline's model; an artifact alone is the source itself")
    own = name if kind == "artifact" else next(iter(artifacts.values()), None)
    if own is not None and spec:
        raise XditError(f"an artifact has its own spec; leave {spec!r} out")
    if native and own is None:
        raise XditError("native=True runs what an artifact holds compiled ahead; give one, by artifact= or as source")
    size = size_of(spec, world_size, own)
    recipe = Recipe(kind, name, spec, dict(options or {}), artifacts, None if weights is None else str(
        Path(weights).resolve()), native, dict(arguments or {}), dtype, timeout)
    device = device or kind_for(size)
    threads = threads or max(1, torch.get_num_threads() // size)
    return Engine(recipe, _starter(executor, size, device, threads, timeout))


def _starter(executor: str, size: int, device: str, threads: int, timeout: float) -> Start:
    if executor == "processes":
        return lambda: ProcessRanks(size, device, threads)
    if executor == "ray":
        ray_library()
        return lambda: RayRanks(size, device, threads, timeout)
    raise XditError(f"there is no executor {executor!r}; there are processes and ray")


def _by_component(artifact: str | Path | Mapping[str, str | Path] | None) -> dict[str, str]:
    given = {} if artifact is None else artifact if isinstance(artifact, Mapping) else {"": artifact}
    return {name: str(Path(path).resolve()) for name, path in given.items()}


class Engine:
    """Ranks that hold a pipeline, and calls to it, which are made one after the other.

    A call that fails on all ranks alike (wrong arguments) ends that call alone. Where a rank has died or ranks
    disagree, the call ends with the name of the rank, and the next one starts all of them anew, adapters included.

    Attributes:
        recipe: what the ranks hold.
        signature: of the call.
        is_pipeline: whether it is a pipeline that is called.
    """

    def __init__(self, recipe: Recipe, starter: Start) -> None:
        self.recipe = recipe
        self._dispatcher = Dispatcher(recipe, starter)
        self._finalizer = weakref.finalize(self, self._dispatcher.close, 0.0)
        try:
            made = dict(self._dispatcher.started.result())
        except BaseException:
            self.close()
            raise
        self.is_pipeline: bool = made.pop("is_pipeline")
        self.signature = CallSignature.of_json(made)

    def __call__(self, *args: Any, seed: int | None = None, on_step: OnStep | None = None,
                 on_preview: OnPreview | None = None, time_limit: float | None = None, **kwargs: Any) -> Any:
        """One call, waited for; takes what the pipeline's call takes and returns what that returns, tensors on the CPU.

        Generators go on from where they are, and are afterwards where the pipeline has left them. Without one and
        without ``seed``, noise follows from this process's random state, so that `torch.manual_seed` makes it
        repeatable.

        Args:
            seed: of all that is drawn: a generator on the CPU, if the call takes one, and the ranks' random state.
            on_step: called with the steps done and their number (0 if unknown) after each, from another thread.
            on_preview: called with the steps done and the latents then. Stages and groups of ranks wait for each other
                at each step for its sake; the pipeline must take diffusers' callback at the end of a step.
            time_limit: seconds after which the call is cancelled.

        Raises:
            ArgumentError: arguments that it does not take. RankFailure: naming the rank that died or gave no news.
            TimeoutError: the limit was reached. Anything that the pipeline raised on all ranks.
        """
        call = self.submit(*args, seed=seed, on_step=on_step, on_preview=on_preview, time_limit=time_limit, **kwargs)
        try:
            return call.result()
        except BaseException:
            call.cancel()  # Ctrl-C while waiting
            raise

    def submit(self, *args: Any, seed: int | None = None, on_step: OnStep | None = None,
               on_preview: OnPreview | None = None, time_limit: float | None = None, **kwargs: Any) -> Call:
        """The same as a future, at once; ``cancel`` works while it runs too."""
        self.signature.check_names(kwargs)
        if seed is not None and "generator" in self.signature.kinds:
            kwargs.setdefault("generator", torch.Generator("cpu").manual_seed(seed))
        if seed is not None and "seed" in self.signature.kinds:
            kwargs["seed"] = seed
        call = Call("call", "", args, kwargs, on_step, time_limit, on_preview=on_preview)
        call.seed = call.seed if seed is None else seed
        return self._dispatcher.submit(call)

    def cancel(self) -> None:
        """Cancel all calls that wait or run; those that run end before their next step."""
        self._dispatcher.cancel_all()

    def load_lora(self, path: str | Path, name: str | None = None, scale: float | None = None, **kwargs: Any) -> None:
        """Load an adapter on all ranks, as ``pipe.load_lora_weights`` does, and set its scale if one is given."""
        text = str(Path(path).resolve()) if Path(path).exists() else str(path)
        named = {"adapter_name": name, **kwargs} if name else kwargs
        self.invoke(LOAD, text, **named)
        if scale is not None:
            self.set_adapters([name or "default_0"], [scale])

    def set_adapters(self, names: str | list[str], scales: float | list[float] | None = None) -> None:
        """Which of the loaded adapters are active, and how strongly."""
        self.invoke(CHOOSE, names, *([] if scales is None else [scales]))

    def unload_lora(self) -> None:
        """Give up all adapters."""
        self.invoke(UNLOAD)

    def invoke(self, method: str, *args: Any, answers: bool = False, **kwargs: Any) -> Any:
        """Call a method of what the ranks hold, on all of them, between two calls. It is called again when the engine
        starts anew.

        Args:
            answers: whether to return what it returns on rank 0, which must be something that can be sent; such a call
                is a question, and is not repeated.
        """
        return self._dispatcher.submit(Call("invoke", method, args, kwargs, answers=answers)).result()

    def close(self, seconds: float = 10.0) -> None:
        """End the ranks; a call that runs is cancelled and given so many ``seconds``."""
        self._dispatcher.close(seconds)
        self._finalizer.detach()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Engine({self.signature.name}, {self.recipe})"
