"""One rank's programs from the parts of an artifact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import fx, nn

from xdit_compile.artifact.entries import Entry
from xdit_compile.artifact.graph_reader import Function, Setting, decode, function_name
from xdit_compile.artifact.json_values import Look, look_text
from xdit_compile.artifact.native_reader import CompiledFunction
from xdit_compile.artifact.parameter_shares import local_look, spans_of
from xdit_compile.errors import ArtifactError
from xdit_compile.ir.program import Input, Program, graph_module, output_args
from xdit_compile.ir.pytree import flatten
from xdit_compile.spec import ShardingSpec

KINDS = ("parameter", "constant", "argument", "once", "received", "cache", "invariant", "parameter_share")
Values = Mapping[tuple[str, str], Look]
"""Shapes and types of what is there for programs, by kind and name."""
Given = Callable[[str, str], Look | None]
"""Shape and type of what a program is given, by kind and name; None if there is no such thing."""


class Reader:
    """Makes programs of what was written; each file is read once.

    Args:
        read: gives the content of a file; constants: tensors by the names that programs know them by.
        setting: where programs shall run, and what they may ask for.
        where: the folder, for errors.
        package: gives the path of a file with machine code, if functions shall be run as such.
    """

    def __init__(self, read: Callable[[Entry], bytes], constants: Mapping[str, torch.Tensor], setting: Setting,
                 where: Path, package: Callable[[Entry], Path] | None = None) -> None:
        self._read, self._constants, self._setting = read, constants, setting
        self._where, self._package = where, package
        self._functions: dict[str, Function] = {}

    def program(self, entry: Entry, spec: ShardingSpec, position: Mapping[str, int], given: Given,
                part: bool, caches: bool = False) -> Program:
        """Raises ArtifactError or GraphError where it does not fit together, or to what it is ``given``; caches are as
        it wants them, if it may have any. ``part``: whether it gives other programs values, and not the caller."""
        files = dict(entry["functions"].items())
        functions = {function_name(name): self._function(file) for name, file in sorted(files.items())
                     if name != "main"}
        main = self._decoded(entry["functions"]["main"], functions)
        children: dict[str, nn.Module] = {name: graph_module(name, f.graph) for name, f in functions.items()}
        if self._package is not None:
            packages = {name: self._package(entry["packages"][name]) for name in functions}
            children = {name: CompiledFunction(packages[name], f.graph) for name, f in functions.items()}
        constants = {name: self._constant(key) for name, key in entry["constants"].items()}
        inputs = self._inputs(entry["inputs"], main, constants, given, caches)
        return Program(graph_module("main", main.graph, children), inputs, constants, flatten(())[1], spec=spec,
                       position=position, facts=frozenset({"lowered"}), part=part)

    def _inputs(self, entry: Entry, main: Function, constants: Mapping[str, torch.Tensor],
                given: Given, caches: bool) -> tuple[Input, ...]:
        """What the program takes, compared with what there is."""
        holders = main.graph.find_nodes(op="placeholder")
        made = []
        for i, (node, part) in enumerate(zip(holders, entry.parts(len(holders)), strict=True)):
            what = _input(part)
            found, look = look_of_node(node), given(what.kind, what.name)
            tensor = constants.get(what.name) if what.kind == "constant" else None
            if what.kind == "cache" and caches:
                look = found
            elif tensor is not None:
                look = tuple(tensor.shape), tensor.dtype
            if look is None:
                raise ArtifactError(f"{part.where}: a program takes the {what.kind} {what.name!r:.100}, which is not "
                                    "there")
            if what.kind == "parameter" and len(part.parts()) == 3:
                what = replace(what, part=spans_of(part.parts()[2], look))
                look = local_look(look, what.part)
            if look != found:
                raise ArtifactError(f"{part.where}: a program takes the {what.kind} {what.name!r:.100} as "
                                    f"{look_text(found)}, but it is {look_text(look)}")
            if i in main.writes and what.kind != "cache":
                raise ArtifactError(f"{part.where}: a program writes into the {what.kind} {what.name!r:.100}; it may "
                                    "only write into what is kept from step to step")
            if tensor is not None and i in main.bounds:
                _check_indices(tensor, *main.bounds[i], part)
            made.append(what)
        return tuple(made)

    def _function(self, file: Entry) -> Function:
        if file.text() not in self._functions:
            self._functions[file.value] = self._decoded(file, {})
        return self._functions[file.value]

    def _decoded(self, file: Entry, functions: Mapping[str, Function]) -> Function:
        return decode(self._read(file), functions, self._setting, str(self._where / file.text()))

    def _constant(self, key: Entry) -> torch.Tensor:
        if key.text() not in self._constants:
            raise ArtifactError(f"{key.where} is {key.value!r:.100}, which is none of the constants")
        return self._constants[key.value]


def look_of_node(node: fx.Node) -> Look:
    return tuple(node.meta["val"].shape), node.meta["val"].dtype


def results_of(program: Program) -> list[Look]:
    """Shapes and types of what a program returns."""
    return [look_of_node(n) for n in output_args(program.main.graph)]


def kept_values(entry: Entry, invariant: Program | None) -> Values:
    """What ``invariant`` keeps, by the names that the program in ``entry`` knows it by, in order.

    Raises:
        ArtifactError: it takes other values than that.
    """
    names = [what.name for what in map(_input, entry["inputs"].parts()) if what.kind == "invariant"]
    found = results_of(invariant) if invariant else []
    if len(names) != len(found) or len(set(names)) < len(names):
        raise ArtifactError(f"{entry.where} takes {len(names)} values that are kept, but {len(found)} are made")
    return {("invariant", name): look for name, look in zip(names, found, strict=True)}


def _input(entry: Entry) -> Input:
    """What a program takes, but for which part of it: a third entry, which a parameter may have."""
    kind, name, *part = entry.parts(max(2, min(3, len(entry.parts()))))
    if part and kind.value != "parameter":
        raise entry.wrong("kind and name")
    return Input(kind.one_of(KINDS), name.text())  # type: ignore[arg-type]


def _check_indices(constant: torch.Tensor, least: int, most: int, entry: Entry) -> None:
    """Raise ArtifactError if a constant has an index of something that has less elements."""
    if constant.numel() and not least <= int(constant.min()) <= int(constant.max()) <= most:
        raise ArtifactError(f"{entry.where}: a constant has indices from {int(constant.min())} to "
                            f"{int(constant.max())}, where there are elements {least} to {most}")
