"""Graphs from the JSON of ``torch.export``, as far as `graph_writer` uses it: nothing in it is evaluated, no operator
is called that is not on the list of permissions, and no shape is believed. While a graph is read, operators run on fake
tensors alone, which have shapes and no memory."""

from __future__ import annotations

import keyword
import logging
import operator
import re
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._export.serde import schema
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from xdit_compile import kernels
from xdit_compile.artifact import checks
from xdit_compile.artifact.entries import LARGEST_NUMBER, parse
from xdit_compile.artifact.permissions import operator_named
from xdit_compile.errors import ArtifactError, XditError

BLOCK = "torch.ops.xdit_compile.block.default"
"""The operator that stands for the call of a function."""
FETCH, FETCHED = "xdit_compile.fetch.default", "xdit_compile.fetched.default"
CHOSEN = "auto"
"""What files say of the attention kernel: who loads them chooses it."""

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
_FUNCTION = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,99}")


class GraphError(ArtifactError):
    """Raised when a file holds no graph that may be run."""


class Watch(TorchDispatchMode):
    """Notes the most memory that an operator, or one of those that it is made of, takes for a result."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {_memory(t) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for value in pytree.tree_leaves(made):
            if isinstance(value, torch.Tensor) and _memory(value) not in given:
                self.most = max(self.most, value.untyped_storage().nbytes())
        return made


@dataclass(frozen=True)
class Setting:
    """Where graphs shall run, and what they may ask for.

    Attributes:
        kernel: the attention kernel, by name or ``auto``.
        groups: sizes of the groups of processes that collectives may name.
        largest: bytes of the largest value.
        mode: that of all fake tensors; watch: what operators make of them, inside too.
    """

    device: torch.device
    kernel: str
    groups: checks.GroupSizes
    largest: int
    mode: FakeTensorMode = field(default_factory=lambda: FakeTensorMode(allow_fallback_kernels=False))
    watch: Watch = field(default_factory=lambda: Watch())


@dataclass(frozen=True)
class Function:
    """A graph that was read, and what it does to what it is given.

    Attributes:
        writes: which inputs it writes into.
        bounds: of inputs whose values are used as indices, the least and the most that they may be.
        views: of each result, the input that it is a view of.
    """

    graph: fx.Graph
    writes: frozenset[int]
    bounds: Mapping[int, tuple[int, int]]
    views: tuple[int | None, ...]


def function_name(name: str) -> str:
    """``name``, if a module may call a function so.

    Raises:
        GraphError: it may not.
    """
    if not _FUNCTION.fullmatch(name) or keyword.iskeyword(name) or hasattr(fx.GraphModule, name) or name in _OWN:
        raise GraphError(f"{reprlib.repr(name)} is no name of a function")
    return name


_OWN = frozenset(vars(fx.GraphModule({}, fx.Graph()))) | {"main"}
"""Names that a module has itself."""


def decode(data: bytes, functions: Mapping[str, Function], setting: Setting, where: str) -> Function:
    """The graph that was written.

    Args:
        functions: those that it may call, and does with ``call_module``.
        where: the file, for errors.

    Raises:
        GraphError: it is no such graph, calls what it may not, or its operators do not fit together.
    """
    reading = _Reading(functions, setting)
    try:
        document = parse(data, where).value
        if document["schema_version"]["major"] != schema.SCHEMA_VERSION[0]:
            raise GraphError(f"it has version {document['schema_version']['major']!r} of PyTorch's format, but "
                             f"PyTorch {torch.__version__} has {schema.SCHEMA_VERSION[0]}; export the model with it")
        return reading.read(document["graph_module"]["graph"])
    except RecursionError as error:
        raise GraphError(f"{where}{reading.at} is nested too deeply") from error
    except Exception as error:
        if isinstance(error, ArtifactError):
            text = str(error)
            raise GraphError(text if text.startswith(where) else f"{where}{reading.at}: {text}") from error
        if isinstance(error, XditError):  # the attention kernel that was asked for
            raise
        # What is missing, of another type, or refused by a fake kernel.
        raise GraphError(f"{where}{reading.at} is no graph of ours: {type(error).__name__}: {error!s:.500}") from error


class _Reading:
    def __init__(self, functions: Mapping[str, Function], setting: Setting) -> None:
        self.functions, self.setting = functions, setting
        self.graph = fx.Graph()
        self.nodes: dict[str, fx.Node] = {}
        self.inputs: list[fx.Node] = []
        self.writes: set[int] = set()
        self.bounds: dict[int, tuple[int, int]] = {}
        self.origins: dict[fx.Node, int] = {}
        """Of nodes whose values are all among those of an input: which."""
        self.coming: set[fx.Node] = set()
        """Copies that were started and are not waited for yet."""
        self.waits = False
        """Whether what is being read is such a wait."""
        self.at = ""
        """What is being read, for errors."""

    def read(self, document: Any) -> Function:
        with self.setting.mode, torch.no_grad(), _quiet():
            for number, entry in enumerate(document["inputs"]):
                self.at = f": inputs[{number}]"
                self._input(entry, document["tensor_values"])
            self.memory = {_memory(n.meta["val"]): i for i, n in enumerate(self.inputs)}
            for number, entry in enumerate(document["nodes"]):
                self.at = f": nodes[{number}] ({entry['target']!s:.100})"
                self._node(entry)
        self.at, self.waits = ": outputs", False
        out = self.graph.output(tuple(self._tensor(_only(e, "as_tensor")) for e in document["outputs"]))
        if self.coming:
            raise GraphError(f"it starts {len(self.coming)} copies that nothing waits for")
        values = out.meta["val"] = tuple(n.meta["val"] for n in out.args[0])  # type: ignore[union-attr]
        views = tuple(self.memory.get(_memory(v)) for v in values)
        return Function(self.graph, frozenset(self.writes), dict(self.bounds), views)

    def _input(self, entry: Any, values: Any) -> None:
        name = _only(entry, "as_tensor")["name"]
        look = values[name]
        # Its own name may mean something in Python.
        node = self.graph.placeholder(f"input_{len(self.inputs)}")
        sizes, strides = ([_size(n) for n in look[kind]] for kind in ("sizes", "strides"))
        # An extent that cannot be counted is no tensor's.
        if sum((n - 1) * s for n, s in zip(sizes, strides, strict=True) if n) >= LARGEST_NUMBER:
            raise GraphError(f"it has sizes {sizes} and strides {strides}")
        node.meta["val"] = torch.empty_strided(sizes, strides, dtype=_DTYPES[look["dtype"]],
                                               device=self.setting.device)
        if node.meta["val"].numel() >= LARGEST_NUMBER:
            raise GraphError(f"it has sizes {sizes}")
        self.origins[node] = len(self.inputs)
        self.inputs.append(node)
        self._know(name, node)

    def _node(self, entry: Any) -> None:
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        self.waits = entry["target"] == f"torch.ops.{FETCHED}"
        for given in entry["inputs"]:
            value = self._value(given["arg"])
            if given["kind"] == 1:
                args.append(value)
            elif given["name"] in kwargs:
                raise GraphError(f"it is given {given['name']!r:.100} twice")
            else:
                kwargs[given["name"]] = value
        outputs = [e for out in entry["outputs"] for e in (out["as_tensors"] if "as_tensors" in out else
                                                            [_only(out, "as_tensor")])]
        node = self._call(*args) if entry["target"] == BLOCK else self._operator(
            entry["target"], args, kwargs, len(outputs))
        node.meta["nn_module_stack"] = _stack(entry.get("metadata", {}))
        if isinstance(node.meta["val"], torch.Tensor):
            (output,) = outputs
            self._know(output["name"], node)
            return
        if len(outputs) != len(node.meta["val"]):
            raise GraphError(f"it makes {len(node.meta['val'])} results, but {len(outputs)} are taken")
        for index, output in enumerate(outputs):
            item = self.graph.call_function(operator.getitem, (node, index))
            item.meta = {**node.meta, "val": node.meta["val"][index]}
            if node in self.origins:
                self.origins[item] = self.origins[node]
            self._know(output["name"], item)

    def _operator(self, target: Any, args: list[Any], kwargs: dict[str, Any], results: int) -> fx.Node:
        if not isinstance(target, str):
            raise GraphError(f"it calls {reprlib.repr(target)}")
        found, permission = operator_named(target)
        name = target.removeprefix("torch.ops.")
        args, kwargs = _in_place(found, args, kwargs)
        self._check_coming(name, args)
        if permission.kind == "attention":
            found, args, kwargs = self._kernel(found, name, args, kwargs)
            name = f"{found.namespace}.{found._opname}.{found._overloadname}"
        fakes, options = fx.map_arg((tuple(args), kwargs), lambda n: n.meta["val"])
        checks.before(permission.kind, name, fakes, options, results, self.setting.groups)
        for index, least, most in checks.indices(name, args, lambda n: n.meta["val"].shape):
            self._bound(index, least, most)
        for place, argument in enumerate(found._schema.arguments):
            if argument.name in permission.writes:
                self._written(args[place])
        node = self.graph.call_function(found, tuple(args), kwargs)
        if name == FETCH:
            self.coming.add(node)
        with self.setting.watch:
            made = node.meta["val"] = found(*fakes, **options)
        for value in pytree.tree_leaves(made):
            if not isinstance(value, torch.Tensor):
                raise GraphError(f"it makes a {type(value).__name__}")
            if (nbytes := value.numel() * value.dtype.itemsize) > self.setting.largest:
                raise GraphError(f"it makes a value of {nbytes} bytes, more than the {self.setting.largest} that the "
                                 "artifact says")
        if permission.kind in ("view", "several") and isinstance(args[0], fx.Node) and args[0] in self.origins:
            self.origins[node] = self.origins[args[0]]
        return node

    def _check_coming(self, name: str, args: list[Any]) -> None:
        """Copies are of inputs, and are waited for before anything else takes them: kernels that compare values first
        rely on that nobody changes them meanwhile."""
        if name == FETCH and args[0] not in self.inputs:
            raise GraphError("it copies what is no input")
        if name == FETCHED:
            if args[0] not in self.coming:
                raise GraphError("it waits for what is not on its way")
            self.coming.remove(args[0])

    def _kernel(self, found: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> tuple[Any, Any, Any]:
        """Attention by the kernel that was asked for, where the file leaves the choice."""
        if name not in ("xdit_compile.attention.default", "xdit_compile.attention_lse.default"):
            return found, args, kwargs
        *operands, kernel = args
        if kernel != CHOSEN:
            raise GraphError(f"it names the attention kernel {kernel!r:.100}, which is not for a file to say")
        q, _, v, mask, scale = operands
        q, v = q.meta["val"], v.meta["val"]
        if q.ndim != 4 or v.ndim != 4:
            raise GraphError(f"attention of {list(q.shape)} and {list(v.shape)}")
        chosen = kernels.resolve(self.setting.kernel, device=self.setting.device, dtype=q.dtype,
                                 head_dim=q.shape[-1], value_dim=v.shape[-1], masked=mask is not None)
        if name == "xdit_compile.attention.default" and chosen == "torch":
            gqa = q.shape[1] != operands[1].meta["val"].shape[1]
            return (torch.ops.aten.scaled_dot_product_attention.default, [*operands[:4], 0.0, False],
                    {"scale": scale, "enable_gqa": gqa})
        return found, [*operands, chosen], {}

    def _call(self, name: Any, path: Any, arguments: Any) -> fx.Node:
        if name not in self.functions:
            raise GraphError(f"it calls {reprlib.repr(name)}, which is not there")
        function = self.functions[name]
        wanted = [n.meta["val"] for n in function.graph.find_nodes(op="placeholder")]
        given = [n.meta["val"] for n in arguments]
        if list(map(_look, wanted)) != list(map(_look, given)):
            raise GraphError(f"{name!r} takes {list(map(_look, wanted))}, but is given {list(map(_look, given))}")
        for i in function.writes:
            self._written(arguments[i])
        for i, (least, most) in function.bounds.items():
            self._bound(arguments[i], least, most)
        node = self.graph.call_module(name, tuple(arguments))
        results = next(n for n in reversed(function.graph.nodes) if n.op == "output").meta["val"]
        node.meta["val"] = tuple(
            torch.empty_strided(r.shape, r.stride(), dtype=r.dtype, device=r.device) if view is None else
            given[view].as_strided(r.shape, r.stride(), r.storage_offset())
            for r, view in zip(results, function.views, strict=True))
        return node

    def _bound(self, index: Any, least: int, most: int) -> None:
        """Have the values of ``index`` lie between these, if they are an input's. All others are compared by kernels
        as they come."""
        if isinstance(index, fx.Node) and index in self.origins and not index.meta["val"].dtype.is_floating_point and (
                index.meta["val"].dtype != torch.bool):
            i = self.origins[index]
            before = self.bounds.get(i, (least, most))
            self.bounds[i] = (max(before[0], least), min(before[1], most))

    def _written(self, target: fx.Node) -> None:
        """Note that an input is written into, through ``target``, of which no element lies where another does."""
        value = target.meta["val"]
        i = self.memory.get(_memory(value))
        if i is None:
            raise GraphError("it writes into a value that is no input")
        if torch._debug_has_internal_overlap(value) == 1:
            raise GraphError("it writes into a value whose elements lie in one place")
        self.writes.add(i)

    def _value(self, arg: Any) -> Any:
        """An argument. Those kinds that no program has are not known here, as some are expressions."""
        ((kind, held),) = arg.items()
        if kind == "as_tensor":
            return self._tensor(held)
        if kind == "as_tensors":
            return [self._tensor(t) for t in held]
        if kind == "as_optional_tensors":
            return [None if "as_none" in t else self._tensor(_only(t, "as_tensor")) for t in held]
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
            return self.setting.device
        raise GraphError(f"it holds an argument {kind!s:.50} {reprlib.repr(held)}, which programs of this package do "
                         "not have")

    def _tensor(self, entry: Any) -> fx.Node:
        if entry["name"] not in self.nodes:
            raise GraphError(f"it takes {reprlib.repr(entry['name'])}, which nothing before it has made")
        node = self.nodes[entry["name"]]
        if node in self.coming and not self.waits:
            raise GraphError(f"it takes {reprlib.repr(entry['name'])}, a copy that is still on its way")
        return node

    def _know(self, name: Any, node: fx.Node) -> None:
        if not isinstance(name, str) or name in self.nodes:
            raise GraphError(f"it makes {reprlib.repr(name)} twice")
        self.nodes[name] = node


_PLAIN: dict[str, type] = {"as_int": int, "as_bool": bool, "as_string": str}
_LISTS: dict[str, type] = {"as_ints": int, "as_bools": bool, "as_strings": str}


@contextmanager
def _quiet() -> Iterator[None]:
    """Within: PyTorch does not write into its log what fake kernels refuse, as it is raised."""
    log = logging.getLogger(fake_tensor.__name__)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _in_place(found: torch._ops.OpOverload, args: list[Any],
              kwargs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Arguments by place, as far as they have one; the others by name."""
    places = [a for a in found._schema.arguments if not a.kwarg_only]
    if len(args) > len(places):
        raise GraphError(f"it takes {len(places)} arguments, but is given {len(args)}")
    named = {a.name for a in found._schema.arguments if a.kwarg_only}
    free = places[len(args):]
    if unknown := kwargs.keys() - named - {a.name for a in free}:
        raise GraphError(f"it is given {reprlib.repr(sorted(map(str, unknown)))}, which it does not take")
    while free and free[-1].name not in kwargs:
        free.pop()
    return [*args, *(kwargs.get(a.name, a.default_value) for a in free)], {
        name: value for name, value in kwargs.items() if name in named}


def _only(entry: Any, kind: str) -> Any:
    if set(entry) != {kind}:
        raise GraphError(f"it takes or returns {', '.join(entry)!s:.100}; graphs of this package only tensors")
    return entry[kind]


def _size(entry: Any) -> int:
    size = entry["as_int"]
    if type(size) is not int or not 0 <= size < LARGEST_NUMBER:
        raise GraphError(f"{reprlib.repr(size)} is no size of a tensor")
    return size


def _look(t: torch.Tensor) -> tuple[Any, ...]:
    return tuple(t.shape), t.dtype


def _memory(t: torch.Tensor) -> int:
    """What views of one tensor have in common."""
    return t.untyped_storage()._cdata


def _stack(metadata: Any) -> dict[str, tuple[str, str]]:
    """The modules that a node comes from: for reports alone."""
    entries = [e.split(",") for e in str(metadata.get("nn_module_stack", "")).split(";") if e]
    return {e[0]: (e[1], e[-1]) for e in entries if len(e) >= 3}
