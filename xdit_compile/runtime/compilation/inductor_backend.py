"""Hands functions to inductor, without dynamo: they are graphs already, and nothing has to be guarded at each call.

What a function is compiled for is known from the program it is in, but for the strides of what it is given: weights
and arguments may come in any. For each set of strides that it meets it is compiled once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext

from xdit_compile.errors import SpecError
from xdit_compile.runtime.compilation.graph_segments import Function
from xdit_compile.runtime.compilation.straight_line import Boxed, boxed
from xdit_compile.spec import ShardingSpec

INDUCTOR_OPTIONS: dict[str, Any] = {
    # Collectives must come in one order on every rank; ranks with uneven shares have different graphs, for
    # which a scheduler that goes by memory might choose different orders.
    "reorder_for_peak_memory": False,
    # Would move work that fills the time between start and wait of a collective behind the wait, to where it is read.
    "reorder_for_locality": False,
    # Would have ranks compare their graphs while they compile, and stages, whose graphs differ, wait for each other.
    "aten_distributed_optimizations.spmd_check": False,
}

CUDA_GRAPHS = "triton.cudagraphs"


def inductor_compiler(spec: ShardingSpec) -> Callable[[fx.GraphModule], Function]:
    """What compiles one function with inductor as ``spec`` asks for.

    Raises:
        SpecError: torch.compile does not know the options.
    """
    from torch._inductor import list_mode_options, list_options

    for name in spec.options:
        if name not in list_options():
            near = ", ".join(get_close_matches(name, list_options()))
            raise SpecError(f"compile_options names {name!r}, which is no option of torch.compile"
                            f"{near and f'; near to it: {near}'}; torch._inductor.list_options() lists them")
    # torch.compile takes a mode or options, not both. CUDA graphs are made of whole forwards, and elsewhere.
    options = {**own_options(), **list_mode_options(spec.compile_mode), **spec.options}
    options.pop(CUDA_GRAPHS, None)
    try:
        torch.compile(lambda: None, options=options)  # which looks at the types of options
    except RuntimeError as error:
        raise SpecError(f"torch.compile refuses compile_options={spec.compile_options}: {error}") from error
    return lambda module: CompiledFunction(module, options)


def own_options() -> dict[str, Any]:
    """`INDUCTOR_OPTIONS`, as far as this version of PyTorch has them: what it has not it does not do either."""
    from torch._inductor import list_options

    return {name: value for name, value in INDUCTOR_OPTIONS.items() if name in list_options()}


def asks_for_graphs(spec: ShardingSpec) -> bool:
    """Whether a forward is to be a CUDA graph, by its mode or by an option."""
    from torch._inductor import list_mode_options

    options = {**list_mode_options(spec.compile_mode), **spec.options}
    return spec.backend == "inductor" and bool(options.get(CUDA_GRAPHS))


class CompiledFunction:
    """A function that is compiled when it is first called with tensors of these sizes and strides.

    Strides of dimensions of size one depend on where a tensor comes from and mean nothing: it is compiled for the usual
    ones.
    """

    def __init__(self, module: fx.GraphModule, options: dict[str, Any]) -> None:
        self._module, self._options = module, options
        self._made: dict[Hashable, Function] = {}

    def __call__(self, *tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        return self._of(tensors)(*tensors)

    def chosen(self, tensors: Sequence[torch.Tensor]) -> Boxed:
        """What runs for tensors that look like these, with which it was called before."""
        made = self._of(tensors)
        return made.run if isinstance(made, _Bare) else boxed(made)

    def _of(self, tensors: Sequence[torch.Tensor]) -> Function:
        usual = [_usual(t) for t in tensors]
        key = tuple((t.shape, strides) for t, strides in zip(tensors, usual, strict=True))
        if key not in self._made:
            self._made[key] = self._compile([
                t if t.stride() == strides else t.as_strided(t.shape, strides)
                for t, strides in zip(tensors, usual, strict=True)])
        return self._made[key]

    def _compile(self, tensors: Sequence[torch.Tensor]) -> Function:
        from torch._inductor.compile_fx import compile_fx_inner  # as slow to import as PyTorch itself

        inner: list[tuple[Any, Any]] = []

        def kept(*args: Any, **kwargs: Any) -> Any:
            inner.append((compile_fx_inner(*args, **kwargs), TracingContext.get().fw_metadata))
            return inner[-1][0]

        # That cache would give the whole without what is inside; what inductor makes has one of its own.
        with torch._functorch.config.patch(enable_autograd_cache=False):
            whole = torch._inductor.standalone_compile(
                self._module, list(tensors), dynamic_shapes="from_example_inputs",
                options={"config_patches": self._options, "inner_compile": kept})
        if len(inner) != 1 or not _is_bare(inner[0][1], len(tensors)):
            return whole
        return _Bare(whole, inner[0][0])


class _Bare:
    """A compiled function without what AOTAutograd puts around it at each call, which takes as long as a few kernels:
    it sees to gradients, and to results that are views of arguments, of which there are none."""

    def __init__(self, whole: Function, graph: Any) -> None:
        self._whole: Function | None = whole
        self._graph = graph
        """Lives as long as its code."""
        self.run: Boxed = self._first

    def __call__(self, *tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        return self.run([*tensors])

    def _first(self, tensors: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        """At its first call a function ends what it has begun while it was compiled."""
        assert self._whole is not None
        results, self._whole = self._whole(*tensors), None
        self.run = self._graph.current_callable
        return results


def _is_bare(metadata: Any, inputs: int) -> bool:
    """Whether a function gives what it computes, as it is, of what it is given, as that is."""
    return metadata is not None and len(metadata.input_info) == inputs and not (
        metadata.num_mutated_inp_runtime_indices or metadata.num_outputs_aliased or metadata.tokens
        or metadata.is_rng_op_functionalized or metadata.num_intermediate_bases)


def _usual(tensor: torch.Tensor) -> tuple[int, ...]:
    """Its strides; where dimensions of size one make them other than they would have to be, the usual ones."""
    if 1 in tensor.shape and tensor.is_contiguous():
        return usual_strides(tensor.shape)
    return tensor.stride()


def usual_strides(shape: torch.Size) -> tuple[int, ...]:
    """Of a contiguous tensor that was just made."""
    return torch.empty(shape, device="meta").stride()
