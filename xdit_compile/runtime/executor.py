"""Runs a local program: feeds it the model's parameters as they are now, and compiles it if asked to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from xdit_compile.program import Program

INDUCTOR_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {
    # Collectives must come in one order on every rank; ranks with uneven shares have different graphs, for
    # which a scheduler that goes by memory might choose different orders.
    "reorder_for_peak_memory": False,
}


class Executor:
    """A program bound to a model: called with the flat argument tensors, it returns the flat results."""

    def __init__(self, program: Program, model: nn.Module) -> None:
        assert program.spec is not None
        self.program = program
        self._module = _compiled(program.main) if program.spec.backend == "inductor" else program.main
        self._slots = [_slot(model, program, i.kind, i.name) for i in program.inputs]

    def __call__(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        given = iter(tensors)
        arguments = [next(given) if slot is None else slot[0][slot[1]] for slot in self._slots]
        with torch.no_grad():
            return self._module(*arguments)


def _slot(model: nn.Module, program: Program, kind: str, name: str) -> tuple[dict, str] | None:
    """Where to read an input at each call: the module's own table, so that replaced parameters are seen."""
    if kind == "argument":
        return None
    if kind == "constant":
        return dict(program.constants), name
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    return (owner._parameters if leaf in owner._parameters else owner._buffers), leaf


def _compiled(main: fx.GraphModule) -> nn.Module:
    """Each block function is compiled once and called for every block; a program without any, as a whole."""
    blocks = {n: m for n, m in main.named_children() if isinstance(m, fx.GraphModule)}
    if not blocks:
        return _compile(main)
    return fx.GraphModule({n: _compile(m) for n, m in blocks.items()}, main.graph, "main")


def _compile(module: fx.GraphModule) -> nn.Module:
    # A module whose code is written when it is first called is not what torch.compile can look into.
    written = fx.GraphModule({}, module.graph)
    return torch.compile(written, fullgraph=True, dynamic=False, options=INDUCTOR_OPTIONS)  # type: ignore[return-value]
