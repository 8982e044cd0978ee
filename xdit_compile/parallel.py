"""A model that runs on many devices: it stands where the model stood and shares its parameters."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from xdit_compile.calls import Inputs, bind_call, call_arguments, named_leaves
from xdit_compile.compiler import Compiled, Dump, compile_program
from xdit_compile.errors import CaptureError, RankMismatch, SpecError, XditError
from xdit_compile.frontend.cache import captured, find
from xdit_compile.launch import init_from_env
from xdit_compile.passes import NOTHING
from xdit_compile.program import Program
from xdit_compile.runtime.control import Control
from xdit_compile.runtime.digest import digests
from xdit_compile.runtime.executor import Executor
from xdit_compile.runtime.groups import Groups
from xdit_compile.spec import ShardingSpec
from xdit_compile.structure import flatten


class Runner:
    """The state behind a parallel model: its groups, and a program for each kind of call seen so far."""

    def __init__(self, model: nn.Module, spec: ShardingSpec, ranks: Sequence[int], timeout: float,
                 check_inputs: bool, dump: Dump | None) -> None:
        self.model, self.spec, self.check_inputs, self.dump = model, spec, check_inputs, dump
        self.control = Control(ranks, timeout)
        self.control.agree("parallelize", {"spec": str(spec), "model": type(model).__qualname__})
        self.groups = Groups(spec, ranks, timeout)
        self.programs: dict[int, tuple[Compiled, Executor]] = {}
        """By the identity of the captured program, which ``Compiled`` keeps alive."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = bind_call(self.model, args, kwargs)
        tensors, _ = flatten((bound.args, bound.kwargs))
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            raise XditError("a parallel model computes no gradients, but an input requires them; "
                            "call it under torch.no_grad() or detach the input")
        try:
            whole = find(self.model, bound.args, bound.kwargs)
            known = self.programs.get(id(whole))
            # Also which program: a rank that has to capture one waits for the others to do so too.
            facts = {"program": known[0].name if known else "still to be made"}
            if self.check_inputs:
                named, others = named_leaves(bound)
                facts |= digests(named) | others
            self.control.agree("the call's inputs", facts)
            compiled, executor = known or self._program(bound.args, bound.kwargs)
            self.groups.bind()
            with self.control.guard("the forward pass", self.groups.all):
                results = executor(tensors)
        except (RankMismatch, CaptureError, SpecError):
            # All ranks raise alike, before any collective: the next call may well succeed.
            raise
        except BaseException:
            self.groups.forget()
            raise
        return compiled.captured.finish((bound.args, bound.kwargs), tensors, results)

    def _program(self, args: Any, kwargs: Any) -> tuple[Compiled, Executor]:
        try:
            whole = captured(self.model, args, kwargs)
            compiled = compile_program(whole, self.spec, self.groups.rank, self.dump)
        except Exception as error:
            # Told to the others, who else would wait for this rank's plan. All failing alike, the group lives on.
            self.control.agree("the plan", {"error": f"{type(error).__name__}: {error}"})
            raise
        self.control.agree("the plan", compiled.digest())
        if not compiled.seeds and self.spec.world_size > 1 and self.groups.rank == 0:
            warnings.warn(f"{type(self.model).__name__} under {self.spec}: {NOTHING}", stacklevel=4)
        self.programs[id(whole)] = compiled, Executor(compiled.local, self.model)
        return self.programs[id(whole)]


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


def parallelize(model: nn.Module, spec: str | dict | ShardingSpec, *, ranks: Sequence[int] | None = None,
                timeout: float = 600.0, check_inputs: bool = True, dump: Dump | None = None) -> Any:
    """Make ``model`` run on many devices. Every process calls this with the same model and spec.

    The result is called as the model was and returns what the model returned, on every rank. It shares the
    model's parameters and modules, so ``.to()``, loading weights and editing them act on both; the model itself
    stays as it was. Each new kind of call (shapes, dtypes, Python arguments, module structure) is captured once.

    Args:
        model: any DiT as a torch.nn.Module, in eval mode. Every rank holds the same weights.
        spec: ``"ulysses=2,ring=2"``, the same as a mapping, or a ShardingSpec.
        ranks: the global ranks that take part; all of them by default.
        timeout: seconds to wait for another rank before giving up with its name.
        check_inputs: compare the inputs of all ranks before each call (a checksum of each tensor, exchanged in one
            small message).
        dump: called with the name of each pass and the program it made.

    Raises:
        SpecError: the spec does not fit the processes or the model. CaptureError: the model cannot be captured.
        RankMismatch, RankFailure: another rank holds something else, or is gone.
    """
    spec = ShardingSpec.parse(spec)
    if isinstance(model, Parallel):
        raise SpecError("the model is parallel already; call parallelize on the original")
    if spec.world_size > 1 and not dist.is_initialized():
        init_from_env(timeout=timeout)
    chosen = list(ranks) if ranks is not None else list(range(dist.get_world_size() if dist.is_initialized() else 1))
    spec.check_world(len(chosen))
    return _stand_in(model, Runner(model, spec, chosen, timeout, check_inputs, dump))


class Parallel:
    """Marks a parallel model. ``runner`` holds its groups and programs."""

    runner: Runner


def _stand_in(model: nn.Module, runner: Runner) -> Any:
    """An instance of a subclass of the model's class that shares everything but forward.

    A subclass, because callers test for the class and read its attributes; an instance of its own, because the
    caller's model must keep its forward. Both have one ``__dict__``: what is set on one is set on the other.
    """
    if "forward" in vars(model):
        raise XditError(f"the forward of this {type(model).__name__} was replaced on the object, as offloading hooks "
                        "do, and would hide the parallel one; remove the hook first")
    cls = type(model)

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.runner(*args, **kwargs)

    made = type(cls.__name__, (Parallel, cls), {"forward": forward, "runner": runner, "__module__": cls.__module__,
                                                "__doc__": cls.__doc__})
    stand_in: Any = object.__new__(made)
    object.__setattr__(stand_in, "__dict__", vars(model))
    return stand_in


