"""Graphs as JSON, in the format of ``torch.export``, and back: nothing in it is code, and no operator is called that is
not on a list."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, cast

import torch
from torch import fx
from torch._export.serde.serialize import SerializedArtifact, deserialize, serialize
from torch._export.verifier import load_verifier
from torch._subclasses.fake_tensor import FakeTensorMode
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

from xdit_compile.errors import XditError
from xdit_compile.frontend.blocks import BLOCK
from xdit_compile.keeping import refresh
from xdit_compile.program import output_args, source_of

NAMESPACES = ("aten", "_c10d_functional", "xdit_compile", "prims")
"""Of operators that graphs may call."""
REFUSED = frozenset({"from_file", "set_", "resize_", "resize_as_", "record_stream", "as_strided_", "_unsafe_index",
                     "_unsafe_masked_index", "_unsafe_index_put", "_unsafe_masked_index_put_accumulate"})
"""Those of them that reach for files, or for memory that is not their tensors'."""
WRITING = frozenset({"copy_"})
"""Those that write into a tensor and are allowed: what is kept from step to step is written in place."""
SYMBOLIC = frozenset({"as_expr", "as_sym_int", "as_sym_ints", "as_sym_float", "as_sym_floats", "as_sym_bool",
                      "as_sym_bools", "as_custom_obj", "as_graph", "as_operator", "as_string_to_argument"})
"""Arguments that no program of ours has; some would be evaluated when they are read."""
_DIALECT = "TRAINING"  # of the two, the one that may write into tensors


class GraphError(XditError):
    """Raised when a file holds no graph that may be run."""


# Writing


