"""Graphs as JSON, in the format of ``torch.export``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import fx
from torch._export.serde.serialize import serialize
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

from xdit_compile.errors import ArtifactError
from xdit_compile.frontend.repeated_blocks import BLOCK
from xdit_compile.ir.program import output_args, source_of
from xdit_compile.ir.stale_cache import update_and_read

_DIALECT = "TRAINING"  # of the two, the one that may write into tensors


def encode(module: fx.GraphModule) -> bytes:
    """The graph of ``module``, its own children's calls as calls of one operator.

    Raises:
        ArtifactError: an operator cannot be written down, as it is a function or module of this process.
    """
    graph = _plain(module.graph)
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
    return serialize(program).exported_program


def _plain(graph: fx.Graph) -> fx.Graph:
    """A copy of operators alone."""
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            made = new.call_function(BLOCK, (str(node.target), "", [env[a] for a in node.args]))
        elif node.target is update_and_read:
            made = _refreshed(new, node, env)
        elif node.op in ("placeholder", "output") or isinstance(node.target, torch._ops.OpOverload) or (
                getattr(node.target, "__name__", "") == "getitem"):
            made = new.node_copy(node, lambda n: env[n])
        else:
            raise ArtifactError(f"{node.target} ({source_of(node)}) is a function of this process and cannot be "
                                "written into an artifact")
        env[node] = made
        if node.target is not update_and_read:
            made.meta = {k: v for k, v in node.meta.items() if k in ("val", "nn_module_stack")}
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
