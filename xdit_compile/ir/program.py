"""The program: a captured forward as a graph of ATen operators, with its parameters by reference.

``main`` is the model's forward. Where a model runs structurally identical blocks, ``main`` calls one shared
**block function** for all of them (a ``call_module`` node whose arguments are that block's parameters and
inputs), so that every later step (search, rewriting, printing, compiling) looks at each kind of block once.
A program's graphs are never edited after it is made; a pass builds new ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule

from xdit_compile.ir.guards import Guards
from xdit_compile.ir.output_spec import OutputSpec
from xdit_compile.ir.pass_record import PassRecord
from xdit_compile.ir.pytree import Structure
from xdit_compile.ir.stale_cache import update_and_read
from xdit_compile.spec import ShardingSpec

Part = tuple[tuple[tuple[int, int], ...], ...]
"""Index ranges of each dimension."""


@dataclass(frozen=True)
class Input:
    """What a placeholder of ``main`` stands for: a parameter or buffer by its name in the model, a constant made
    inside forward, or the n-th tensor among the flattened arguments of the call. In a stage of a pipeline also a
    value computed ``once`` per step, one ``received`` from another stage, or a ``cache`` that outlives the call; where
    values are kept from step to step, one of these ``invariant`` ones; where parameters come block by block, this
    rank's ``parameter_share`` of a group, by the group's name."""

    kind: Literal["parameter", "constant", "argument", "once", "received", "cache", "invariant",
                  "parameter_share"]
    name: str
    part: Part | None = None
    """Of a parameter that ranks share out: the index ranges of each dimension that this rank takes; None for all."""


def part_of(tensor: torch.Tensor, part: Part) -> torch.Tensor:
    """The index ranges ``part`` of each dimension of a parameter: a view, where each dimension has one range."""
    with torch.no_grad():
        for dim, spans in enumerate(part):
            pieces = [tensor.narrow(dim, start, stop - start) for start, stop in spans or ((0, 0),)]
            tensor = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
    return tensor


@dataclass(frozen=True)
class Note:
    """One thing a pass decided, for the report and for the check that all ranks decided the same."""

    kind: Literal["seed", "attention", "gather", "fallback", "collective", "canonical", "stale", "cache"]
    node: str
    text: str
    module: str = ""
    source: str = ""
    function: str = "main"
    size: int = 0
    """Bytes sent by this rank, where the note is about traffic; ranks may differ in it."""

    def __str__(self) -> str:
        return f"{self.kind} {self.function}.{self.node}: {self.text}"


@dataclass(frozen=True)
class Program:
    """A forward pass: graphs, what their inputs are, and what passes have established about them.

    Attributes:
        main: the forward; block functions are its children, called with ``call_module``.
        inputs: one per placeholder of ``main``, in order.
        constants: tensors made inside forward that are not part of the model's state.
        outputs: how the flat outputs become a pair: the object the model returns, and its arguments as it left them
            if it changed what is in them, else None.
        written: which arguments the model writes into; the first results are their new values.
        part: whether this is a part of a forward, a stage of a pipeline: its results are not the model's.
        apart: which results are copied for the caller, who may write into them: passes leave copies out.
        guards: what was read of the arguments' values while tracing; other answers need another program.
        facts: what holds of the graphs (``captured``, ``canonical``, ``sharded``, ``lowered``).
        spec, position: for which sharding spec and rank this is the local program; None for the global one.
        notes: what the passes decided, in order.
        history: the passes that made it, in order.
        for_next_step: how many results, after the model's, are collectives that the next step waits for, and takes as
            its caches.
    """

    main: fx.GraphModule
    inputs: tuple[Input, ...]
    constants: Mapping[str, torch.Tensor]
    outputs: Structure
    facts: frozenset[str] = frozenset({"captured"})
    spec: ShardingSpec | None = None
    position: Mapping[str, int] | None = None
    notes: tuple[Note, ...] = field(default=(), repr=False)
    written: tuple[int, ...] = ()
    guards: Guards = field(default_factory=Guards)
    part: bool = False
    apart: tuple[int, ...] = ()
    history: tuple[PassRecord, ...] = field(default=(), repr=False, compare=False)
    for_next_step: int = field(default=0, repr=False)

    def functions(self) -> Iterator[tuple[str, fx.GraphModule]]:
        """``main`` and each block function, by name."""
        yield "main", self.main
        for name, child in self.main.named_children():
            if isinstance(child, fx.GraphModule):
                yield name, child

    def calls(self) -> dict[str, int]:
        """How many times each function runs in one forward."""
        counts = {name: 0 for name, _ in self.functions()} | {"main": 1}
        for node in self.main.graph.nodes:
            if node.op == "call_module":
                counts[node.target] += 1
        return counts

    def having(self, *facts: str, **changes: Any) -> Program:
        """A copy of which ``facts`` hold too."""
        return replace(self, facts=self.facts | set(facts), **changes)

    def rebuilt(self, graphs: Mapping[str, fx.Graph], *facts: str, **changes: Any) -> Program:
        """A copy with these graphs as ``main`` and the block functions, of which ``facts`` hold too."""
        children = {n: graph_module(n, g) for n, g in graphs.items() if n != "main"}
        return self.having(*facts, main=graph_module("main", graphs["main"], children), **changes)

    @property
    def output_spec(self) -> OutputSpec:
        """How the results become what the model returns."""
        ends = output_args(self.main.graph)
        likes = tuple(n.meta["val"] for n in ends[: len(ends) - self.for_next_step])
        return OutputSpec(self.outputs, self.written, likes, self.apart)

    def print_readable(self, print_output: bool = True) -> str:
        """The program as Python source: shapes in the annotations, one comment per module. Also returned."""
        parts = []
        for name, module in self.functions():
            children = {n: m for n, m in module.named_children() if isinstance(m, fx.GraphModule)}
            flat = fx.GraphModule({n: torch.nn.Module() for n in children}, module.graph, name)
            parts.append(flat.print_readable(print_output=False, colored=False))
        text = "\n\n".join(parts)
        if print_output:
            print(text)
        return text


def graph_module(name: str, graph: fx.Graph, children: Mapping[str, torch.nn.Module] | None = None) -> fx.GraphModule:
    """A module that runs ``graph``. Its code is written when it is first needed: most graphs are only read, by the
    next pass."""
    return _LazyGraphModule(dict(children or {}), graph, name)


def output_args(graph: fx.Graph) -> tuple[Any, ...]:
    """What a graph returns, as the tuple it was built with."""
    return tuple(next(n for n in reversed(graph.nodes) if n.op == "output").args[0])


def drop_unused(graph: fx.Graph) -> None:
    """Remove what nobody reads, except collectives: a rank to which nothing is sent reads no result, but the others
    wait for it all the same. And except what is kept for a later call."""
    graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output") or is_collective(n) or is_write(n))


def is_collective(node: fx.Node) -> bool:
    return getattr(node.target, "namespace", "") == "_c10d_functional"


ARRIVAL = "arrival"
"""The key in the meta of nodes that bring parameters to the device: of which arrival, by its number."""


def brings_parameters(node: fx.Node) -> bool:
    """Whether a node is part of how parameters come: a start, a wait, or a view of what has come."""
    return ARRIVAL in node.meta


def crosses_steps(node: fx.Node) -> bool:
    """Whether a node starts a collective that a later step waits for, or waits for one of a step before: such a one
    reads memory after its own step is over."""
    if not is_collective(node):
        return False
    wait = torch.ops._c10d_functional.wait_tensor.default
    return node.args[0].op == "placeholder" if node.target is wait else not any(  # type: ignore[union-attr]
        u.target is wait for u in node.users)


def is_write(node: fx.Node) -> bool:
    return node.target is update_and_read


def module_of(node: fx.Node) -> str:
    """The path of the innermost module whose forward made ``node``, as in ``transformer_blocks.0.attn``."""
    stack = node.meta.get("nn_module_stack") or {}
    return list(stack.values())[-1][0] if stack else ""


def source_of(node: fx.Node) -> str:
    """``file.py:123`` of the innermost line that made ``node`` and is not PyTorch's own."""
    lines = [ln.strip() for ln in (node.meta.get("stack_trace") or "").splitlines() if ln.strip().startswith("File ")]
    lines = [ln for ln in lines if "/torch/nn/" not in ln] or lines
    if not lines:
        return ""
    path, _, rest = lines[-1].removeprefix('File "').partition('", line ')
    return f"{path.rsplit('/', 1)[-1]}:{rest.split(',')[0]}"
