"""A model that runs on many devices: it stands where the model stood and shares its parameters."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from xdit_compile.driver.captured_programs import CapturedPrograms
from xdit_compile.driver.checkpoint import Checkpoint
from xdit_compile.driver.compile_call import Dump
from xdit_compile.driver.model_runner import ModelRunner
from xdit_compile.driver.parallel_model import Parallel, parallel_model
from xdit_compile.errors import SpecError, XditError
from xdit_compile.frontend.mechanisms import check, obstacle, unwrapped
from xdit_compile.frontend.program_cache import captured
from xdit_compile.ir.call_arguments import Call, Inputs, call_arguments
from xdit_compile.ir.program import Program
from xdit_compile.pipelines.auto_pipeline import AutoPipeline, Observed, auto_pipeline
from xdit_compile.pipelines.parallel_pipeline import ParallelPipeline, captured_parts, is_pipeline, parallel_pipeline
from xdit_compile.planner.agreed_choice import AutoRunner, agreed_choice
from xdit_compile.planner.auto import Auto, batch_of, choose
from xdit_compile.planner.machine import Machine
from xdit_compile.runtime.compilation.regional import compiler_for
from xdit_compile.runtime.launch import init_from_env
from xdit_compile.runtime.parallel_group import CheckInputs, ParallelGroup
from xdit_compile.spec import ShardingSpec


def capture(model: nn.Module, inputs: Inputs) -> Program:
    """Capture the forward of ``model`` ahead of its first call and keep the program for it.

    Args:
        model: any module in eval mode; on the meta device no weights are needed, and the program serves the model
            once they are on the CPU.
        inputs: keyword arguments of one call as a mapping, or positional ones as a sequence. Tensors may be on the
            meta device too, except those whose values the model reads.

    Raises:
        CaptureError: naming the line of the model that stands in the way.
    """
    return captured(model, *call_arguments(model, inputs))


def parallelize(model: Any, spec: str | dict | ShardingSpec | Auto, *, ranks: Sequence[int] | None = None,
                timeout: float = 600.0, check_inputs: CheckInputs = "behind", dump: Dump | None = None,
                weights: str | Path | Mapping[str, str | Path] | None = None) -> Any:
    """Make a model, or all of a pipeline, run on many devices. Every process calls this with the same one and spec.

    The result is called as the original was and returns what that returned, on every rank. It shares the
    parameters and modules, so ``.to()``, loading weights and adapters and editing them act on both; the original
    itself stays as it was. Each new kind of call (shapes, dtypes, Python arguments, module structure) is captured once.

    With ``cfg``, the batch of a call is shared out if it can be; if not, groups of ranks take turns in the calls and
    the results are deferred: they are exchanged at their first use other than element-wise, which all ranks must make.

    With ``pipefusion``, a rank gives up the parameters of all other stages at the first call: they move to the meta
    device, in the original as well. Results come patch by patch and are deferred.

    Args:
        model: any DiT as a torch.nn.Module, in eval mode, or a pipeline of diffusers: an object with ``components``.
            Every rank holds the same weights.
        spec: ``"ulysses=2,ring=2"``, the same as a mapping, or a ShardingSpec; or ``"auto"``, with which the planner
            chooses at the first call, and says in one line what and why.
        ranks: the global ranks that take part; all of them by default.
        timeout: seconds to wait for another rank before giving up with its name.
        check_inputs: ``"behind"`` compares what all ranks call the model with (a checksum of each tensor, exchanged in
            one small message): before the first call of a kind and the first step of a loop, and while all other calls
            run, so that none waits for it. ``"always"`` compares before each call, False never.
        dump: called with the name of each pass and the program it made.
        weights: a safetensors file or a folder of them, for a model on the meta device: each rank reads those tensors
            that it uses, at the first call. For a pipeline, by the names of components.

    Raises:
        SpecError: the spec does not fit the processes or the model. CaptureError: the model cannot be captured.
        RankMismatch, RankFailure: another rank holds something else, or is gone.
    """
    model, auto = unwrapped(model), Auto.parse(spec)
    base = auto.base if auto else ShardingSpec.parse(spec)  # type: ignore[arg-type]
    _check_model(model, base, 1 if auto is None else auto.vae)
    if (auto is not None or base.world_size > 1) and not dist.is_initialized() and _is_rank(auto):
        init_from_env(timeout=timeout)
    chosen = list(ranks) if ranks is not None else list(range(dist.get_world_size() if dist.is_initialized() else 1))
    if auto is None:
        return _parallelized(model, base, chosen, timeout, check_inputs, dump, weights)
    group = ParallelGroup(ShardingSpec(ulysses_degree=len(chosen)), chosen, timeout)

    def chosen_for(observed: Callable[[], Observed]) -> ShardingSpec:
        def plan(here: Machine) -> ShardingSpec:
            seen = observed()
            question = auto.question(here, len(chosen), batch_of(seen.call), seen.steps, seen.calls, seen.beside)
            spec = choose(seen.call, question, None if auto.vae else seen.decoding)
            return replace(spec, vae_degree=auto.vae) if auto.vae else spec

        return agreed_choice(auto, group, plan)

    if is_pipeline(model):
        return auto_pipeline(model, chosen_for, lambda spec: _parallelized(
            model, spec, chosen, timeout, check_inputs, dump, weights))

    def make(args: Any, kwargs: Mapping[str, Any]) -> ModelRunner:
        spec = chosen_for(lambda: Observed(Call(model, args, kwargs), 1, 0, None))
        return _parallelized(model, spec, chosen, timeout, check_inputs, dump, weights).runners["forward"]

    return parallel_model(model, {"forward": AutoRunner(make)})  # type: ignore[dict-item]


def _is_rank(auto: Auto | None) -> bool:
    """Whether processes are to be joined: what is still to be chosen may be for one alone."""
    return auto is None or "RANK" in os.environ


def _check_model(model: Any, spec: ShardingSpec, vae: int = 1) -> None:
    if isinstance(model, (Parallel, ParallelPipeline, AutoPipeline)):
        raise SpecError("the model is parallel already; call parallelize on the original")
    if not isinstance(model, nn.Module) and not is_pipeline(model):
        raise XditError(f"parallelize takes a torch.nn.Module or a pipeline with components, got a "
                        f"{type(model).__name__}")
    if isinstance(model, nn.Module) and (max(spec.vae_degree, vae) > 1 or spec.encoders != "everywhere"):
        raise SpecError(f"{spec} speaks of a pipeline's autoencoder or encoders, but {type(model).__name__} is a "
                        "model; give parallelize the pipeline, or leave out vae and encoders")


def _parallelized(model: Any, spec: ShardingSpec, chosen: Sequence[int], timeout: float, check_inputs: CheckInputs,
                  dump: Dump | None, weights: str | Path | Mapping[str, str | Path] | None) -> Any:
    """``model`` under a spec, on these ranks."""
    spec.check_world(len(chosen))
    if spec.backend != "eager":
        compiler_for(spec)
    group = ParallelGroup(spec, chosen, timeout)
    parts = captured_parts(model, spec) if is_pipeline(model) else [model]
    group.control.agree("parallelize", {"spec": str(spec), "model": type(model).__qualname__,
                                       "what is in the way": str([obstacle(part, True) for part in parts])})
    for part in parts:
        check(part, offloaded=True)
    if is_pipeline(model):
        if weights is not None and not isinstance(weights, Mapping):
            raise XditError("weights of a pipeline are given by component, as in "
                            f"weights={{'transformer': {str(weights)!r}}}")
        read = {name: Checkpoint.at(path) for name, path in (weights or {}).items()}
        return parallel_pipeline(model, group, check_inputs, dump, read)
    if isinstance(weights, Mapping):
        raise XditError("weights of a model are a file or a folder; those by component are for a pipeline")
    read_one = None if weights is None else Checkpoint.at(weights)
    runner = ModelRunner(model, group, check_inputs, CapturedPrograms(model, dump), read_one)
    return parallel_model(model, {"forward": runner})
