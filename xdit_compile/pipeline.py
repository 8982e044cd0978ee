"""A pipeline that runs on many devices: its own code, untouched, around parallel components."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from xdit_compile.captures import Captures
from xdit_compile.compiler import Compiled, Dump
from xdit_compile.components import Role, role_of
from xdit_compile.encoders import spread
from xdit_compile.errors import CaptureError, RankMismatch, SpecError, XditError
from xdit_compile.facts import facts_of
from xdit_compile.frontend.method import as_module
from xdit_compile.report.parts import Part, PipelineReport, part_of
from xdit_compile.runner import Ready, Runner
from xdit_compile.runtime.crew import Crew
from xdit_compile.runtime.deferred import concrete
from xdit_compile.runtime.flow import Flow
from xdit_compile.spec import ShardingSpec
from xdit_compile.standin import Parallel, instance_of_subclass, parallel_model
from xdit_compile.weights import Weights

CALLBACKS = ("callback_on_step_end", "callback")
"""Arguments of a pipeline's call that are the user's functions, called at the end of a step."""


def is_pipeline(candidate: Any) -> bool:
    """Whether it is called and has named components, modules among them."""
    components = getattr(candidate, "components", None)
    return not isinstance(candidate, nn.Module) and callable(candidate) and isinstance(components, Mapping) and any(
        isinstance(c, nn.Module) for c in components.values())


class ParallelPipeline:
    """Marks a parallel pipeline. ``make`` turns a component into a parallel one; ``crew`` runs them."""

    crew: Crew
    make: Callable[[Any], Any]

    def __setattr__(self, name: str, value: Any) -> None:
        # A component that is exchanged becomes parallel as the one before it was.
        super().__setattr__(name, self.make(value) if isinstance(vars(self).get(name), Parallel) else value)

    def report(self) -> PipelineReport:
        """What ran so far: how each component is shared out, what a call of it costs this rank, and whether calls
        that follow each other ran at once."""
        modules = {n: c for n, c in vars(self).items() if isinstance(c, nn.Module)}
        turns = self.crew.turns
        return PipelineReport(
            type(self).__name__, self.crew.spec, self.crew.rank,
            tuple(part for name, module in modules.items() for part in _parts(name, module, self.crew)),
            dict(turns.fetched) if turns else {}, turns.sent if turns else 0,
            sum(s.sent for s in self.crew.streams), sum(s.results_sent for s in self.crew.streams),
            self.crew.counts["kept"])


def parallel_pipeline(pipe: Any, crew: Crew, check_inputs: bool, dump: Dump | None,
                      weights: Mapping[str, Weights]) -> Any:
    """``pipe`` with parallel components.

    Raises:
        SpecError: nothing among the components runs at each step, or they lack what the spec speaks of.
    """
    modules = {n: c for n, c in pipe.components.items() if isinstance(c, nn.Module)}
    roles = {n: role_of(c) for n, c in modules.items()}
    _check(pipe, crew.spec, modules, roles)
    encoders = [n for n, role in roles.items() if role is Role.ENCODER]
    if unknown := weights.keys() - {n for n, role in roles.items() if role is Role.DENOISER}:
        raise XditError(f"weights are read for what runs at each step, which {', '.join(sorted(unknown))} is not")
    make = functools.partial(_parallel, crew=crew, check_inputs=check_inputs, dump=dump)
    parts = {n: make(c, encoders.index(n) if n in encoders else 0, weights=weights.get(n)) for n, c in modules.items()}
    members = {"__call__": _call(type(pipe)), "crew": crew, "make": staticmethod(make)}
    if isinstance(inspect.getattr_static(type(pipe), "interrupt", None), property):
        members["interrupt"] = property(_interrupted)
    return instance_of_subclass(pipe, ParallelPipeline, members, dict(vars(pipe)) | parts)


def _check(pipe: Any, spec: ShardingSpec, modules: Mapping[str, nn.Module], roles: Mapping[str, Role]) -> None:
    for role, asked, lack in (
            (Role.DENOISER, True, "none of them takes a timestep; parallelize the model that is to be shared out by "
                                  "itself and give it to the pipeline"),
            (Role.AUTOENCODER, spec.vae_degree > 1, f"vae={spec.vae_degree} is for one that encodes and decodes"),
            (Role.ENCODER, spec.encoders == "spread", "encoders=spread is for text and image encoders")):
        if asked and role not in roles.values():
            raise SpecError(f"{spec} does not fit this {type(pipe).__name__} with the components "
                            f"{', '.join(f'{n} ({type(c).__name__})' for n, c in modules.items())}: {lack}")


def _parallel(module: Any, turn: int = 0, *, crew: Crew, check_inputs: bool, dump: Dump | None,
              weights: Weights | None = None) -> Any:
    """A component as the spec wants it: a denoiser always, an autoencoder for ``vae`` and ``data``, an encoder if it is
    to be spread. Of encoders, number ``turn`` lives on rank ``turn`` (all over again when ranks run out)."""
    if not isinstance(module, nn.Module) or isinstance(module, Parallel):
        return module
    role = role_of(module)
    if role is Role.DENOISER:
        return parallel_model(module, {"forward": Runner(module, crew, check_inputs, Captures(module, dump), weights)})
    if role is Role.AUTOENCODER and crew.spec.vae_degree * crew.spec.data_degree > 1:
        parts = {name: as_module(module, name) for name in ("encode", "decode")}
        return parallel_model(module, {name: Runner(part, crew.vae, check_inputs, Captures(part, dump))
                                       for name, part in parts.items()})
    if role is Role.ENCODER and crew.spec.encoders == "spread" and len(crew.ranks) > 1:
        return spread(module, crew, turn % len(crew.ranks))
    return module


def _call(cls: type) -> Callable[..., Any]:
    """The pipeline's ``__call__``: arguments agreed upon before anything runs, results settled, failing together."""
    @functools.wraps(cls.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        crew: Crew = self.crew
        bound = inspect.signature(cls.__call__).bind(self, *args, **kwargs)
        given = {n: v for n, v in bound.arguments.items() if v is not self}
        crew.control.agree(f"the arguments of {cls.__name__}", facts_of(given))
        for name in CALLBACKS:
            if bound.arguments.get(name) is not None:
                bound.arguments[name] = _settled_first(bound.arguments[name], crew)
        before, fetched = crew.counts.copy(), dict(crew.turns.fetched) if crew.turns else {}
        alike: BaseException | None = None
        with crew.control.guard(cls.__name__):
            try:
                crew.running = True
                crew.epoch += 1
                result = cls.__call__(*bound.args, **bound.kwargs)
                crew.settle()
                result = concrete(result)
            except (RankMismatch, CaptureError, SpecError) as error:
                alike = error
            except Exception as error:
                # Before the first model ran, only the arguments can be at fault, and they are the same everywhere.
                if crew.counts["calls"] != before["calls"]:
                    raise
                alike = error
            finally:
                crew.running = False
        if alike is not None:
            raise alike
        _warn_of_nothing_gained(cls.__name__, crew, before["shared"], fetched)
        return result

    return call


def _settled_first(callback: Any, crew: Crew) -> Any:
    """The user's callback, which may do on one rank what the others do not: it is given no deferred tensors."""
    def settled(self: Any, *args: Any, **kwargs: Any) -> Any:
        crew.settle()
        args, kwargs = concrete((args, kwargs))
        return callback(*args, **kwargs)

    if inspect.isroutine(callback):
        return functools.partial(settled, None)
    return instance_of_subclass(callback, object, {"__call__": settled}, vars(callback))


def _parts(name: str, module: nn.Module, crew: Crew) -> Iterator[Part]:
    model = type(module).__name__
    runners = module.runners if isinstance(module, Parallel) else {}
    for method, runner in runners.items():
        for ready in runner.programs.values():
            how = f"{method}: {_how(ready, crew)}"
            compiled = ready.compiled
            yield part_of(name, model, how, compiled) if isinstance(compiled, Compiled) else Part(name, model, how)
    if not runners:
        yield Part(name, model, "on one rank" if isinstance(module, Parallel) else "whole on every rank, as it is")


def _how(ready: Ready, crew: Crew) -> str:
    if isinstance(ready.executor, Flow):
        return f"an exact step of one of {ready.crew.spec.pipefusion_degree} stages of {crew.spec}"
    if ready.turns:
        return f"taken in turns by {crew.spec.cfg_degree} groups"
    return f"whole on every rank of {ready.crew.spec}" if ready.compiled.idle else f"shared out by {ready.crew.spec}"


def _interrupted(self: Any) -> bool:
    """Whether any rank was told to stop: all must, or the others would wait for it. Between calls ranks may ask or
    not, so that each answers for itself."""
    mine = bool(self._interrupt)
    if not self.crew.running:
        return mine
    # Stages are in different steps, and asking would bring them together: they learn it one step later.
    later = self.crew.spec.pipefusion_degree > 1
    return self.crew.said_before(mine) if later else self.crew.control.anyone("whether to stop", mine)


def _warn_of_nothing_gained(name: str, crew: Crew, shared: int, fetched: Mapping[int, int]) -> None:
    """Say so if groups took turns and never two of them computed at once."""
    if crew.turns is None or crew.rank != 0 or crew.counts["shared"] > shared:
        return
    now = {calls: times - fetched.get(calls, 0) for calls, times in crew.turns.fetched.items()}
    if now.get(1) == sum(now.values()) > 0:
        warnings.warn(f"cfg={crew.spec.cfg_degree} gained nothing in this call of {name}: each of {now[1]} results was "
                      "used before the model was called again, so one group computed while the others waited",
                      stacklevel=3)
