"""Any module's forward as a Program: functional ATen with attention, linear, convolutions and norms whole.

The model runs once on fake tensors to find its repeated blocks (``blocks.py``), then it is traced around them, and
each kind of block by itself (``tracing.py``). Nothing is computed and no weight is copied, so a model on the meta
device is captured the same way.
"""

from __future__ import annotations

import logging
import operator
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from xdit_compile.errors import CaptureError
from xdit_compile.frontend.blocks import BLOCK, Kind, Outliner
from xdit_compile.frontend.fingerprint import Attribute
from xdit_compile.frontend.flex import FLEX, dense_mask, is_open, is_plain, modified_attention
from xdit_compile.frontend.known import Known, Value, of_inputs
from xdit_compile.frontend.opaque import culprit, left_in_python
from xdit_compile.frontend.tracing import Traced, as_export_does, as_fake, fake_state, traced
from xdit_compile.frontend.unchanged import unchanged
from xdit_compile.garbage import uncollected
from xdit_compile.program import Input, Program, drop_unused, graph_module, output_args, source_of
from xdit_compile.structure import Structure, differ, flatten, sharing

log = logging.getLogger(__name__)


class _Call:
    """A module's forward as a function of its tensor arguments, flat in and flat out."""

    outputs: Structure
    """How the flat results become what the module returns, and, if it changed them (a cache was filled), its
    arguments as it left them; known once it has run."""

    def __init__(self, module: nn.Module, inputs: Structure, known: Known,
                 values: Sequence[Value | int | None], path: str = "") -> None:
        """``path``: where in the model ``module`` is, with a dot behind it."""
        self.module, self.inputs, self._known, self._values, self._path = module, inputs, known, values, path

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with self._known:
            for tensor, value in zip(tensors, self._values, strict=True):
                self._known.assign(tensor, value)
            self._known.stand(self.module, self._path)
            args, kwargs = self.inputs.build(tensors)
            # Forward alone: hooks of the module itself run around the call, wherever that is made.
            result = type(self.module).forward(self.module, *args, **kwargs)
        left = (args, kwargs) if differ((args, kwargs), tensors, self.inputs) else None
        made, self.outputs = flatten((result, left))
        return tuple(made)


