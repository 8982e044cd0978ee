"""A module's forward as one functional ATen graph, in one run of its code on fake tensors.

What ``torch.export`` and ``run_decompositions({})`` make in three runs (trace, functionalize, trace again) is made
at once: operators are recorded below autograd and autocast, writes become new values, and operators that PyTorch
would take apart but that have one meaning (attention, linear, norms) stay whole. Shapes are static.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils.stateless import _reparametrize_module
from torch.overrides import TorchFunctionMode

from xdit_compile.errors import CaptureError
from xdit_compile.frontend.composite_operators import composites_kept
from xdit_compile.frontend.flex_attention import FLEX, lifted
from xdit_compile.frontend.looks import check_dress, dress, original_of
from xdit_compile.frontend.stand_ins import stand_in
from xdit_compile.ir.packed_tensors import is_packed, named_parts, whole_name
from xdit_compile.ir.program import Input, drop_unused
from xdit_compile.ir.pytree import sharing
from xdit_compile.ir.released_parameters import device_of


@dataclass(frozen=True)
class Traced:
    """A graph, what its placeholders stand for, the values of its constants, which arguments it writes into (its first
    results are their new values), and which parameters and buffers the model put other tensors in the place of."""

    module: fx.GraphModule
    inputs: tuple[Input, ...]
    constants: dict[str, Tensor]
    written: tuple[int, ...]
    exchanged: tuple[str, ...]

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph


class StateWritten(CaptureError):
    """Raised when forward writes into parameters, buffers or tensor attributes, which ``names`` names."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(f"the forward writes into {', '.join(names)}; a program has no state. Return the new value "
                         "instead, or move the write out of forward")
        self.names = tuple(names)


def as_fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """A fake tensor that looks like this one; instead of the meta device, which some operations (autocast, masks that
    are read) refuse, on the CPU, or where it was before it was given up. Of one that is packed, one of fake parts."""
    return stand_in(tensor, lambda part: _fake(part, mode)) if is_packed(tensor) else _fake(tensor, mode)


def _fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    if isinstance(tensor, FakeTensor):
        return tensor
    if tensor.is_meta or device_of(tensor) != tensor.device:
        with mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device_of(tensor))
    # Whoever notes down what the model asks PyTorch for is not told of this: before 2.13 it would be.
    with torch._C.DisableTorchFunction():
        return mode.from_tensor(tensor, static_shapes=True)


@contextmanager
def fake_state(module: nn.Module, mode: FakeTensorMode, without: Collection[str] = ()) -> Iterator[None]:
    """Within, parameters and buffers are fake, except those of the submodules at the paths ``without``."""
    inside = tuple(f"{path}." for path in without)
    held = {n: t for n, t in [*module.named_parameters(), *module.named_buffers()] if not n.startswith(inside)}
    state = {n: as_fake(t, mode) for n, t in held.items()}
    for name, fake in state.items():
        dress(fake, held[name])
    with _reparametrize_module(module, state, tie_weights=True), _in_containers(
            module, {id(held[n]): fake for n, fake in state.items()}):
        yield


@contextmanager
def _in_containers(module: nn.Module, stand_ins: Mapping[int, Tensor]) -> Iterator[None]:
    """Within, lists and dictionaries that a module has for attributes hold what stands in for tensors, by identity."""
    held = [(c, k, v) for m in module.modules() for name, c in vars(m).items()
            if type(c) in (list, dict) and name not in ("_parameters", "_buffers")
            for k, v in (enumerate(c) if isinstance(c, list) else [*c.items()]) if id(v) in stand_ins]
    for container, key, tensor in held:
        container[key] = stand_ins[id(tensor)]
    try:
        yield
    finally:
        for container, key, tensor in held:
            if (key < len(container) if isinstance(container, list) else key in container) and (
                    container[key] is stand_ins[id(tensor)]):
                container[key] = tensor


