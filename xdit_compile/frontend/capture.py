"""Any module's forward as a Program: functional ATen with attention, linear, convolutions and norms whole.

The model runs once on fake tensors to find its repeated blocks (``repeated_blocks.py``), then it is traced around them,
and each kind of block by itself (``tracing.py``). Nothing is computed and no weight is copied, so a model on the meta
device is captured the same way.
"""

from __future__ import annotations

import logging
import operator
import re
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import copy_context
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map_only

from xdit_compile.errors import CaptureError
from xdit_compile.frontend.borrowed_memory import borrowed_buffers
from xdit_compile.frontend.caller import autocast_as, undisturbed
from xdit_compile.frontend.casts import casts_noted
from xdit_compile.frontend.concrete_values import ConcreteValueMode, Value, of_inputs
from xdit_compile.frontend.flex_attention import FLEX, dense_mask, is_open, is_plain, modified_attention
from xdit_compile.frontend.gc_pause import gc_paused
from xdit_compile.frontend.left_behind import check_left
from xdit_compile.frontend.looks import Looks, dress
from xdit_compile.frontend.mechanisms import COMPILED, check, compiled_inside
from xdit_compile.frontend.objects import MISSING
from xdit_compile.frontend.opaque_modules import culprit, leaving_in_python
from xdit_compile.frontend.operator_log import Unlike
from xdit_compile.frontend.own_errors import not_of_capture
from xdit_compile.frontend.reads import Reads
from xdit_compile.frontend.repeated_blocks import BLOCK, BlockKind, Outliner
from xdit_compile.frontend.results import check_results, copied_results
from xdit_compile.frontend.side_effects import Before, Change, Key, readable
from xdit_compile.frontend.stand_ins import subclasses_made
from xdit_compile.frontend.tracing import StateWritten, Traced, as_fake, export_conventions, fake_state, traced
from xdit_compile.frontend.unguarded import check_reads
from xdit_compile.frontend.watchers import observed_hooks
from xdit_compile.frontend.writes import fill, has_values, holds_no_tensors, refuse, settle
from xdit_compile.ir.packed_tensors import is_packed
from xdit_compile.ir.program import Input, Program, drop_unused, graph_module, output_args, source_of
from xdit_compile.ir.pytree import Structure, differ, flatten, sharing
from xdit_compile.progress import progress

log = logging.getLogger(__name__)


class _Call:
    """A module's forward as a function of its tensor arguments, flat in and flat out."""

    outputs: Structure
    """How the flat results become what the module returns, and, if it changed them (a cache was filled), its
    arguments as it left them; known once it has run."""

    def __init__(self, module: nn.Module, inputs: Structure, known: ConcreteValueMode,
                 values: Sequence[Value | int | None], reads: Reads, path: str = "",
                 older: Callable[[Any], bool] | None = None) -> None:
        """``path``: where in the model ``module`` is, with a dot behind it; ``older``: what was there before the call,
        if its results are the model's."""
        self.module, self.inputs, self._known, self._values = module, inputs, known, values
        self._reads, self._path, self._older = reads, path, older
        self.log: AbstractContextManager[Any] = nullcontext()

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with self._known:
            for tensor, value in zip(tensors, self._values, strict=True):
                self._known.assign(tensor, value)
            self._known.stand(self.module, self._path)
            args, kwargs = self.inputs.build(tensors)
            # Forward alone: hooks of the module itself run around the call, wherever that is made.
            with self._reads.recording(whole=not self._path), self.log:
                result = self.module.forward(*args, **kwargs)
        left = (args, kwargs) if differ((args, kwargs), tensors, self.inputs) else None
        if left and self.inputs.kept:
            raise _Refills
        made, self.outputs = flatten((result, left), self._older)
        if (packed := next(filter(is_packed, made), None)) is not None:
            cls = type(packed)
            raise CaptureError(f"{type(self.module).__name__} returns a {cls.__module__}.{cls.__qualname__}, a kind of "
                               "tensor with operators of its own; programs return plain tensors. If its weights are of "
                               "this kind, use a kind whose linear layers give plain tensors")
        if self._older:
            check_results(self.module, tensors, made, self.outputs.constants, self._older)
        return tuple(made)


