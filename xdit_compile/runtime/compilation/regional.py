"""Compiles a local program function by function: each kind of block once, and what lies between blocks.

Weights are inputs of what is compiled, so that one function serves all blocks of a kind. Functions that are equal in
different programs, as in those of patches, are compiled once in a process.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable
from difflib import get_close_matches
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import fx, nn

from xdit_compile.errors import SpecError
from xdit_compile.ir.program import is_collective, is_write
from xdit_compile.runtime.compilation.graph_segments import Function, outline_segments
from xdit_compile.runtime.compilation.onediff_backend import onediff_compiler
from xdit_compile.spec import ShardingSpec

INDUCTOR_OPTIONS: dict[str, Any] = {
    # Collectives must come in one order on every rank; ranks with uneven shares have different graphs, for
    # which a scheduler that goes by memory might choose different orders.
    "reorder_for_peak_memory": False,
    # Would move work that fills the time between start and wait of a collective behind the wait, to where it is read.
    "reorder_for_locality": False,
}

log = logging.getLogger(__name__)

_SHARED: WeakValueDictionary[Hashable, Function] = WeakValueDictionary()
"""What was made of each function, as long as a program calls it."""


def compiled(main: fx.GraphModule, spec: ShardingSpec) -> Function:
    """What runs ``main`` as ``spec`` asks for: called with its inputs in order, it returns its results.

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
            made = _timed(made, f"{spec.backend} compiled a function of {len(module.graph.nodes)} nodes")
        _SHARED[key] = made
        return made

    # What is written, and where, is all that tells most functions of one patch from those of the next.
    stays = is_write if spec.backend == "inductor" else _stays
    blocks = {n: m for n, m in main.named_children() if isinstance(m, fx.GraphModule)}
    called = {n: outline_segments(m, stays, make, {}) if any(map(stays, m.graph.nodes)) else make(m)
              for n, m in blocks.items()}
    return outline_segments(main, stays, make, called)


def _timed(call: Function, what: str) -> Function:
    """``call``, which tells once how long its first call took, in which compilers do their work."""
    told = False

    def called(*tensors: torch.Tensor) -> Any:
        nonlocal told
        if told:
            return call(*tensors)
        start, told = time.perf_counter(), True
        results = call(*tensors)
        log.info("%s in %.2f s", what, time.perf_counter() - start)
        return results

    return called


def _stays(node: fx.Node) -> bool:
    """What a compiler that knows nothing of processes is not given, nor of memory that outlives a call."""
    return is_collective(node) or is_write(node)


def compiler_for(spec: ShardingSpec) -> Callable[[fx.GraphModule], Function]:
    """What compiles one function for ``spec``, which must not be eager.

    Raises:
        SpecError: the compiler does not know the options, or is not there.
    """
    return onediff_compiler(spec) if spec.backend == "onediff" else _inductor(spec)


def _inductor(spec: ShardingSpec) -> Callable[[fx.GraphModule], Function]:
    from torch._inductor import list_mode_options, list_options

    for name in spec.options:
        if name not in list_options():
            near = ", ".join(get_close_matches(name, list_options()))
            raise SpecError(f"compile_options names {name!r}, which is no option of torch.compile"
                            f"{near and f'; near to it: {near}'}; torch._inductor.list_options() lists them")
    # torch.compile takes a mode or options, not both.
    options = {**INDUCTOR_OPTIONS, **list_mode_options(spec.compile_mode), **spec.options}

    compile_with = partial(torch.compile, fullgraph=True, dynamic=False, options=options)
    try:
        compile_with(lambda: None)  # which looks at the types of options
    except RuntimeError as error:
        raise SpecError(f"torch.compile refuses compile_options={spec.compile_options}: {error}") from error

    def compiler(module: fx.GraphModule) -> Function:
        call = _laid_out(module.graph, compile_with(module.forward))
        return _in_place(call) if options.get("triton.cudagraphs") else call

    return compiler


def _laid_out(graph: fx.Graph, call: Function) -> Function:
    """``call``, given tensors whose dimensions of size one have the usual strides. What these are depends on where a
    tensor comes from and means nothing, but it would be compiled for."""
    shapes = [_kind(n).shape for n in graph.find_nodes(op="placeholder")]
    usual = [(i, _usual_strides(shape)) for i, shape in enumerate(shapes) if 1 in shape]

    def called(*tensors: torch.Tensor) -> Any:
        given = list(tensors)
        for i, strides in usual:
            t = given[i]
            if t.stride() != strides and t.is_contiguous():
                given[i] = t.as_strided(t.shape, strides)
        return call(*given)

    return called if usual else call


def _usual_strides(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def _in_place(call: Function) -> Function:
    """``call``, for whose CUDA graphs weights stay where they are: other inputs are copied at each call."""
    def called(*tensors: torch.Tensor) -> Any:
        for t in tensors:
            if isinstance(t, nn.Parameter):
                torch._dynamo.mark_static_address(t, guard=False)
        return call(*tensors)

    return called


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
    strides = _usual_strides(like.shape) if like.is_contiguous() else like.stride()
    return _Kind(like.shape, strides, like.dtype, like.device)