def traced(function: Callable[..., tuple[Tensor, ...]], model: nn.Module, tensors: Sequence[Tensor],
           mode: FakeTensorMode) -> Traced:
    """The graph of ``function(*tensors)``, which calls ``model``; to be called within ``export_conventions()``.

    Nodes have ``val``, ``stack_trace`` and ``nn_module_stack`` in their meta, the last with paths in ``model``.

    Raises:
        CaptureError: the model's state is written into.
    """
    constants = {f"{p}.{n}".lstrip("."): t for p, m in model.named_modules() for n, t in vars(m).items()
                 if isinstance(t, Tensor)}
    whole = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    state = named_parts(whole)
    packed = {n: t for n, t in whole.items() if is_packed(t)}
    inputs = [*(Input("parameter", n) for n in state), *(Input("constant", n) for n in constants),
              *(Input("argument", f"arg_{i}") for i in range(len(tensors)))]
    written: list[int] = []
    changed: list[str] = []
    exchanged: list[str] = []

    def run(*flat: Tensor) -> tuple[Tensor, ...]:
        apart = [FunctionalTensor.to_functional(t) for t in flat]
        # Two that are one tensor stay one: code may ask whether they are.
        held = [apart[i] for i in sharing(values)]
        for original, made in zip(values, held, strict=True):
            dress(made, original)
        dressed = [dict(vars(t)) for t in held]
        named: dict[Input, Any] = {i: t for i, t in zip(inputs, held, strict=True) if i.kind != "argument"}
        given = held[len(named):]
        by_id: dict[int, Tensor] = {id(t): s for t, s in zip(values, held, strict=True)}
        own = {i: t for i, t in named.items() if whole_name(i.name) not in packed}
        for name, tensor in packed.items():
            if id(tensor) not in by_id:
                by_id[id(tensor)] = stand_in(tensor, lambda part: by_id[id(part)])
                dress(by_id[id(tensor)], tensor)
            own[Input("parameter", name)] = by_id[id(tensor)]
        with _in_containers(model, by_id), _holding(model, own), _stamped(model):
            results = function(*given)
            for what, tensor, before in zip(inputs, held, dressed, strict=True):
                check_dress(tensor, what.name, before)
            changed.extend(i.name for i, t in named.items() if _written(t))
            exchanged.extend(_exchanged(model, own))
        if resized := [i for i, t in enumerate(given) if t.shape != tensors[i].shape]:
            raise CaptureError(f"the forward resizes tensor {resized[0]} of its arguments; give it one of the size "
                               "that it ends up with, or return the result")
        written.extend(i for i, t in enumerate(given) if _written(t))
        return tuple(map(_plain, [*(given[i] for i in written), *results]))

    values = [*state.values(), *constants.values(), *tensors]
    with ExitStack() as stack:
        for context in (tracing(TracingContext(mode)), mode, enable_python_dispatcher(), torch.no_grad()):
            stack.enter_context(context)
        functional = FunctionalTensorMode(export=True)

        def functionalized(*flat: Tensor) -> tuple[Tensor, ...]:
            above = torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize))
            with above, functional, _Respelled():
                return run(*flat)

        made = make_fx(functionalized, decomposition_table={}, _allow_non_fake_inputs=True,
                       record_stack_traces=True)(*_fakes(values, mode))
    drop_unused(made.graph)
    # What is put in the place of a buffer before anyone reads that may be no state, if the next call does it again.
    read = {whole_name(i.name) for i, n in zip(inputs, made.graph.find_nodes(op="placeholder"), strict=True) if n.users}
    if lost := sorted({*changed, *(read & set(exchanged))}):
        raise StateWritten(lost)
    return Traced(made, tuple(inputs), constants, tuple(written), tuple(exchanged))


def _moved_to_its_place(tensor: Tensor, other: Tensor) -> bool:
    """Whether ``other`` is ``tensor`` itself, or what moving it to the device where it is made of it, as hooks of
    offloading do: there is one of this type, by another spelling (cpu, cpu:0)."""
    alike = (tensor.shape, tensor.stride(), tensor.dtype) == (other.shape, other.stride(), other.dtype)
    return tensor is other or (alike and tensor.device != other.device and tensor.device.type == other.device.type)


