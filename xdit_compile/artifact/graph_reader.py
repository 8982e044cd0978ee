"""Graphs from the JSON of ``torch.export``, as far as `graph_writer` uses it: nothing in it is evaluated, no operator
is called that is not on a list, and no shape is believed."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch._export.serde import schema
from torch._subclasses.fake_tensor import FakeTensorMode

import xdit_compile.kernels.ops  # noqa: F401  (graphs call its operators)
from xdit_compile.errors import ArtifactError

BLOCK = "torch.ops.xdit_compile.block.default"
"""The operator that stands for the call of a function."""
NAMESPACES = ("aten", "_c10d_functional", "xdit_compile", "prims")
"""Of operators that graphs may call."""
REFUSED = frozenset({"from_file", "set_", "resize_", "resize_as_", "record_stream", "as_strided_", "_unsafe_index",
                     "_unsafe_masked_index", "_unsafe_index_put", "_unsafe_masked_index_put_accumulate"})
"""Those of them that reach for files, or for memory that is not their tensors'."""
WRITING = frozenset({"copy_"})
"""Those that write into a tensor and are allowed: what is kept from step to step is written in place."""
LARGEST = 2**48
"""Elements along a dimension."""

_DTYPES = {getattr(schema.ScalarType, theirs): ours for theirs, ours in {
    "BYTE": torch.uint8, "CHAR": torch.int8, "SHORT": torch.int16, "INT": torch.int32, "LONG": torch.int64,
    "HALF": torch.float16, "FLOAT": torch.float32, "DOUBLE": torch.float64, "BFLOAT16": torch.bfloat16,
    "BOOL": torch.bool, "COMPLEXFLOAT": torch.complex64, "COMPLEXDOUBLE": torch.complex128,
    "FLOAT8E4M3FN": torch.float8_e4m3fn, "FLOAT8E5M2": torch.float8_e5m2}.items()}
_LAYOUTS = {schema.Layout.Strided: torch.strided}
_FORMATS = {schema.MemoryFormat.ContiguousFormat: torch.contiguous_format,
            schema.MemoryFormat.ChannelsLast: torch.channels_last,
            schema.MemoryFormat.ChannelsLast3d: torch.channels_last_3d,
            schema.MemoryFormat.PreserveFormat: torch.preserve_format}


class GraphError(ArtifactError):
    """Raised when a file holds no graph that may be run."""


def decode(data: bytes, functions: Mapping[str, fx.Graph], device: torch.device) -> fx.Graph:
    """The graph that was written.

    Args:
        functions: those that it may call, and does with ``call_module``.
        device: where it shall run.

    Raises:
        GraphError: it is no such graph, calls what it may not, or its operators do not fit together.
    """
    try:
        document = json.loads(data)
        module = document["graph_module"]
        if document["schema_version"]["major"] != schema.SCHEMA_VERSION[0]:
            raise GraphError(f"a graph has version {document['schema_version']['major']} of PyTorch's format, but "
                             f"PyTorch {torch.__version__} has {schema.SCHEMA_VERSION[0]}; export the model with it")
        return _Reading(module["graph"], functions, device).graph
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        if isinstance(error, GraphError):
            raise
        raise GraphError(f"this is no graph: {type(error).__name__}: {error}") from error