def capture(model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Program:
    """Capture ``model(*args, **kwargs)``; what is no tensor among the inputs is baked into the program.

    Raises:
        CaptureError: naming the line of the model that stands in the way and what to do about it.
    """
    left: list[type[nn.Module]] = []
    while True:
        try:
            with uncollected(), left_in_python(model, left):
                return _capture(model, tuple(args), dict(kwargs or {}))
        except CaptureError:
            raise
        except Exception as error:
            found = culprit(error, model)
            if found is None or found in left:
                raise _explained(error, model) from error
            log.info("capturing %s again, %s left in Python, after: %s", type(model).__name__, found.__name__, error)
            left.append(found)


def _capture(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
    tensors, inputs = flatten((args, kwargs))
    known = Known(tensors, model)
    call = _Call(model, inputs, known, of_inputs(tensors))
    mode = detect_fake_mode([*tensors, *model.parameters()]) or FakeTensorMode(allow_non_fake_inputs=True)
    with torch.no_grad(), unchanged(model, args, kwargs):
        _off_meta(model)
        read: frozenset[Attribute] = frozenset()
        try:
            outliner = Outliner(model, known, mode)
            while outliner.paths:
                with unchanged(model, args, kwargs), outliner.recording(), fake_state(model, mode, outliner.repeats):
                    shown = [as_fake(t, mode) for t in tensors]
                    with mode:
                        call(*(shown[i] for i in sharing(tensors)))
                known.forget_reads()
                if not outliner.read:
                    break
                read |= outliner.read
                outliner = Outliner(model, known, mode, read)
            return _assemble(call, tensors, outliner, known, mode)
        except CaptureError:
            raise
        except Exception as error:
            # Outlining leans on more of the model than a plain trace does; without it the same model may pass.
            log.info("capturing %s again, block by block no more, after: %s", type(model).__name__, error)
        return _assemble(call, tensors, None, known, mode)


def _off_meta(model: nn.Module) -> None:
    """Tables kept as plain attributes on the meta device become zeros. Not taken back here."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor) and value.is_meta:
                vars(module)[name] = torch.zeros_like(value, device="cpu")


def _assemble(call: _Call, tensors: Sequence[torch.Tensor], outliner: Outliner | None, known: Known,
              mode: FakeTensorMode) -> Program:
    constants: dict[str, torch.Tensor] = {}
    with as_export_does():
        if outliner is None:
            found, kinds = _trace(call, tensors, mode), {}
        else:
            with outliner.standing_in():
                found = _trace(call, tensors, mode)
            kinds = {kind.name: kind for kind in outliner.kinds.values() if kind}
        blocks = {name: _block(kind, known, mode, constants) for name, kind in kinds.items()}
    main, inputs = _main(found, blocks, constants)
    return Program(main, tuple(inputs), constants, call.outputs, written=found.written, guards=known.guards())


def _trace(call: _Call, tensors: Sequence[torch.Tensor], mode: FakeTensorMode) -> Traced:
    with unchanged(call.module, call.inputs.constants):
        found = traced(call, call.module, tensors, mode)
    for node in found.graph.nodes:
        if node.op == "call_function" and _random(node):
            raise CaptureError(
                f"{node.target} at {source_of(node)} draws random numbers, which every rank would draw "
                "differently. Call model.eval() to switch dropout off, or pass the noise in as an input"
            )
        if isinstance(node.meta.get("val"), torch.Tensor) and any(
                not isinstance(n, int) for n in node.meta["val"].shape):
            raise CaptureError(
                f"{node.target} at {source_of(node)} makes a tensor whose size depends on values that cannot be "
                "known while the model is captured; compute them outside and pass them as Python numbers"
            )
    return found


def _random(node: fx.Node) -> bool:
    """Whether the node draws random numbers; attention and dropout do only when told to."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    given = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False)) | node.kwargs
    named = {a.name: given.get(a.name, a.default_value) for a in node.target._schema.arguments}
    return named.get("dropout_p", named.get("p")) != 0 and named.get("train", True)


class _Copier:
    """Copies traced nodes into a new graph and knows what its placeholders stand for."""

    def __init__(self, found: Traced, prefix: str, constants: dict[str, torch.Tensor]) -> None:
        self.found, self.prefix, self.constants = found, prefix, constants
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.inputs: list[Input] = []
        self.nodes: dict[Input, fx.Node] = {}
        self._taken: set[str] = set()

    def placeholders(self) -> None:
        for node, what in zip(self.found.graph.find_nodes(op="placeholder"), self.found.inputs, strict=True):
            if what.kind == "constant" and node.users:
                self._constant(node, what.name, self.found.constants[what.name])
            elif what.kind == "parameter" and node.users:
                self.env[node] = self.placeholder(Input("parameter", self.prefix + what.name), node.meta["val"])
            elif what.kind == "argument":
                self.env[node] = self.placeholder(what, node.meta["val"])
        for node in self.found.graph.find_nodes(op="get_attr"):
            value = getattr(self.found.module, node.target)
            if isinstance(value, torch.Tensor):
                self._constant(node, node.target, value)

    def placeholder(self, what: Input, value: torch.Tensor) -> fx.Node:
        if what not in self.nodes:
            # A module's name may be a number, as in nn.Sequential, or hold signs that no variable's may.
            name = re.sub(r"\W", "_", what.name)
            name = f"p_{name}" if name[0].isdigit() else name
            node = self.graph.placeholder(name if name not in self._taken else f"{name}_{len(self._taken)}")
            self._taken.add(str(node.target))
            node.meta["val"] = value
            self.nodes[what] = node
            self.inputs.append(what)
        return self.nodes[what]

    def _constant(self, node: fx.Node, name: str, value: torch.Tensor) -> None:
        # A constant's name is unique within one trace only.
        name = f"{self.prefix}{name}".replace(".", "_")
        self.constants[name] = value
        self.env[node] = self.placeholder(Input("constant", name), node.meta["val"])

    def copy(self, node: fx.Node) -> fx.Node:
        if node.target is FLEX:
            return self._attention(node)
        if node.target is operator.getitem and node.args[0].target is FLEX:
            if node.args[1] != 0:
                raise CaptureError(f"flex_attention at {source_of(node)} is asked for its log-sum-exp, which is not "
                                   "supported; use its first result only")
            self.env[node] = self.env[node.args[0]]
            return self.env[node]
        new = self.graph.node_copy(node, lambda n: self.env[n])
        new.meta = {"val": node.meta["val"]} if "val" in node.meta else {}
        self.env[node] = self._described(new, node)
        return new

    def _described(self, new: fx.Node, node: fx.Node) -> fx.Node:
        """Where ``new`` comes from: where ``node`` of the traced graph does."""
        new.meta |= {"stack_trace": node.meta["stack_trace"]} if "stack_trace" in node.meta else {}
        new.meta["nn_module_stack"] = {
            key: ((self.prefix + path).rstrip("."), cls)
            for key, (path, cls) in node.meta.get("nn_module_stack", {}).items()
        }
        return new

    def _attention(self, node: fx.Node) -> fx.Node:
        """The nodes that ``flex_attention`` stands for."""
        q, k, v, score_mod, block_mask, scale, _, score_buffers, mask_buffers = node.args
        score, mask = (getattr(self.found.module, m.target) for m in (score_mod, block_mask[-1]))
        qkv = [self.env[n] for n in (q, k, v)]
        # Tensors that the functions close over, and numbers.
        scored, masked = ([self.env[n] if isinstance(n, fx.Node) else n for n in buffers]
                          for buffers in (score_buffers, mask_buffers))
        if is_plain(score):
            hidden = None if is_open(mask) else self._traced(node, partial(dense_mask, mask), *qkv[:2], *masked)
            out = self.graph.call_function(torch.ops.aten.scaled_dot_product_attention.default, (*qkv, hidden),
                                           {"scale": scale, "enable_gqa": True})
            out.meta["val"] = node.meta["val"][0]
            self.env[node] = self._described(out, node)
        else:
            function = partial(modified_attention, score, mask, scale, len(scored))
            self.env[node] = self._traced(node, function, *qkv, *scored, *masked)
        return self.env[node]

    def _traced(self, node: fx.Node, function: Callable[..., Any], *inputs: fx.Node | int) -> fx.Node:
        """The nodes of ``function`` on these, made on behalf of ``node``."""
        values = [n.meta["val"] if isinstance(n, fx.Node) else n for n in inputs]
        mode = detect_fake_mode(values)
        assert mode is not None
        with mode, torch.no_grad():
            traced = make_fx(function)(*values).graph
        env = dict(zip(traced.find_nodes(op="placeholder"), inputs, strict=True))
        for made in traced.nodes:
            if made.op == "get_attr":
                raise CaptureError(f"a function given to flex_attention at {source_of(node)} holds a tensor: "
                                   f"{made.target}")
            if made.op == "call_function":
                env[made] = self.graph.node_copy(made, env.__getitem__)
                env[made].meta = {"val": made.meta["val"]}
                self._described(env[made], node)
        return env[traced.output_node().args[0]]


def _block(kind: Kind, known: Known, mode: FakeTensorMode,
           constants: dict[str, torch.Tensor]) -> tuple[fx.GraphModule, list[Input]]:
    """A block kind as a function of its parameters, then its inputs; it returns what its inputs are not."""
    found = _trace(_Call(kind.module, kind.inputs, known, kind.values, f"{kind.path}."), kind.examples, mode)
    copier = _Copier(found, f"{kind.path}.", constants)
    copier.placeholders()
    for node in found.graph.nodes:
        if node.op == "call_function":
            copier.copy(node)
    made = output_args(found.graph)
    fresh = [copier.env[made[i]] for i, r in enumerate(kind.results) if not isinstance(r, int)]
    copier.graph.output(tuple(fresh)).meta["val"] = tuple(n.meta["val"] for n in fresh)
    inputs = [Input(i.kind, i.name.removeprefix(f"{kind.path}.")) if i.kind == "parameter" else i
              for i in copier.inputs]
    return graph_module(kind.name, copier.graph), inputs


def _main(found: Traced, blocks: Mapping[str, tuple[fx.GraphModule, list[Input]]],
          constants: dict[str, torch.Tensor]) -> tuple[fx.GraphModule, list[Input]]:
    copier = _Copier(found, "", constants)
    copier.placeholders()
    calls: dict[fx.Node, list[Input]] = {}
    for node in found.graph.find_nodes(op="call_function", target=BLOCK):
        name, path, _ = node.args
        module, inputs = blocks[name]
        calls[node] = [Input(i.kind, f"{path}.{i.name}") if i.kind == "parameter" else i for i in inputs]
        for what, holder in zip(calls[node], module.graph.find_nodes(op="placeholder"), strict=True):
            if what.kind != "argument":
                copier.placeholder(what, holder.meta["val"])
    for node in found.graph.nodes:
        if node in calls:
            name, path, tensors = node.args
            given = iter(copier.env[t] for t in tensors)
            args = tuple(next(given) if i.kind == "argument" else copier.nodes[i] for i in calls[node])
            call = copier.graph.call_module(name, args)
            call.meta = {"val": blocks[name][0].graph.output_node().meta["val"], "nn_module_stack": {
                path: (path, name)}, "stack_trace": node.meta.get("stack_trace", "")}
            copier.env[node] = call
        elif node.op == "call_function":
            copier.copy(node)
    made = tuple(copier.env[n] for n in output_args(found.graph))
    copier.graph.output(made).meta["val"] = tuple(n.meta["val"] for n in made)
    drop_unused(copier.graph)
    return graph_module("main", copier.graph, {n: m for n, (m, _) in blocks.items()}), copier.inputs


def _explained(error: Exception, model: nn.Module) -> CaptureError:
    """The model's own line in the traceback, with what to do about it."""
    root = type(model).__module__.partition(".")[0]
    frames = [f for f in traceback.extract_tb(error.__traceback__)
              if f"/{root}/" in f.filename or f.filename.endswith(f"{root}.py")]
    where = f" at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    kind = f"{type(error).__name__} {first}"
    reads = any(word in kind for word in ("DataDependent", "data-dependent", "DynamicOutput"))
    advice = (
        "A line that reads a tensor's value into Python (.item(), if on a tensor, a slice bounded by one) has no place "
        "in a graph: compute that value outside and pass it as a Python number."
        if reads else "Does the model itself run with these inputs? If so, its forward does what fake tensors refuse."
    )
    return CaptureError(
        f"{type(model).__name__} cannot be captured as one graph{where}\n  {type(error).__name__}: {first}\n  {advice}")