class _Respelled(TorchFunctionMode):
    """What tracing would refuse or get wrong, written in another way.

    Autocast casts the operands of the matrix product inside einsum; kept whole, einsum would hide that. Filling a
    diagonal in place goes through a strided view, which cannot be made functional; filling a mask can. A choice among
    the kernels of one operator is no part of a graph. Tensors that functions given to ``flex_attention`` close over are
    not seen by who makes them functional.
    """

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _SET_DATA and not _moved_to_its_place(*args):
            cls = type(original_of(args[0]))
            raise CaptureError(f"the forward gives a tensor ({cls.__module__}.{cls.__qualname__}) other memory "
                               "(x.data = ...), which no graph can hold; write into it in place, x.copy_(...), or use "
                               "the new value itself. If it does so at its first call alone, as some quantized layers "
                               "pack their weights, call the model once as it is before")
        if func is Tensor.fill_diagonal_ and len(args) == 2 and args[0].ndim == 2 and not kwargs:
            return args[0].masked_fill_(torch.eye(*args[0].shape, dtype=torch.bool, device=args[0].device), args[1])
        if func is torch.einsum and isinstance(args[0], str):
            equation, *operands = args
            parts = operands[0] if isinstance(operands[0], (list, tuple)) else operands
            device = parts[0].device.type
            if torch.is_autocast_enabled(device):
                if len(parts) > 2:
                    raise CaptureError(f"einsum of {len(parts)} tensors ({equation}) under autocast is not supported; "
                                       "write it as several of two")
                if _contracts(equation, parts):
                    low = torch.get_autocast_dtype(device)
                    parts = [p.to(low) if p.is_floating_point() and p.dtype is not torch.float64 else p for p in parts]
                return torch.einsum(equation, *parts)
        if func is torch.nn.functional.scaled_dot_product_attention:
            _check_kernels()
        if func is FLEX:
            q, k, v, score_mod, (*blocks, mask_mod), scale, options, scored, masked = args
            (score_mod, more), (mask_mod, others) = lifted(score_mod), lifted(mask_mod)
            args = q, k, v, score_mod, (*blocks, mask_mod), scale, options, (*scored, *more), (*masked, *others)
        # Around operators alone: what the model is told of libraries is what they are set to.
        with _NoBackend():
            return func(*args, **(kwargs or {}))


def _kernels() -> frozenset[str]:
    """Of attention, those of PyTorch's that are switched on."""
    cuda = torch.backends.cuda
    return frozenset(name for name, on in (
        ("FLASH_ATTENTION", cuda.flash_sdp_enabled()), ("EFFICIENT_ATTENTION", cuda.mem_efficient_sdp_enabled()),
        ("MATH", cuda.math_sdp_enabled()), ("CUDNN_ATTENTION", cuda.cudnn_sdp_enabled())) if on)


_callers_kernels: ContextVar[frozenset[str]] = ContextVar("callers_kernels")
"""Those that were switched on when the model was called."""


def _check_kernels() -> None:
    """Refuse a choice that the forward makes.

    Raises:
        CaptureError: naming what it chose.
    """
    left = _kernels()
    if gone := _callers_kernels.get(left) - left - {"CUDNN_ATTENTION"}:
        raise CaptureError(f"the forward chooses the kernels of attention itself ({', '.join(sorted(left))}, by "
                           f"torch.nn.attention.sdpa_kernel, without {', '.join(sorted(gone))}), which no program "
                           "holds. Leave the choice out (of a model of diffusers, set_attention_backend('native')) and "
                           "say attention_kernel=NAME in the spec, or call the model inside of sdpa_kernel")


_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]


def _contracts(equation: str, operands: Sequence[Tensor]) -> bool:
    """Whether einsum multiplies matrices: two operands share a letter that is not in the result."""
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    sizes = [dict(zip(t, x.shape, strict=True)) for t, x in zip(terms, operands, strict=True) if "." not in t]
    shared = set.intersection(*map(set, terms)) - {".", *(out if arrow else "")}
    return len(operands) == 2 and any(all(size[letter] > 1 for size in sizes) for letter in shared)


def _fakes(values: Sequence[Tensor], mode: FakeTensorMode) -> Iterator[Tensor]:
    """A fake tensor for each, an own one also where two are the same: they need not be in the next call."""
    seen: set[int] = set()
    for value in values:
        fake = as_fake(value, mode)
        if id(fake) in seen:
            fake = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=fake.device)
        seen.add(id(fake))
        yield fake


