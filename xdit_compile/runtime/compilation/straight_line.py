"""A program's functions called by straight-line code, which is written from its graph: no loops, nothing looked up by
name, what stays where it is from call to call taken from one list, in runs, and every value let go of after its last
use.

What inductor has made of a function is called as it is: which of several pieces of code that is depends on how tensors
lie in memory, and so on what the program is given. It is found out by a first call, and asked again for inputs that
look otherwise.
"""

from __future__ import annotations

import itertools
import linecache
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import fx

from xdit_compile.runtime.compilation.graph_segments import Function

Boxed = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]
"""Takes its arguments in a list, which it empties: none is kept alive by its caller."""
Looks = tuple[tuple[torch.Size, tuple[int, ...]], ...]

_numbers = itertools.count()


@runtime_checkable
class Choosing(Protocol):
    """A function that has different code for tensors that lie otherwise in memory."""

    def __call__(self, *tensors: torch.Tensor) -> Sequence[torch.Tensor]: ...

    def chosen(self, tensors: Sequence[torch.Tensor]) -> Boxed:
        """What it runs for tensors that look like these, which it was called with before."""


class StraightLine:
    """``main`` as straight-line code.

    Args:
        main: any graph, whose modules are functions.
        held: of each input, whether it stays from call to call.

    Attributes:
        order: the places of inputs that stay, as a call takes them: as functions read them, some more than once.
    """

    def __init__(self, main: fx.GraphModule, held: Sequence[bool]) -> None:
        graph, self._functions = _inlined(main)
        writing = _Writing(graph, held, self._functions)
        self.order, self._constants = writing.order, writing.constants
        self._source = writing.source()
        self._name = f"<straight line {next(_numbers)}>"
        self._code = compile(self._source, self._name, "exec")
        # For tracebacks.
        linecache.cache[self._name] = len(self._source), None, self._source.splitlines(True), self._name
        self._looks: Looks = ()
        self._mark: object | None = None
        self._written: dict[Looks, Callable[..., Any]] = {}

    def __del__(self) -> None:
        linecache.cache.pop(self._name, None)

    def __call__(self, given: Sequence[torch.Tensor], held: Sequence[torch.Tensor], mark: object | None = None) -> Any:
        """The results.

        Args:
            given: inputs that do not stay, in order; held: those that do, as `order` says.
            mark: the same object as at the last call if what stays looks as it did then.
        """
        if mark is None or mark is not self._mark:
            self._mark = mark
            if (looks := _looks(held)) != self._looks:
                self._looks = looks
                self._written.clear()
        looks = _looks(given)
        if (written := self._written.get(looks)) is not None:
            # Operators of collectives have gradients that are written in Python, and take as long as kernels do.
            with torch._C._AutoDispatchBelowAutograd():
                return written(held, given)
        choices = [_Choice(f) if isinstance(f, Choosing) else None for f in self._functions]
        plain = [c or boxed(f) for c, f in zip(choices, self._functions, strict=True)]
        results = self._with(plain)(held, given)
        self._written[looks] = self._with([p if c is None else c.made for c, p in zip(choices, plain, strict=True)])
        return results

    def _with(self, functions: Sequence[Boxed | None]) -> Callable[..., Any]:
        names: dict[str, Any] = {**self._constants, **{f"f{i}": f for i, f in enumerate(functions)}}
        exec(self._code, names)
        return names["run"]