def capture(model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Program:
    """Capture ``model(*args, **kwargs)``; what is no tensor among the inputs is baked into the program.

    Raises:
        CaptureError: naming the line of the model that stands in the way, or the state that it keeps, and what to do
            about it. What the model itself raises, as it would on one device, goes on as it is; so does the lack of
            memory.
    """
    program, _, effects = recorded(model, args, kwargs)
    for effect in effects:
        effect()
    return program


def recorded(model: nn.Module, args: Sequence[Any] = (),
             kwargs: Mapping[str, Any] | None = None) -> tuple[Program, Reads, list[Callable[[], None]]]:
    """As ``capture``, with the code that ran, and what is still to be done: put into their places what the forward
    leaves behind for later calls, such as tables."""
    check(model)
    if compiled := compiled_inside(model):
        warnings.warn(f"torch.compile around {', '.join(path or type(model).__name__ for path in compiled[:5])} "
                      f"({len(compiled)} modules) {COMPILED}", stacklevel=2)
    args, kwargs = tuple(args), dict(kwargs or {})
    left: list[type[nn.Module]] = []
    filled, kept, start = False, True, time.perf_counter()
    while True:
        try:
            with progress(f"capturing {type(model).__name__}"), gc_paused(), undisturbed(), observed_hooks(model), \
                    subclasses_made(), casts_noted(), leaving_in_python(model, left):
                # What a forward sets in the context of its thread is gone with the copy.
                program, reads, effects = copy_context().run(_Capture(model, args, kwargs, kept).program)
            check_left(model, reads.made, program)
            reads.made.clear()
            log.info("captured %s in %.2f s: %d nodes in %d functions", type(model).__name__,
                     time.perf_counter() - start, sum(len(m.graph.nodes) for _, m in program.functions()),
                     len(program.calls()))
            return program, reads, effects
        except _Refills:
            kept = False
        except _Fills as found:
            if filled:
                raise CaptureError(str(StateWritten(found.names))) from None
            fill(model, found.names, args, kwargs)
            filled = True
        except StateWritten as error:
            raise CaptureError(str(error)) from error
        except CaptureError:
            raise
        except Exception as error:
            if not_of_capture(error):
                raise
            cls = culprit(error, model)
            if cls is None or cls in left:
                raise _explained(error, model) from error
            log.info("capturing %s again, %s left in Python, after: %s", type(model).__name__, cls.__name__, error)
            left.append(cls)


class _Fills(CaptureError):
    """Raised when the first call fills buffers, which ``names`` names."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(f"the first call fills {', '.join(names)}")
        self.names = tuple(names)


class _Refills(CaptureError):
    """Raised when forward changes what is in a container that it was given as it is."""


class _Capture:
    """One capture: the model, its call, and what becomes known of both."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], kept: bool) -> None:
        """``kept``: whether containers without tensors are given as the objects they are."""
        self.model, self.arguments = model, (args, kwargs)
        self.tensors, self.inputs = flatten((args, kwargs), _any if kept else None)
        self.mode = detect_fake_mode([*self.tensors, *model.parameters()]) or FakeTensorMode(allow_non_fake_inputs=True)
        self.known = ConcreteValueMode(self.tensors, model)
        self.before = Before()
        self.reads = Reads(first=self.before.note_frame, looks=Looks.at(model, self.tensors),
                           borrowed=borrowed_buffers(model))
        self.changed: dict[Key, Change] = {}
        self.exchanged: set[str] = set()
        self.tables: dict[Key, Any] = {}
        """What forward leaves for later calls."""

    def program(self) -> tuple[Program, Reads, list[Callable[[], None]]]:
        with torch.no_grad(), _off_meta(self.model), _forgetting(self.mode):
            self.before.note_model(self.model, *self.arguments)
            try:
                program = self._traced()
            except StateWritten as error:
                try:
                    filled = self._settled()
                except CaptureError as why:
                    raise error from why
                if not {*error.names} <= {*filled}:
                    raise
                raise _Fills(filled) from error
            self._check(program)
            check_reads(self.model, self.reads)
        # What was noted down is not kept.
        looks = self.reads.looks.settled(self.tensors, self.reads.names())
        return program, Reads(self.reads.codes, valued=self.reads.valued, looks=looks,
                              made=self.reads.made), self.before.effects(self.tables)

    def _traced(self) -> Program:
        call = self._call(self.known)
        outliner = Outliner(self.model, self.known, self.mode, self.before.changes)
        if not outliner.paths:
            return self._assemble(call, None)
        try:
            if self._alike(call, outliner):
                return self._assemble(call, outliner)
        except (CaptureError, MemoryError):
            raise
        except Unlike:
            pass
        except Exception as error:
            # Outlining leans on more of the model than a plain trace does; without it the same model may pass.
            if not outliner.recorded and not outliner.failed and not_of_capture(error):
                raise
            log.info("%s, block by block: %s", type(self.model).__name__, error)
        log.info("capturing %s again, block by block no more", type(self.model).__name__)
        self.known.forget_reads()
        call.log = nullcontext()
        return self._assemble(call, None)

    def _alike(self, call: _Call, outliner: Outliner) -> bool:
        """Record the blocks; whether each of them does by itself what it does inside the model."""
        with self._unchanged(), outliner.recording() as call.log, fake_state(self.model, self.mode, outliner.repeats):
            shown = self._examples()
            with self.mode:
                call(*shown)
        alike = all(self._alone(outliner, kind) for kind in outliner.kinds.values())
        self.known.forget_reads()
        return alike

    def _alone(self, outliner: Outliner, kind: BlockKind) -> bool:
        with self._unchanged(), self.mode, self.known:
            return outliner.holds(kind)

    def _call(self, known: ConcreteValueMode) -> _Call:
        return _Call(self.model, self.inputs, known, of_inputs(self.tensors), self.reads, older=self.before.knows)

    def _examples(self) -> list[torch.Tensor]:
        shown = [as_fake(t, self.mode) for t in self.tensors]
        for fake, tensor in zip(shown, self.tensors, strict=True):
            dress(fake, tensor)
        return [shown[i] for i in sharing(self.tensors)]

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Within, the model may run; afterwards all is as it was. What was not is noted."""
        try:
            yield
        finally:
            self.changed |= self.before.restore()

    def _settled(self) -> tuple[str, ...]:
        """Names of what one plain call has to fill. Raises CaptureError if state goes from call to call."""
        known = ConcreteValueMode(self.tensors, self.model)
        call = self._call(known)
        with self._unchanged(), fake_state(self.model, self.mode), self.mode:
            filled, kept = settle(self.model, lambda shown: call(*shown), self._fresh, self.before, self.reads)
        # What is kept by types of tensors (a registry of backends) has an entry for stand-ins, which no other call
        # meets.
        kept = {k: c for k, c in kept.items() if not _is_stand_in(k[1])}
        tables = {k: _real(c.after, known) for k, c in kept.items()}
        self.tables = {k: made for k, made in tables.items() if made is not MISSING}
        unknown = [str(c) for k, c in kept.items() if k not in self.tables and c.after is not MISSING]
        return filled + (tuple(unknown) if has_values(self.model, *self.arguments) else ())
    def _fresh(self) -> list[torch.Tensor]:
        """Examples that are no earlier ones."""
        made = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in self._examples()]
        return [made[i] for i in sharing(self.tensors)]

    def _check(self, program: Program) -> None:
        # What forward made itself, and then wrote into, is no state.
        held = self.before.tensors
        if written := {readable(held[id(t)]): f"(a tensor that is written into at {line})"
                       for t, line in self.reads.written if id(t) in held}:
            raise refuse(written, self.model)
        if (self.changed or self.exchanged) and (filled := self._settled()):
            raise _Fills(filled)
        for code, cls in self.reads.types_compared():
            raise CaptureError(f"{code.co_qualname} ({code.co_filename}:{code.co_firstlineno}) compares the type of "
                               f"something with {cls.__qualname__}; while the model is captured its tensors are of "
                               "other types. Ask isinstance instead")
        for name, value in program.constants.items():
            if isinstance(value, (FakeTensor, FunctionalTensor)):
                raise CaptureError(f"{name} of {type(self.model).__name__} is a tensor that an earlier trace left "
                                   "behind; make the model, or the cache that holds it, anew")

    def _assemble(self, call: _Call, outliner: Outliner | None) -> Program:
        constants: dict[str, torch.Tensor] = {}
        with export_conventions():
            if outliner is None:
                with self._unchanged():
                    found, kinds = _trace(call, self.tensors, self.mode), {}
            else:
                with self._unchanged(), outliner.standing_in() as call.log:
                    found = _trace(call, self.tensors, self.mode)
                kinds = outliner.kinds
            blocks = {name: self._block(kind, constants) for name, kind in kinds.items()}
        self.exchanged |= {*found.exchanged}
        main, inputs = _main(found, blocks, constants)
        own = {name for name, t in constants.items() if id(t) in self.before.tensors}
        return Program(main, tuple(inputs), constants, call.outputs, written=found.written, guards=self.known.guards(),
                       apart=copied_results(main, tuple(inputs), own, len(found.written)))

    def _block(self, kind: BlockKind, constants: dict[str, torch.Tensor]) -> tuple[fx.GraphModule, list[Input]]:
        """A block kind as a function of its parameters, then its inputs; it returns what its inputs are not."""
        call = _Call(kind.module, kind.inputs, self.known, kind.values, self.reads, f"{kind.path}.")
        with self._unchanged(), autocast_as(kind.autocast):
            found = _trace(call, kind.examples, self.mode)
        self.exchanged |= {*found.exchanged}
        return _function_of(kind, found, constants)


def _is_stand_in(key: Any) -> bool:
    """Whether it is the type of a tensor that tracing alone makes."""
    return isinstance(key, type) and issubclass(key, (FakeTensor, FunctionalTensor))


def _any(_: object) -> bool:
    return True


def _real(made: Any, known: ConcreteValueMode) -> Any:
    """What forward made, if all values in it are known and were computed where the model would; else MISSING."""
    parts = [t for t in tree_leaves(made) if not holds_no_tensors(t)]
    values = {id(t): v.tensor.clone() for t in parts if isinstance(t, torch.Tensor)
              and (v := known.value(t)) is not None and v.tensor.device == t.device}
    if any(id(t) not in values for t in parts):
        return MISSING
    return tree_map_only(torch.Tensor, lambda t: values[id(t)], made)


@contextmanager
def _forgetting(mode: FakeTensorMode) -> Iterator[None]:
    """Afterwards, ``mode`` knows no tensor of the model by a weak reference: those with one cannot be swapped."""
    try:
        yield
    finally:
        mode.fake_tensor_converter.meta_converter.describer.lookup_tensor.clear()


@contextmanager
def _off_meta(model: nn.Module) -> Iterator[None]:
    """Within, tables kept as plain attributes on the meta device are zeros."""
    held = [(vars(m), name, value) for m in model.modules() for name, value in vars(m).items()
            if isinstance(value, torch.Tensor) and value.is_meta]
    for state, name, value in held:
        state[name] = torch.zeros_like(value, device="cpu")
    try:
        yield
    finally:
        for state, name, value in held:
            state[name] = value


def _trace(call: _Call, tensors: Sequence[torch.Tensor], mode: FakeTensorMode) -> Traced:
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


def _function_of(kind: BlockKind, found: Traced,
                 constants: dict[str, torch.Tensor]) -> tuple[fx.GraphModule, list[Input]]:
    """What was traced of a block kind, with its parameters first."""
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
    kinds = dict.fromkeys(type(p) for p in (*model.parameters(), *model.buffers()) if is_packed(p))
    if kinds:
        named = ", ".join(f"{k.__module__}.{k.__qualname__}" for k in kinds)
        advice += (f" Weights of the model are of the type {named}, whose own code is captured with it; where that "
                   "does what no graph can hold, use weights of another kind.")
    return CaptureError(
        f"{type(model).__name__} cannot be captured as one graph{where}\n  {type(error).__name__}: {first}\n  {advice}")