@contextmanager
def export_conventions() -> Iterator[None]:
    """Within, ``traced`` may be called: composite operators that neither write nor return views of their inputs are
    recorded as they are."""
    own, kernels = (FunctionalTensor.tolist, FunctionalTensor.__repr__), _callers_kernels.set(_kernels())
    # Its own ask the tensor inside, where nobody who knows the values is asked.
    FunctionalTensor.tolist = Tensor.tolist  # type: ignore[method-assign]
    FunctionalTensor.__repr__ = Tensor.__repr__  # type: ignore[method-assign, assignment]
    try:
        with composites_kept():
            yield
    finally:
        FunctionalTensor.tolist, FunctionalTensor.__repr__ = own  # type: ignore[method-assign]
        _callers_kernels.reset(kernels)


class _NoBackend:
    """Within, operators are as they are everywhere, not in the forms of one library. ``torch.export`` has the same,
    which takes as long to import as PyTorch itself; this one is entered for each operator."""

    __slots__ = ("_before",)

    def __enter__(self) -> None:
        self._before = [get() for get, _ in _BACKENDS]
        for _, put in _BACKENDS:
            put(False)

    def __exit__(self, *raised: object) -> None:
        for (_, put), before in zip(_BACKENDS, self._before, strict=True):
            put(before)


_BACKENDS: tuple[tuple[Callable[[], bool], Callable[[bool], None]], ...] = (
    (torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled),
    (torch._C._get_nnpack_enabled, torch._C._set_nnpack_enabled),
    (torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled),
)


@contextmanager
def _holding(model: nn.Module, named: dict[Input, Any]) -> Iterator[None]:
    """Within, the model's parameters, buffers and tensor attributes are these."""
    attributes = [(vars(model.get_submodule(i.name.rpartition(".")[0])), i.name.rpartition(".")[2], t)
                  for i, t in named.items() if i.kind == "constant"]
    before = [state[name] for state, name, _ in attributes]
    with _reparametrize_module(model, {i.name: t for i, t in named.items() if i.kind == "parameter"},
                               tie_weights=False):
        try:
            for state, name, tensor in attributes:
                state[name] = tensor
            yield
        finally:
            for (state, name, stand_in), tensor in zip(attributes, before, strict=True):
                if state.get(name) is stand_in:  # else the model's forward has put another there, which is to be seen
                    state[name] = tensor


def _exchanged(model: nn.Module, named: dict[Input, Any]) -> list[str]:
    """Names of parameters and buffers in the place of which the forward has put other tensors."""
    state = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    return [i.name for i, t in named.items() if i.kind == "parameter" and state.get(i.name) is not t]


def _written(tensor: Any) -> bool:
    return torch._functionalize_has_data_mutation(tensor.elem)  # type: ignore[attr-defined]


def _plain(tensor: Tensor) -> Tensor:
    """The value that a functional tensor has by now."""
    if not isinstance(tensor, FunctionalTensor):
        return tensor
    torch._sync(tensor)
    return torch._from_functional_tensor(tensor.elem)


@contextmanager
def _stamped(model: nn.Module) -> Iterator[None]:
    """Within, nodes get the path and the class of the modules of ``model`` that are running."""
    names = {id(m): (path, type(m).__qualname__) for path, m in model.named_modules()}
    running = [("", type(model).__qualname__)]
    proxies = get_proxy_mode()
    assert proxies is not None
    tracer: Any = proxies.tracer
    create = tracer.create_node

    def stamped(*args: Any, **kwargs: Any) -> fx.Node:
        node = create(*args, **kwargs)
        node.meta["nn_module_stack"] = {path: (path, cls) for path, cls in running}
        return node

    def enter(module: nn.Module, _: Any) -> None:
        if id(module) in names:
            running.append(names[id(module)])

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        if id(module) in names:
            running.pop()

    hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)
    tracer.create_node = stamped
    try:
        yield
    finally:
        del tracer.create_node
        for hook in hooks:
            hook.remove()
