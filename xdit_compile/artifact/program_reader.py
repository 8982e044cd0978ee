"""One rank's programs from the parts of an artifact."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from xdit_compile.artifact.graph_reader import decode
from xdit_compile.artifact.json_values import Json, look_of
from xdit_compile.artifact.native_reader import CompiledFunction
from xdit_compile.errors import ArtifactError
from xdit_compile.ir.program import Input, Program, graph_module
from xdit_compile.ir.pytree import flatten
from xdit_compile.runtime.deferred.patch_propagation import Cut
from xdit_compile.runtime.pipefusion.schedule import Edge
from xdit_compile.runtime.pipefusion.stage_executor import StageProgram
from xdit_compile.spec import ShardingSpec

KINDS = ("parameter", "constant", "argument", "once", "received", "cache", "invariant")
LARGEST_CACHE = 2**42
"""Bytes that a program may ask for to keep values from step to step: more than any device has."""


class Reader:
    """Makes programs of what was written; each file is read once.

    Args:
        read: gives the content of a file; constants: tensors by the names that programs know them by.
        device: where programs shall run.
        package: gives the path of a file with machine code, if functions shall be run as such.
    """

    def __init__(self, read: Callable[[Any], bytes], constants: Mapping[str, torch.Tensor],
                 device: torch.device, package: Callable[[Any], Path] | None = None) -> None:
        self._read, self._constants, self._device, self._package = read, constants, device, package
        self._graphs: dict[str, fx.Graph] = {}

    def program(self, entry: Json, spec: ShardingSpec, position: Mapping[str, int]) -> Program:
        """Raises ArtifactError or GraphError where it does not fit together."""
        functions = entry["functions"]
        names = tuple(sorted(n for n in functions if n != "main"))
        if bad := [n for n in names if not n.isidentifier()]:
            raise ArtifactError(f"{bad[0]!r} is no name of a function")
        graphs = {name: self._graph(functions[name]) for name in names}
        main = decode(self._read(functions["main"]), graphs, self._device)
        children: dict[str, nn.Module] = {name: graph_module(name, graph) for name, graph in graphs.items()}
        if self._package is not None:
            packages = {name: self._package(entry["packages"][name]) for name in names}
            children = {name: CompiledFunction(packages[name], graph) for name, graph in graphs.items()}
        inputs = tuple(Input(kind, name) for kind, name in entry["inputs"])
        holders = main.find_nodes(op="placeholder")
        if len(holders) != len(inputs) or any(i.kind not in KINDS for i in inputs):
            raise ArtifactError(f"a program takes {len(holders)} values, but {len(inputs)} are described")
        for node, i in zip(holders, inputs, strict=True):
            if i.kind == "cache" and node.meta["val"].nbytes > LARGEST_CACHE:
                raise ArtifactError(f"a program keeps {node.meta['val'].nbytes} bytes in one value")
        constants = {name: self._constant(key) for name, key in entry["constants"].items()}
        if missing := [i.name for i in inputs if i.kind == "constant" and i.name not in constants]:
            raise ArtifactError(f"the constant {missing[0]} is missing")
        return Program(graph_module("main", main, children), inputs, constants, flatten(())[1], spec=spec,
                       position=position, facts=frozenset({"lowered"}), part=bool(entry["part"]))

    def stage(self, entry: Json, spec: ShardingSpec, position: Mapping[str, int]) -> StageProgram:
        def program(written: Json) -> Program:
            return self.program(written, spec, position)

        return StageProgram(
            invariant=program(entry["invariant"]) if entry["invariant"] else None, once=program(entry["once"]),
            units={int(unit): program(written) for unit, written in entry["units"].items()},
            held=tuple(entry["held"]), samples={int(place): _cut(cut) for place, cut in entry["samples"].items()},
            sends={int(to): tuple(names) for to, names in entry["sends"].items()}, returns=tuple(entry["returns"]),
            receives={int(source): tuple(names) for source, names in entry["receives"].items()},
            shapes={(name, unit): look_of({"shape": shape, "dtype": dtype}) for name, unit, shape, dtype in
                    entry["shapes"]},
            cuts=tuple(_cut(cut) if cut else None for cut in entry["cuts"]), results=_whole(entry["results"]),
            fixed=_whole(entry["fixed"]), edges=tuple(_edge(e) for e in entry["edges"]),
            blocks=tuple(tuple(b) for b in entry["blocks"]))

    def _graph(self, name: str) -> fx.Graph:
        if name not in self._graphs:
            self._graphs[name] = decode(self._read(name), {}, self._device)
        return self._graphs[name]

    def _constant(self, key: Any) -> torch.Tensor:
        if key not in self._constants:
            raise ArtifactError(f"the constant {key!r} is missing")
        return self._constants[key]


def _cut(entry: Json) -> Cut:
    return Cut(int(entry["dim"]), _whole(entry["borders"]))


def _edge(entry: Json) -> Edge:
    return Edge(int(entry["source"]), int(entry["target"]), _whole(entry["nbytes"]), int(entry["whole"]),
                str(entry["name"]))


def _whole(numbers: Sequence[Any]) -> tuple[int, ...]:
    return tuple(int(n) for n in numbers)
