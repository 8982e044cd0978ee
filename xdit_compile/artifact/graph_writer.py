"""Graphs as JSON, in the format of ``torch.export``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import fx
from torch._export.verifier import load_verifier
from torch.export.exported_program import (
    ExportedProgram,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    ModuleCallEntry,
    ModuleCallSignature,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from xdit_compile.artifact.graph_reader import CHOSEN
from xdit_compile.artifact.permissions import name_of, permissions
from xdit_compile.errors import ArtifactError
from xdit_compile.frontend.repeated_blocks import BLOCK
from xdit_compile.ir.program import module_of, output_args, source_of
from xdit_compile.ir.stale_cache import update_and_read
from xdit_compile.kernels import ops as ours

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_DIALECT = "TRAINING"  # of the two, the one that may write into tensors


def encode(module: fx.GraphModule) -> bytes:
    """The graph of ``module``, its own children's calls as calls of one operator.

    Raises:
        ArtifactError: an operator cannot be written down, as it is a function or module of this process, or none of
            those that artifacts may call.
    """
    graph = _plain(module.graph)
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and name_of(node.target) not in permissions():
            raise ArtifactError(f"{name_of(node.target)} ({source_of(node) or module_of(node)}) is not on the list of "
                                "operators that artifacts may call; somebody has to look at what its kernels rely on "
                                "and add it to permissions.json (benchmarks/permissions.py)")
    ins, outs = graph.find_nodes(op="placeholder"), output_args(graph)
    if ins and outs:
        return _serialized(graph)
    # PyTorch writes no graph without inputs or results: it is given some, which are then taken out.
    like = next(n.meta["val"] for n in module.graph.nodes if n.op in ("placeholder", "call_function")) if (
        ins or outs) else None
    with graph.inserting_before(next(iter(graph.nodes))):
        extra = graph.placeholder("nothing")
    extra.meta["val"] = torch.empty(0, device="meta") if like is None else _empty(like)
    (output,) = graph.find_nodes(op="output")
    output.args = ((extra, *outs),)
    document = json.loads(_serialized(graph))
    written = document["graph_module"]["graph"]
    written["inputs"], written["outputs"] = written["inputs"][1:], written["outputs"][1:]
    return json.dumps(document).encode()


def _empty(like: Any) -> torch.Tensor:
    """A fake tensor of the mode of ``like``."""
    (value, *_) = pytree.tree_leaves(like)
    with value.fake_mode:
        return torch.empty(0)


def _serialized(graph: fx.Graph) -> bytes:
    ins, outs = graph.find_nodes(op="placeholder"), output_args(graph)
    given, returned = [TensorArgument(n.name) for n in ins], [TensorArgument(n.name) for n in outs]
    signature = ExportGraphSignature(
        [InputSpec(InputKind.USER_INPUT, a, None) for a in given],
        [OutputSpec(OutputKind.USER_OUTPUT, a, None) for a in returned])
    taken, made = pytree.tree_structure((tuple(given), {})), pytree.tree_structure(tuple(returned))
    calls = [ModuleCallEntry("", ModuleCallSignature([*given], [*returned], taken, made))]
    program = ExportedProgram(
        root=fx.GraphModule({}, graph), graph=graph, graph_signature=signature, state_dict={}, range_constraints={},
        module_call_graph=calls, example_inputs=None, constants={}, verifiers=[load_verifier(_DIALECT)])
    from torch._export.serde.serialize import serialize  # as slow to import as PyTorch itself

    return serialize(program).exported_program


def operators_of(module: fx.GraphModule) -> set[torch._ops.OpOverload]:
    """Those that the file of ``module`` calls. Raises ArtifactError as `encode`."""
    return {n.target for n in _plain(module.graph).nodes if isinstance(n.target, torch._ops.OpOverload)}


def _plain(graph: fx.Graph) -> fx.Graph:
    """A copy of operators alone."""
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            made = new.call_function(BLOCK, (str(node.target), "", [env[a] for a in node.args]))
        elif node.target is update_and_read:
            made = _refreshed(new, node, env)
        elif node.target is _ATTENTION and "kernel" in node.meta:
            q, k, v, mask, *_ = node.args
            made = new.call_function(ours.attention, (
                *(fx.map_arg((q, k, v, mask), lambda n: env[n])), node.kwargs["scale"], CHOSEN))
        elif node.target in (ours.attention, ours.attention_lse):
            made = new.call_function(node.target, (*fx.map_arg(node.args[:-1], lambda n: env[n]), CHOSEN))
        elif node.op in ("placeholder", "output") or isinstance(node.target, torch._ops.OpOverload) or (
                getattr(node.target, "__name__", "") == "getitem"):
            made = new.node_copy(node, lambda n: env[n])
        else:
            raise ArtifactError(f"{node.target} ({source_of(node)}) is a function of this process and cannot be "
                                "written into an artifact")
        env[node] = made
        if node.target is not update_and_read:
            made.meta = {k: v for k, v in node.meta.items() if k in ("val", "nn_module_stack", "stack_trace")}
    return new


def _refreshed(graph: fx.Graph, node: fx.Node, env: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """The operators of ``update_and_read``, which writes into its first argument and returns it."""
    cache, fresh, dim, spans = cast(tuple[Any, ...], node.args)
    with cache.meta["val"].fake_mode as mode, torch.no_grad():
        mine = [mode.from_tensor(torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device))
                for t in (cache.meta["val"], fresh.meta["val"])]
        traced = make_fx(lambda a, b: update_and_read(a, b, dim, spans))(*mine).graph
    inner: dict[fx.Node, fx.Node] = dict(zip(
        traced.find_nodes(op="placeholder"), (env[cache], env[fresh]), strict=True))
    for step in traced.nodes:
        if step.op == "call_function":
            inner[step] = graph.node_copy(step, lambda n: inner[n])
            inner[step].meta = {"val": step.meta["val"]}
    return env[cache]
