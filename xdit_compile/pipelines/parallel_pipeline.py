"""A pipeline that runs on many devices: its own code, untouched, around parallel components."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from xdit_compile.driver.captured_programs import CapturedPrograms
from xdit_compile.driver.checkpoint import Checkpoint
from xdit_compile.driver.compile_call import Compiled, Dump
from xdit_compile.driver.model_runner import ModelRunner, ReadyProgram
from xdit_compile.driver.parallel_model import Parallel, instance_of_subclass, parallel_model
from xdit_compile.errors import SpecError, XditError
from xdit_compile.frontend.mechanisms import unwrapped
from xdit_compile.frontend.method_module import as_module
from xdit_compile.pipelines.call_fingerprint import call_fingerprint
from xdit_compile.pipelines.components import Role, role_of
from xdit_compile.pipelines.memory import device_of, memory_of_component
from xdit_compile.pipelines.report import ComponentMemory, ComponentReport, PipelineReport, component_report
from xdit_compile.pipelines.shard_encoders import sharded
from xdit_compile.pipelines.spread_encoders import spread
from xdit_compile.report.units import plural
from xdit_compile.runtime.control.one_call_at_a_time import alone
from xdit_compile.runtime.control.replicas import Replicas
from xdit_compile.runtime.deferred.deferred_tensor import materialize
from xdit_compile.runtime.parallel_group import CheckInputs, ParallelGroup
from xdit_compile.runtime.pipefusion.stage_executor import StageExecutor
from xdit_compile.spec import ShardingSpec

CALLBACKS = ("callback_on_step_end", "callback")
"""Arguments of a pipeline's call that are the user's functions, called at the end of a step."""


def is_pipeline(candidate: Any) -> bool:
    """Whether it is called and has named components, modules among them."""
    components = getattr(candidate, "components", None)
    return not isinstance(candidate, nn.Module) and callable(candidate) and isinstance(components, Mapping) and any(
        isinstance(c, nn.Module) for c in components.values())


class ParallelPipeline:
    """Marks a parallel pipeline. ``make`` turns a component into a parallel one; ``parallel_group`` runs them;
    ``replicas``, where inputs are checked, compares what ranks hold. Names that pipelines have for methods of their own
    are not taken."""

    parallel_group: ParallelGroup
    replicas: Replicas | None
    make: Callable[[Any], Any]

    def __setattr__(self, name: str, value: Any) -> None:
        # A component that is exchanged becomes parallel as the one before it was.
        super().__setattr__(name, self.make(value) if isinstance(vars(self).get(name), Parallel) else value)

    def report(self) -> PipelineReport:
        """What ran so far: how each component is shared out, what a call of it costs this rank, and whether calls
        that follow each other ran at once."""
        modules = {n: c for n, c in vars(self).items() if isinstance(c, nn.Module)}
        group, place = self.parallel_group, device_of(modules.values())
        round_robin, communicators = group.round_robin, group.communicators
        return PipelineReport(
            type(self).__name__, group.spec, group.rank,
            tuple(part for name, module in modules.items() for part in _parts(name, module, group)),
            dict(round_robin.fetched) if round_robin else {}, round_robin.sent if round_robin else 0,
            sum(c.sent for c in communicators), sum(c.results_sent for c in communicators), group.counts["kept"],
            group.counts["skipped"], group.counts["decided"],
            tuple(ComponentMemory(n, memory_of_component(m, place)) for n, m in modules.items()),
            torch.cuda.max_memory_allocated(place) if place.type == "cuda" else 0)


def parallel_pipeline(pipe: Any, group: ParallelGroup, check_inputs: CheckInputs, dump: Dump | None,
                      weights: Mapping[str, Checkpoint]) -> Any:
    """``pipe`` with parallel components.

    Raises:
        SpecError: nothing among the components runs at each step, or they lack what the spec speaks of.
    """
    modules = {n: c for n, c in pipe.components.items() if isinstance(c, nn.Module)}
    roles = {n: role_of(c) for n, c in modules.items()}
    _check(pipe, group.spec, modules, roles)
    encoders = [n for n, role in roles.items() if role is Role.ENCODER]
    reading = {Role.DENOISER, Role.ENCODER} if group.spec.encoders == "shard" else {Role.DENOISER}
    if unknown := weights.keys() - {n for n, role in roles.items() if role in reading}:
        raise XditError("weights are read for what runs at each step, and for encoders under encoders=shard; "
                        f"{', '.join(sorted(unknown))} is neither")
    make = functools.partial(_parallel, group=group, check_inputs=check_inputs, dump=dump)
    made: dict[int, Any] = {}  # what is one object stays one
    for n, c in modules.items():
        if id(c) not in made:
            made[id(c)] = make(c, encoders.index(n) if n in encoders else 0, weights=weights.get(n))
    parts = {n: made[id(c)] for n, c in modules.items()}
    members = {"__call__": _call(type(pipe)), "parallel_group": group,
               "replicas": Replicas() if check_inputs else None, "make": staticmethod(make)}
    if isinstance(inspect.getattr_static(type(pipe), "interrupt", None), property):
        members["interrupt"] = property(_interrupted)
    return instance_of_subclass(pipe, ParallelPipeline, members, dict(vars(pipe)) | parts)


def _check(pipe: Any, spec: ShardingSpec, modules: Mapping[str, nn.Module], roles: Mapping[str, Role]) -> None:
    for role, asked, lack in (
            (Role.DENOISER, True, "none of them takes a timestep; parallelize the model that is to be shared out by "
                                  "itself and give it to the pipeline"),
            (Role.AUTOENCODER, spec.vae_degree > 1, f"vae={spec.vae_degree} is for one that encodes and decodes"),
            (Role.ENCODER, spec.encoders != "everywhere",
             f"encoders={spec.encoders} is for text and image encoders")):
        if asked and role not in roles.values():
            raise SpecError(f"{spec} does not fit this {type(pipe).__name__} with the components "
                            f"{', '.join(f'{n} ({type(c).__name__})' for n, c in modules.items())}: {lack}")


def _parallel(module: Any, turn: int = 0, *, group: ParallelGroup, check_inputs: CheckInputs, dump: Dump | None,
              weights: Checkpoint | None = None) -> Any:
    """A component as the spec wants it: a denoiser always, an autoencoder for ``vae`` and ``data``, an encoder if it is
    to be spread or cut. Of spread ones, number ``turn`` lives on rank ``turn`` (all over again when ranks run out)."""
    if not isinstance(module, nn.Module) or isinstance(module, Parallel):
        return module
    role = role_of(module)
    if _is_captured(role, group.spec):
        module = unwrapped(module)
        if isinstance(module, Parallel):
            return module
    if role is Role.DENOISER:
        runner = ModelRunner(module, group, check_inputs, CapturedPrograms(module, dump), weights)
        return parallel_model(module, {"forward": runner})
    if role is Role.AUTOENCODER and _is_captured(role, group.spec):
        parts = {name: as_module(module, name) for name in ("encode", "decode")}
        return parallel_model(module, {name: ModelRunner(part, group.vae, check_inputs, CapturedPrograms(part, dump))
                                       for name, part in parts.items()})
    if role is Role.ENCODER and group.spec.encoders == "spread" and len(group.ranks) > 1:
        return spread(module, group, turn % len(group.ranks))
    if role is Role.ENCODER and group.spec.encoders == "shard" and len(group.ranks) > 1:
        return sharded(unwrapped(module), group, check_inputs, weights)
    return module


def captured_parts(pipe: Any, spec: ShardingSpec) -> list[nn.Module]:
    """The components of which programs are made."""
    # Without the wrapper of torch.compile, if there is one.
    parts = [getattr(c, "_orig_mod", c) for c in pipe.components.values()
             if isinstance(c, nn.Module) and _is_captured(role_of(c), spec)]
    return [part if role_of(part) is Role.DENOISER else as_module(part, "decode") for part in parts]


def _is_captured(role: Role, spec: ShardingSpec) -> bool:
    return role is Role.DENOISER or (role is Role.AUTOENCODER and spec.vae_degree * spec.data_degree > 1)


def _call(cls: type) -> Callable[..., Any]:
    """The pipeline's ``__call__``: arguments agreed upon before anything runs, results settled, failing together."""
    @functools.wraps(cls.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with alone(self.parallel_group.timeout):
            return together(self, args, kwargs)

    def together(self: Any, args: Any, kwargs: Any) -> Any:
        group: ParallelGroup = self.parallel_group
        bound = inspect.signature(cls.__call__).bind(self, *args, **kwargs)
        _agree(self, cls.__name__, {n: v for n, v in bound.arguments.items() if v is not self})
        for name in CALLBACKS:
            if bound.arguments.get(name) is not None:
                bound.arguments[name] = _settled_first(bound.arguments[name], group)
        before, fetched = group.counts.copy(), dict(group.round_robin.fetched) if group.round_robin else {}
        try:
            # What all ranks raise at the same point (wrong arguments, a request that a callback cancels) ends nothing.
            with group.control.guard(cls.__name__):
                try:
                    group.running = True
                    group.epoch += 1
                    group.control.begin()
                    result = cls.__call__(*bound.args, **bound.kwargs)
                    group.settle()
                    result = materialize(result)
                    group.settle_comparisons()
                finally:
                    group.running = False
        except BaseException:
            group.abandon_call()
            raise
        _warn_of_nothing_gained(cls.__name__, group, before["shared"], fetched)
        return result

    return call


def _agree(pipe: Any, name: str, given: Mapping[str, Any]) -> None:
    """Make sure that all ranks call the pipeline alike, with components that hold the same weights."""
    what, facts, control = f"the arguments of {name}", call_fingerprint(given), pipe.parallel_group.control
    if pipe.replicas is None:
        control.agree(what, facts)
        return
    # What lives on one rank has nobody to compare with.
    modules = {n: c for n, c in vars(pipe).items()
               if isinstance(c, nn.Module) and not (isinstance(c, Parallel) and not c.runners)}
    pipe.replicas.agree(control, what, facts, modules)


def _settled_first(callback: Any, group: ParallelGroup) -> Any:
    """The user's callback, which may do on one rank what the others do not: it is given no deferred tensors."""
    def settled(self: Any, *args: Any, **kwargs: Any) -> Any:
        group.settle()
        args, kwargs = materialize((args, kwargs))
        return callback(*args, **kwargs)

    if inspect.isroutine(callback):
        return functools.partial(settled, None)
    return instance_of_subclass(callback, object, {"__call__": settled}, vars(callback))


def _parts(name: str, module: nn.Module, group: ParallelGroup) -> Iterator[ComponentReport]:
    model = type(module).__name__
    runners: Mapping[str, ModelRunner] = module.runners if isinstance(module, Parallel) else {}
    for method, runner in runners.items():
        for ready in runner.programs.values():
            how = f"{method}: {_how(ready, group)}"
            compiled = ready.compiled
            yield component_report(name, model, how, compiled) if isinstance(
                compiled, Compiled) else ComponentReport(name, model, how)
    if not runners:
        how = "whole on every rank, as it is"
        if isinstance(module, Parallel):
            how = f"parameters cut over {plural(len(group.ranks), 'rank')}" if hasattr(module, "shares") else (
                "on one rank")
        yield ComponentReport(name, model, how)


def _how(ready: ReadyProgram, group: ParallelGroup) -> str:
    if isinstance(ready.executor, StageExecutor):
        return f"an exact step of one of {ready.group.spec.pipefusion_degree} stages of {group.spec}"
    if ready.round_robin:
        return f"taken in turns by {group.spec.cfg_degree} groups"
    how = "whole on every rank of" if ready.compiled.unsharded else "shared out by"
    return f"{how} {ready.group.spec}"


def _interrupted(self: Any) -> bool:
    """Whether any rank was told to stop: all must, or the others would wait for it. Where not all of them were told,
    they stop one step later. Between calls ranks may ask or not, so that each answers for itself."""
    mine = bool(self._interrupt)
    group = self.parallel_group
    if not group.running:
        return mine
    return group.control.to_stop(mine)


def _warn_of_nothing_gained(name: str, group: ParallelGroup, shared: int, fetched: Mapping[int, int]) -> None:
    """Say so if groups took turns and never two of them computed at once."""
    if group.round_robin is None or group.rank != 0 or group.counts["shared"] > shared:
        return
    now = {calls: times - fetched.get(calls, 0) for calls, times in group.round_robin.fetched.items()}
    if now.get(1) == sum(now.values()) > 0:
        warnings.warn(f"cfg={group.spec.cfg_degree} gained nothing in this call of {name}: each of {now[1]} results "
                      "was used before the model was called again, so one group computed while the others waited",
                      stacklevel=3)
