"""A model that runs on many devices: it stands where the model stood and shares its parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from xdit_compile.ir.call_arguments import Inputs, call_arguments
from xdit_compile.ir.program import Program
from xdit_compile.pipelines.parallel_pipeline import ParallelPipeline, captured_parts, is_pipeline, parallel_pipeline
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


def parallelize(model: Any, spec: str | dict | ShardingSpec, *, ranks: Sequence[int] | None = None,
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
        spec: ``"ulysses=2,ring=2"``, the same as a mapping, or a ShardingSpec.
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
    spec, model = ShardingSpec.parse(spec), unwrapped(model)
    if isinstance(model, (Parallel, ParallelPipeline)):
        raise SpecError("the model is parallel already; call parallelize on the original")
    if not isinstance(model, nn.Module) and not is_pipeline(model):
        raise XditError(f"parallelize takes a torch.nn.Module or a pipeline with components, got a "
                        f"{type(model).__name__}")
    if isinstance(model, nn.Module) and (spec.vae_degree > 1 or spec.encoders != "everywhere"):
        raise SpecError(f"{spec} speaks of a pipeline's autoencoder or encoders, but {type(model).__name__} is a "
                        "model; give parallelize the pipeline, or leave out vae and encoders")
    if spec.world_size > 1 and not dist.is_initialized():
        init_from_env(timeout=timeout)
    chosen = list(ranks) if ranks is not None else list(range(dist.get_world_size() if dist.is_initialized() else 1))
    spec.check_world(len(chosen))
    if spec.backend != "eager":
        compiler_for(spec)
    group = ParallelGroup(spec, chosen, timeout)
    parts = captured_parts(model, spec) if is_pipeline(model) else [model]
    group.control.agree("parallelize", {"spec": str(spec), "model": type(model).__qualname__,
                                       "what is in the way": str([obstacle(part) for part in parts])})
    for part in parts:
        check(part)
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
