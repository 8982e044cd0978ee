"""The most memory that a rank takes at once: what it holds, and the values of a graph, from how long each lives.

A graph runs node after node and drops a value after its last use. Views hold on to the tensor they look at
and cost nothing; a call of a block function costs what lives in the caller and, on top, its own peak. Left
out is the scratch memory of kernels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import fx

from xdit_compile.ir.host_copy import fetched
from xdit_compile.ir.program import Program, brings_parameters, is_collective

WAITS = {torch.ops._c10d_functional.wait_tensor.default, fetched}
Kind = Literal["gathered", "exchanged", "activations"]


@dataclass(frozen=True)
class RankMemory:
    """Bytes that one rank takes, at the worst moment of a forward, by kind.

    Attributes:
        weights: parameters and buffers, or shares of them, that its programs use.
        gathered: parameters of blocks that have come, or are about to.
        activations: values that the model computes.
        exchanged: what collectives left: buffers that hold values of several ranks.
        kept: values of earlier steps, for one prompt and condition; constants too.
        arguments: the call's inputs.
        host: of weights that wait in the host's memory; these are not on the device.
    """

    weights: int = 0
    gathered: int = 0
    activations: int = 0
    exchanged: int = 0
    kept: int = 0
    arguments: int = 0
    host: int = 0

    @property
    def device(self) -> int:
        """All that is on the device."""
        return sum(asdict(self).values()) - self.host


def by_kind(memory: RankMemory) -> dict[str, int]:
    """Bytes of each kind, and of all, by words for people."""
    return {
        "weights": memory.weights, "parameters of blocks in flight": memory.gathered,
        "activations": memory.activations, "buffers of collectives": memory.exchanged,
        "kept from step to step, constants": memory.kept, "arguments": memory.arguments,
        "all on the device": memory.device, "weights in the host's memory": memory.host}


def rank_memory(programs: Sequence[Program], lasting: Sequence[Program] = ()) -> RankMemory:
    """What a rank takes that runs ``programs`` by turns.

    Args:
        lasting: those of them whose results are kept while the others run.
    """
    held: dict[tuple[str, str], int] = {}
    host: dict[tuple[str, str], int] = {}
    for program in programs:
        for node, given in zip(program.main.graph.find_nodes(op="placeholder"), program.inputs, strict=True):
            offload = program.spec is not None and program.spec.offload != "none"
            waits = given.kind == "parameter_share" and offload
            (host if waits else held)[given.kind, given.name] = _size(node.meta["val"])
    of = Counter[str]()
    for (kind, _), nbytes in held.items():
        of[kind] += nbytes
    worst = max((_whole_footprint(p) for p in programs), key=lambda f: f.peak)
    return RankMemory(
        of["parameter"] + of["parameter_share"], **{k: worst.kinds.get(k, 0) for k in (  # type: ignore[arg-type]
            "gathered", "activations", "exchanged")},
        kept=of["cache"] + of["constant"] + sum(map(result_bytes, lasting)), arguments=of["argument"],
        host=sum(host.values()))


def peak_activations(program: Program) -> int:
    """Bytes at the worst moment of one forward."""
    return _whole_footprint(program).peak


def result_bytes(program: Program) -> int:
    """Bytes that the results of one forward hold on to; not those of the call's inputs."""
    return sum(b.size for b in set(_whole_footprint(program).results))


@dataclass(eq=False)
class _Buffer:
    """A stretch of memory, in bytes. An argument's belongs to the caller and counts as nothing here."""

    size: int
    kind: Kind = "activations"
    argument: int | None = None
    last: int = 0
    """The index of the last node that reads it."""


@dataclass(frozen=True)
class _Footprint:
    """A function's peak in bytes, what it is made of, and the buffers in which its results lie."""

    peak: int
    kinds: Mapping[str, int]
    results: tuple[_Buffer, ...]