class _Choice:
    """One call of a function, which notes what that runs."""

    def __init__(self, function: Choosing) -> None:
        self._function = function
        self.made: Boxed | None = None

    def __call__(self, tensors: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        results = self._function(*tensors)
        self.made = self._function.chosen(tensors)
        tensors.clear()
        return results


def boxed(function: Function) -> Boxed:
    """A function that takes its arguments one by one, called with a list."""
    def call(tensors: list[torch.Tensor]) -> Any:
        given = tuple(tensors)
        tensors.clear()
        return function(*given)

    return call


def _looks(tensors: Sequence[torch.Tensor]) -> Looks:
    return tuple([(t.shape, t.stride()) for t in tensors])


def _inlined(main: fx.GraphModule) -> tuple[fx.Graph, list[Function]]:
    """A graph that calls functions by their number in a list, and no module that would call others."""
    graph, functions = fx.Graph(), list[Function]()

    def copied(module: fx.GraphModule, env: dict[fx.Node, Any]) -> Any:
        for node in module.graph.nodes:
            if node.op == "output":
                return fx.map_arg(node.args[0], env.__getitem__)
            if node.op == "call_module":
                function, given = getattr(module, node.target), fx.map_arg(node.args, env.__getitem__)
                if isinstance(function, fx.GraphModule) and function.graph.find_nodes(op="call_module"):
                    inputs = function.graph.find_nodes(op="placeholder")
                    env[node] = copied(function, dict(zip(inputs, given, strict=True)))
                else:
                    env[node] = graph.create_node("call_module", str(len(functions)), given)
                    functions.append(function)
            elif node.target is operator.getitem and not isinstance(of := env[node.args[0]], fx.Node):
                env[node] = of[node.args[1]]
            elif node not in env:
                env[node] = graph.node_copy(node, env.__getitem__)
        raise AssertionError("a graph without an output")

    graph.output(copied(main, {}))
    return graph, functions


class _Writing:
    """The text of a function ``run(held, given)`` for a graph."""

    def __init__(self, graph: fx.Graph, held: Sequence[bool], functions: Sequence[Function]) -> None:
        self._graph, self._functions = graph, functions
        inputs = graph.find_nodes(op="placeholder")
        self._held = {n: i for i, (n, stays) in enumerate(zip(inputs, held, strict=True)) if stays}
        self._given = [n for n in inputs if n not in self._held]
        self._names = {n: f"x{i}" for i, n in enumerate(n for n in graph.nodes if n not in self._held)}
        self.order: list[int] = []
        self.constants: dict[str, Any] = {}

    def source(self) -> str:
        last: dict[fx.Node, fx.Node] = {}
        for node in self._graph.nodes:
            last |= dict.fromkeys(node.all_input_nodes, node)
        dying: dict[fx.Node, list[str]] = {}
        for node, user in last.items():
            if node not in self._held:
                dying.setdefault(user, []).append(self._names[node])
        given = [self._names[n] for n in self._given]
        lines = [f"{', '.join(given)}, = given" if given else "pass"]
        if unused := [self._names[n] for n in self._given if n not in last]:
            lines.append(f"del {', '.join(unused)}")
        for node in self._graph.nodes:
            if node.op == "placeholder":
                continue
            ends = [f"del {', '.join(dying[node])}"] if node in dying else []
            if node.op == "output":
                lines.append(f"return {self._text(node.args[0])}")
                continue
            name = self._names[node]
            if node.op == "call_module":
                # Let go of before the call, which empties the list as it goes on.
                lines += [f"a = [{self._arguments(node.args)}]", *ends, f"{name} = f{node.target}(a)"]
            elif node.target is operator.getitem:
                lines += [f"{name} = {self._text(node.args[0])}[{self._text(node.args[1])}]", *ends]
            else:
                assert node.op == "call_function", f"a program calls functions, not {node.op} {node.target}"
                text = [*map(self._text, node.args), *(f"{k}={self._text(v)}" for k, v in node.kwargs.items())]
                lines += [f"{name} = {self._constant(node.target)}({', '.join(text)})", *ends]
            if node not in last:
                lines.append(f"del {name}")
        return "def run(held, given):\n" + "".join(f"    {line}\n" for line in lines)

    def _arguments(self, nodes: Sequence[Any]) -> str:
        """Of a function: runs of what stays are taken at once."""
        parts: list[str] = []
        for stays, run in itertools.groupby(nodes, lambda n: isinstance(n, fx.Node) and n in self._held):
            if not stays:
                parts += map(self._text, run)
                continue
            begin = len(self.order)
            self.order += [self._held[n] for n in run]
            parts.append(f"*held[{begin}:{len(self.order)}]" if len(self.order) - begin > 1 else f"held[{begin}]")
        return ", ".join(parts)

    def _text(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            if value in self._names:
                return self._names[value]
            self.order.append(self._held[value])
            return f"held[{len(self.order) - 1}]"
        if isinstance(value, (tuple, list)):
            inner = "".join(f"{self._text(v)}, " for v in value)
            return f"({inner})" if isinstance(value, tuple) else f"[{inner}]"
        if isinstance(value, Mapping):
            return f"{{{', '.join(f'{k!r}: {self._text(v)}' for k, v in value.items())}}}"
        return repr(value) if type(value) in (int, bool, str, type(None)) else self._constant(value)

    def _constant(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name