class _Reading:
    def __init__(self, document: Any, functions: Mapping[str, fx.Graph], device: torch.device) -> None:
        self.functions, self.device = functions, device
        self.graph = fx.Graph()
        self.nodes: dict[str, fx.Node] = {}
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            for entry in document["inputs"]:
                self._input(entry, document["tensor_values"])
            for entry in document["nodes"]:
                self._node(entry)
        out = self.graph.output(tuple(self._tensor(self._only(e, "as_tensor")) for e in document["outputs"]))
        out.meta["val"] = tuple(n.meta["val"] for n in out.args[0])  # type: ignore[union-attr]

    def _input(self, entry: Any, values: Any) -> None:
        name = self._only(entry, "as_tensor")["name"]
        look = values[name]
        node = self.graph.placeholder(_name(name))
        node.meta["val"] = torch.empty_strided(
            [_size(n) for n in look["sizes"]], [_size(n) for n in look["strides"]],
            dtype=_DTYPES[look["dtype"]], device=self.device)
        self._know(name, node)

    def _node(self, entry: Any) -> None:
        args, kwargs = [], {}
        for given in entry["inputs"]:
            if given["kind"] == 1:
                args.append(self._value(given["arg"]))
            else:
                kwargs[_name(given["name"])] = self._value(given["arg"])
        if entry["target"] == BLOCK:
            node = self._call(*args)
        else:
            target = operator_named(entry["target"])
            node = self.graph.call_function(target, tuple(args), kwargs)
            fake_args, fake_kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            try:
                node.meta["val"] = target(*fake_args, **fake_kwargs)
            except Exception as error:
                raise GraphError(f"{entry['target']} cannot take what it is given: {error}") from error
        node.meta["nn_module_stack"] = _stack(entry.get("metadata", {}))
        outputs = [e for out in entry["outputs"] for e in (out["as_tensors"] if "as_tensors" in out else
                                                            [self._only(out, "as_tensor")])]
        if isinstance(node.meta["val"], torch.Tensor):
            (output,) = outputs
            self._know(output["name"], node)
            return
        for index, output in enumerate(outputs):
            item = self.graph.call_function(operator.getitem, (node, index))
            item.meta = {**node.meta, "val": node.meta["val"][index]}
            self._know(output["name"], item)

    def _call(self, name: Any, path: Any, arguments: Any) -> fx.Node:
        if name not in self.functions:
            raise GraphError(f"a graph calls {name!r}, which is not there")
        function = self.functions[name]
        wanted = [n.meta["val"] for n in function.find_nodes(op="placeholder")]
        given = [n.meta["val"] for n in arguments]
        if list(map(_look, wanted)) != list(map(_look, given)):
            raise GraphError(f"{name!r} takes {list(map(_look, wanted))}, but is given {list(map(_look, given))}")
        node = self.graph.call_module(name, tuple(arguments))
        node.meta["val"] = next(n for n in reversed(function.nodes) if n.op == "output").meta["val"]
        return node

    def _value(self, arg: Any) -> Any:
        """An argument. Those kinds that no program has are not known here, as some are expressions."""
        ((kind, held),) = arg.items()
        if kind == "as_tensor":
            return self._tensor(held)
        if kind == "as_tensors":
            return [self._tensor(t) for t in held]
        if kind == "as_optional_tensors":
            return [None if "as_none" in t else self._tensor(self._only(t, "as_tensor")) for t in held]
        if kind == "as_none":
            return None
        if kind in _PLAIN and type(held) is _PLAIN[kind]:
            return held
        if kind == "as_float":
            return float(held)
        if kind in _LISTS and isinstance(held, list) and all(type(x) is _LISTS[kind] for x in held):
            return held
        if kind == "as_floats":
            return [float(x) for x in held]
        if kind == "as_scalar_type":
            return _DTYPES[held]
        if kind == "as_layout":
            return _LAYOUTS[held]
        if kind == "as_memory_format":
            return _FORMATS[held]
        if kind == "as_device":
            return self.device
        raise GraphError(f"a graph holds an argument {kind} {held!r}, which programs of this package do not have")

    def _tensor(self, entry: Any) -> fx.Node:
        return self.nodes[entry["name"]]

    def _know(self, name: str, node: fx.Node) -> None:
        if name in self.nodes:
            raise GraphError(f"a graph makes {name!r} twice")
        self.nodes[name] = node

    @staticmethod
    def _only(entry: Any, kind: str) -> Any:
        if set(entry) != {kind}:
            raise GraphError(f"a graph takes or returns {', '.join(entry)}; those of this package only tensors")
        return entry[kind]


_PLAIN: dict[str, type] = {"as_int": int, "as_bool": bool, "as_string": str}
_LISTS: dict[str, type] = {"as_ints": int, "as_bools": bool, "as_strings": str}


def operator_named(name: Any) -> Callable[..., Any]:
    """The operator that a graph names.

    Raises:
        GraphError: there is none, or it is not one that graphs may call.
    """
    parts = name.split(".") if isinstance(name, str) else []
    if len(parts) != 5 or parts[:2] != ["torch", "ops"] or parts[2] not in NAMESPACES:
        raise GraphError(f"a graph calls {name!r}; only operators of {', '.join(NAMESPACES)} may be called")
    if parts[3] in REFUSED:
        raise GraphError(f"a graph calls {name!r}, which is not allowed in artifacts")
    try:
        found = getattr(getattr(getattr(torch.ops, parts[2]), parts[3]), parts[4])
    except AttributeError:
        raise GraphError(f"a graph calls {name!r}, which PyTorch {torch.__version__} does not have") from None
    if not isinstance(found, torch._ops.OpOverload):
        raise GraphError(f"a graph calls {name!r}, which PyTorch {torch.__version__} does not have as an operator")
    if found._schema.is_mutable and parts[3] not in WRITING:
        raise GraphError(f"a graph calls {name!r}, which writes into its arguments")
    return found


def _name(name: Any) -> str:
    if not isinstance(name, str) or not name.isidentifier():
        raise GraphError(f"{name!r} is no name of a value")
    return name


def _size(entry: Any) -> int:
    size = entry["as_int"]
    if type(size) is not int or not 0 <= size < LARGEST:
        raise GraphError(f"{size!r} is no size of a tensor")
    return size


def _look(t: torch.Tensor) -> tuple[Any, ...]:
    return tuple(t.shape), t.dtype


def _stack(metadata: Any) -> dict[str, tuple[str, str]]:
    """The modules that a node comes from: for reports alone."""
    entries = [e.split(",") for e in str(metadata.get("nn_module_stack", "")).split(";") if e]
    return {e[0]: (e[1], e[-1]) for e in entries if len(e) >= 3}