def _whole_footprint(program: Program) -> _Footprint:
    functions = dict(program.functions())
    blocks = {name: _footprint(module.graph, {}) for name, module in functions.items() if name != "main"}
    return _footprint(functions["main"].graph, blocks)


def _footprint(graph: fx.Graph, blocks: Mapping[str, _Footprint]) -> _Footprint:
    held = _buffers(graph, blocks)
    nodes = list(graph.nodes)
    for i, node in enumerate(nodes):
        for used in (node, *node.all_input_nodes):
            for buffer in held[used]:
                buffer.last = i
    live, worst = Counter[str](), Counter[str]()
    alive: set[_Buffer] = set()
    for i, node in enumerate(nodes):
        if node.op == "call_module":
            worst = max(worst, live + Counter(blocks[str(node.target)].kinds), key=Counter.total)
        new = set(held[node]) - alive
        live.update(_by_kind(new))
        worst = Counter(live) if live.total() > worst.total() else worst
        alive |= new
        dead = {b for b in alive if b.last == i}
        live.subtract(_by_kind(dead))
        alive -= dead
    return _Footprint(worst.total(), worst, held[graph.output_node()])


def _by_kind(buffers: set[_Buffer]) -> Counter[str]:
    found = Counter[str]()
    for buffer in buffers:
        found[buffer.kind] += buffer.size
    return found


def _kind(node: fx.Node) -> Kind:
    return "gathered" if brings_parameters(node) else "exchanged" if is_collective(node) else "activations"


def _buffers(graph: fx.Graph, blocks: Mapping[str, _Footprint]) -> dict[fx.Node, tuple[_Buffer, ...]]:
    """Of each node, the buffer behind each of its results."""
    held: dict[fx.Node, tuple[_Buffer, ...]] = {}
    arguments = 0
    for node in graph.nodes:
        if node.op == "placeholder":
            held[node] = (_Buffer(0, argument=arguments),)
            arguments += 1
        elif node.op == "output":
            held[node] = tuple(held[n][0] for n in node.args[0])
        elif node.op == "call_module":
            results = blocks[str(node.target)].results
            here = {b: _Buffer(b.size, b.kind) if b.argument is None else held[node.args[b.argument]][0]
                    for b in results}
            held[node] = tuple(here[b] for b in results)
        elif isinstance(node.meta["val"], (tuple, list)):
            shared = held[node.args[0]] * len(node.meta["val"]) if is_view(node) else ()
            held[node] = shared or tuple(_Buffer(_size(v)) for v in node.meta["val"])
        elif _is_item(node):
            held[node] = (held[node.args[0]][node.args[1]],)
        else:
            held[node] = held[node.args[0]] if is_view(node) else (
                _Buffer(_size(node.meta["val"]), _kind(node)),)
    return held


def _size(value: torch.Tensor) -> int:
    return value.numel() * value.dtype.itemsize


def _is_item(node: fx.Node) -> bool:
    """Whether the node picks one of several results of another."""
    return isinstance(node.args[0], fx.Node) and isinstance(node.args[0].meta["val"], (tuple, list)) if (
        node.args) else False


def is_view(node: fx.Node) -> bool:
    """Whether the result looks at the memory of the first argument. Operators that are made of others, such as reshape,
    say only that they may; PyTorch's fake kernels know for these strides."""
    if node.target in WAITS:
        return True
    schema = getattr(node.target, "_schema", None)
    if schema is None or not any(r.alias_info for r in schema.returns):
        return False
    if not node.target.has_kernel_for_dispatch_key("CompositeImplicitAutograd"):  # type: ignore[union-attr]
        return True
    operands: Any = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    args, kwargs = operands
    with args[0].fake_mode, torch.no_grad():
        made: Any = node.target(*args, **kwargs)  # type: ignore[operator]
    first = made[0] if isinstance(made, (tuple, list)) else made
    return first.untyped_storage()._cdata == args[0].untyped_storage()._cdata