def encode(module: fx.GraphModule) -> bytes:
    """The graph of ``module``, its own children's calls as calls of one operator.

    Raises:
        XditError: an operator cannot be written down, as it is a function or module of this process.
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
        elif node.target is refresh:
            made = _refreshed(new, node, env)
        elif node.op in ("placeholder", "output") or isinstance(node.target, torch._ops.OpOverload) or (
                getattr(node.target, "__name__", "") == "getitem"):
            made = new.node_copy(node, lambda n: env[n])
        else:
            raise XditError(f"{node.target} ({source_of(node)}) is a function of this process and cannot be written "
                            "into an artifact")
        env[node] = made
        if node.target is not refresh:
            made.meta = {k: v for k, v in node.meta.items() if k in ("val", "nn_module_stack")}
    return new


def _refreshed(graph: fx.Graph, node: fx.Node, env: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """The operators of ``refresh``, which writes into its first argument and returns it."""
    cache, fresh, dim, spans = cast(tuple[Any, ...], node.args)
    with cache.meta["val"].fake_mode as mode, torch.no_grad():
        mine = [mode.from_tensor(torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device))
                for t in (cache.meta["val"], fresh.meta["val"])]
        traced = make_fx(lambda a, b: refresh(a, b, dim, spans))(*mine).graph
    inner: dict[fx.Node, fx.Node] = dict(zip(
        traced.find_nodes(op="placeholder"), (env[cache], env[fresh]), strict=True))
    for step in traced.nodes:
        if step.op == "call_function":
            inner[step] = graph.node_copy(step, lambda n: inner[n])
            inner[step].meta = {"val": step.meta["val"]}
    return env[cache]


# Reading


def decode(data: bytes, functions: Collection[str], device: torch.device | None = None) -> fx.Graph:
    """The graph that ``encode`` wrote.

    Args:
        functions: names of the functions that it may call, and does with ``call_module``.
        device: where it shall run, if elsewhere than it was made for.

    Raises:
        GraphError: it is no such graph, or calls what it may not, or shapes are not what operators make.
    """
    try:
        document = json.loads(data)
        document = {k: document[k] for k in ("graph_module", "opset_version", "schema_version", "torch_version")}
        _check(document)
        if device is not None:
            _move(document, device)
        # What else such a file can hold is code, or has no place here.
        document |= {"range_constraints": {}, "verifiers": [_DIALECT], "guards_code": []}
        read = deserialize(SerializedArtifact(json.dumps(document).encode(), b"", b"", b""))  # type: ignore[arg-type]
    except GraphError:
        raise
    except RecursionError as error:
        raise GraphError("a graph is nested too deeply") from error
    except Exception as error:
        raise GraphError(f"this is no graph that PyTorch {torch.__version__} reads: {type(error).__name__}: {error}"
                         ) from error
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in read.graph.nodes:
        if node.target is BLOCK:
            name, _, arguments = node.args
            if name not in functions:
                raise GraphError(f"a graph calls {name!r}, which is not there")
            env[node] = graph.call_module(name, tuple(env[a] for a in arguments))
            env[node].meta = dict(node.meta)
        else:
            env[node] = graph.node_copy(node, lambda n: env[n])
    _propagate(graph)
    return graph


def _walk(value: Any) -> Iterator[dict[str, Any]]:
    queue = [value]
    while queue:
        item = queue.pop()
        if isinstance(item, dict):
            yield item
            queue += item.values()
        elif isinstance(item, list):
            queue += item


def _check(document: Mapping[str, Any]) -> None:
    """Nothing in it may be evaluated, and all operators are allowed ones, before PyTorch looks at it."""
    for item in _walk(document):
        if found := SYMBOLIC & item.keys():
            raise GraphError(f"a graph holds {min(found)}, which programs written by this package never do")
        if "target" in item:
            operator(item["target"])
    graph = document["graph_module"]["graph"]
    kinds = {kind for entry in (*graph["inputs"], *graph["outputs"]) for kind in entry}
    signature = document["graph_module"]["signature"]
    kinds |= {kind for entry in signature["input_specs"] for kind in entry} - {"user_input"}
    kinds |= {kind for entry in signature["output_specs"] for kind in entry} - {"user_output"}
    if kinds - {"as_tensor"}:
        raise GraphError(f"a graph takes or returns {', '.join(sorted(kinds - {'as_tensor'}))}; those written by this "
                         "package only tensors")


def operator(name: Any) -> Callable[..., Any]:
    """The operator that a graph names.

    Raises:
        GraphError: there is none, or it is not one that graphs may call.
    """
    import operator as python

    if name == "_operator.getitem":
        return python.getitem
    parts = name.split(".") if isinstance(name, str) else []
    if len(parts) != 5 or parts[:2] != ["torch", "ops"] or parts[2] not in NAMESPACES:
        raise GraphError(f"a graph calls {name!r}; only operators of {', '.join(NAMESPACES)} may be called")
    if parts[3] in REFUSED:
        raise GraphError(f"a graph calls {name!r}, which is not allowed in artifacts")
    try:
        found = getattr(getattr(getattr(torch.ops, parts[2]), parts[3]), parts[4])
    except AttributeError:
        raise GraphError(f"a graph calls {name!r}, which PyTorch {torch.__version__} does not have") from None
    if not isinstance(found, torch._ops.OpOverload) or (found._schema.is_mutable and parts[3] not in WRITING):
        raise GraphError(f"a graph calls {name!r}, which writes into its arguments")
    return found


def _move(document: Any, device: torch.device) -> None:
    for item in _walk(document):
        place = item.get("device", item.get("as_device"))
        if isinstance(place, dict) and set(place) == {"type", "index"} and place["type"] != "meta":
            place |= {"type": device.type, "index": device.index}


def _propagate(graph: fx.Graph) -> None:
    """Every value has the shape and type that its operator gives it: what is written is not believed."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for node in graph.nodes:
            said = node.meta.get("val")
            if node.op == "placeholder":
                node.meta["val"] = torch.empty_strided(
                    said.shape, said.stride(), dtype=said.dtype, device=said.device)
            elif node.op == "call_module":
                node.meta["val"] = tuple(torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
                                         for t in said)
            elif node.op == "call_function":
                try:
                    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
                    node.meta["val"] = node.target(*args, **kwargs)
                except Exception as error:
                    raise GraphError(f"{node.target} cannot take what it is given: {error}") from error
                if isinstance(said, torch.Tensor) and _looks(said) != _looks(node.meta["val"]):
                    raise GraphError(f"{node.target} makes {_looks(node.meta['val'])}, not {_looks(said)}")


def _looks(t: torch.Tensor) -> tuple[Any, ...]:
    return tuple(t.shape), t.dtype
