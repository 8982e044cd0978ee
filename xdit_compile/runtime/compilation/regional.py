"""Compiles a local program function by function: each kind of block once, and what lies between blocks.

Weights are inputs of what is compiled, so that one function serves all blocks of a kind. Functions that are equal in
different programs, as in those of patches, are compiled once in a process.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import fx

from xdit_compile.ir.program import brings_parameters, crosses_steps, is_collective, is_write
from xdit_compile.progress import progress
from xdit_compile.runtime.compilation.graph_segments import Function, outline_segments
from xdit_compile.runtime.compilation.inductor_backend import inductor_compiler, usual_strides
from xdit_compile.runtime.compilation.onediff_backend import onediff_compiler
from xdit_compile.runtime.compilation.straight_line import Boxed, Choosing, boxed
from xdit_compile.spec import ShardingSpec

log = logging.getLogger(__name__)

_SHARED: WeakValueDictionary[Hashable, Function] = WeakValueDictionary()
"""What was made of each function, as long as a program calls it."""


def compiled(main: fx.GraphModule, spec: ShardingSpec) -> fx.GraphModule:
    """``main`` as ``spec`` asks for it to be run: the modules that it calls are what compilers have made.

    Compilers begin to work at the first call.

    Raises:
        SpecError: as ``compiler_for``.
    """
    if spec.backend == "eager":
        return main
    compiler = compiler_for(spec)

    def make(module: fx.GraphModule) -> Function:
        key = (spec.backend, spec.compile_mode, spec.onediff_backend, spec.compile_options, _content(module.graph))
        made = _SHARED.get(key)
        if made is not None:
            log.info("a function of %d nodes that %s has had before is used again", len(module.graph.nodes),
                     spec.backend)
            return made
        # A module whose code is written when it is first called is not what torch.compile can look into.
        made = compiler(fx.GraphModule({}, module.graph))
        if log.isEnabledFor(logging.INFO):
            made = _Timed(made, f"compiling a function of {len(module.graph.nodes)} nodes by {spec.backend}")
        _SHARED[key] = made
        return made

    # What is written, and where, is all that tells most functions of one patch from those of the next.
    stays = _stays_for_inductor if spec.backend == "inductor" else _stays
    blocks = {n: m for n, m in main.named_children() if isinstance(m, fx.GraphModule)}
    called = {n: outline_segments(m, stays, make, {}) if any(map(stays, m.graph.nodes)) else make(m)
              for n, m in blocks.items()}
    return outline_segments(main, stays, make, called)


class _Timed:
    """A function that tells once how long its first call took, in which compilers do their work."""

    def __init__(self, call: Function, what: str) -> None:
        self._call, self._what, self._told = call, what, False

    def __call__(self, *tensors: torch.Tensor) -> Any:
        if self._told:
            return self._call(*tensors)
        start, self._told = time.perf_counter(), True
        with progress(self._what):
            results = self._call(*tensors)
        log.info("%s took %.2f s", self._what, time.perf_counter() - start)
        return results

    def chosen(self, tensors: Sequence[torch.Tensor]) -> Boxed:
        """As of the function that it stands for."""
        return self._call.chosen(tensors) if isinstance(self._call, Choosing) else boxed(self._call)


def _stays(node: fx.Node) -> bool:
    """What a compiler that knows nothing of processes is not given, nor of memory that outlives a call."""
    return is_collective(node) or _stays_for_inductor(node)


def _stays_for_inductor(node: fx.Node) -> bool:
    """Writes into memory that outlives a call; and what goes on while functions run, whose memory a compiler would
    use again: how parameters come, and what has until the next step to arrive."""
    return is_write(node) or brings_parameters(node) or crosses_steps(node)


def compiler_for(spec: ShardingSpec) -> Callable[[fx.GraphModule], Function]:
    """What compiles one function for ``spec``, which must not be eager.

    Raises:
        SpecError: the compiler does not know the options, or is not there.
    """
    return onediff_compiler(spec) if spec.backend == "onediff" else inductor_compiler(spec)


def _content(graph: fx.Graph) -> Hashable:
    """Equal for graphs that compute the same from inputs alike, whatever their nodes are called."""
    index = {node: f"%{i}" for i, node in enumerate(graph.nodes)}
    content: list[Hashable] = []
    for node in graph.nodes:
        kind = _kind(node) if node.op == "placeholder" else None
        target = node.target if node.op == "call_function" else None
        content.append((node.op, target, repr(fx.map_arg((node.args, node.kwargs), index.__getitem__)), kind))
    return tuple(content)


class _Kind(NamedTuple):
    """What a function is compiled for, of one of its inputs."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def _kind(node: fx.Node) -> _Kind:
    like = node.meta["val"]
    strides = usual_strides(like.shape) if like.is_contiguous() else like.stride()
    return _Kind(like.shape, strides, like.dtype, like.device)
