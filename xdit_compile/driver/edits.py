"""Edits of a parallel model whose parameters this rank has given up but for its shares, or its stage: adapters that are
loaded find something of the right shape in their places, and what is done to all modules finds the values, block by
block; those of other stages are their ranks' affair."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from xdit_compile.ir.layout import TENSOR
from xdit_compile.ir.mesh import SHARD
from xdit_compile.ir.parameter_groups import is_block
from xdit_compile.ir.released_parameters import device_of, given_up
from xdit_compile.runtime.execution.parameter_store import ParameterStore, swapped
from xdit_compile.runtime.execution.whole_parameters import WholeParameters
from xdit_compile.runtime.parallel_group import ParallelGroup

LOADING = ("load_lora_adapter", "load_adapter")
"""Methods of diffusers' and transformers' models that put modules around others, with values that come from elsewhere.
They ask the weights that are there for their shapes, types and devices."""

Holder = Callable[[], tuple[ParameterStore, ParallelGroup] | None]
"""Gives the shares of a model, once it has some, and who has the others."""


def edits(cls: Any, holder: Holder) -> dict[str, Any]:
    """Methods for a parallel model of the class ``cls``, in place of its own."""
    return {**loading(cls, holder), "apply": _applying(cls.apply, holder)}


def loading(cls: Any, holder: Holder) -> dict[str, Any]:
    """Those of them that load adapters."""
    return {name: _loading(getattr(cls, name), holder) for name in LOADING if hasattr(cls, name)}


def _loading(method: Callable[..., Any], holder: Holder) -> Callable[..., Any]:
    @functools.wraps(method)
    def load(self: Any, *args: Any, **kwargs: Any) -> Any:
        held = holder()
        if left := held[0].left if held else given_up(self):
            with _shapes(self, left):
                return method(self, *args, **kwargs)
        return method(self, *args, **kwargs)

    return load


@contextmanager
def _shapes(model: nn.Module, left: Sequence[torch.Tensor]) -> Iterator[None]:
    """Within, parameters that were given up look as if they were there. They take no memory, cannot be written into,
    and who computes with them gets no numbers."""
    table = {id(t): nn.Parameter(torch.full((), _nothing(t.dtype), dtype=t.dtype, device=device_of(t)).expand(t.shape),
                                 requires_grad=False) for t in left}
    with swapped(model, table):
        yield


def _nothing(dtype: torch.dtype) -> float:
    return float("nan") if dtype.is_floating_point else 0


def _applying(method: Callable[..., Any], holder: Holder) -> Callable[..., Any]:
    @functools.wraps(method)
    def apply(self: Any, function: Callable[[nn.Module], None]) -> Any:
        held = holder()
        if held is None:
            return _with_stand_ins(self, function) if given_up(self) else method(self, function)
        store, group = held
        store.check(self)
        group.control.agree("apply", {"function": getattr(function, "__qualname__", type(function).__qualname__)})
        groups = group.process_groups
        whole = WholeParameters(store, groups.along(SHARD), groups.along(TENSOR))
        with group.control.guard("apply", tuple(group.process_groups.all())):
            _block_by_block(self, function, store, whole)
        return self

    return apply


def _with_stand_ins(model: nn.Module, function: Callable[[nn.Module], None]) -> Any:
    """Call ``function`` with each module of a model of which other stages have parts, those inside of others first. It
    finds zeros in the place of what other ranks have, which see to that themselves."""
    blocks = [m for path, m in model.named_modules() if is_block(path) and not any(map(is_block, _above(path)))]
    _apply(model, function, [(block, _zeros_in(model, block)) for block in blocks], nullcontext())
    return model


@contextmanager
def _zeros_in(model: nn.Module, block: nn.Module) -> Iterator[None]:
    """Within, what the block lacks is there, as zeros."""
    made = {id(t): nn.Parameter(torch.zeros(t.shape, dtype=t.dtype, device=device_of(t)), requires_grad=False)
            for t in given_up(block)}
    with swapped(model, made):
        yield


def _above(path: str) -> Iterator[str]:
    """Of the modules that hold the one at ``path``."""
    while path := path.rpartition(".")[0]:
        yield path


def _block_by_block(model: nn.Module, function: Callable[[nn.Module], None], store: ParameterStore,
                    whole: WholeParameters) -> None:
    """Call ``function`` with each module, those inside of others first, while the parameters of its block are there: as
    they are on one device. What it writes into them is in the shares afterwards."""
    blocks: dict[str, list[str]] = {}
    for name in store:
        path = store.groups[name].path
        blocks.setdefault(path if is_block(path) else "", []).append(name)
    outside = blocks.pop("", [])
    _apply(model, function, [(model.get_submodule(path), _present(model, names, store, whole))
                             for path, names in blocks.items()], _present(model, outside, store, whole))


def _apply(model: nn.Module, function: Callable[[nn.Module], None],
           blocks: Sequence[tuple[nn.Module, AbstractContextManager[None]]],
           outside: AbstractContextManager[None]) -> None:
    """Call ``function`` with the modules of each block within what goes with it, and with all others."""
    done: set[int] = set()
    for block, within in blocks:
        with within:
            block.apply(function)
        done |= set(map(id, block.modules()))
    with outside:
        for module in _inner_first(model):
            if id(module) not in done:
                done.add(id(module))
                function(module)


@contextmanager
def _present(model: nn.Module, names: Sequence[str], store: ParameterStore, whole: WholeParameters) -> Iterator[None]:
    """Within, the parameters of these groups are there, whole."""
    values: Mapping[str, Mapping[str, torch.Tensor]] = {name: whole.gathered(name) for name in names}
    tensors = store.left_by_name()
    made = {n: nn.Parameter(value, requires_grad=False) for of in values.values() for n, value in of.items()}
    table = {id(tensors[n]): parameter for n, parameter in made.items()}
    with swapped(model, table):
        yield
    for name, of in values.items():
        whole.put(name, {n: made[n].detach() for n in of})


def _inner_first(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from _inner_first(child)
    yield module
