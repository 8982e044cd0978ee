"""One rank's programs as parts of an artifact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import fx

from xdit_compile.artifact.graph_writer import encode
from xdit_compile.artifact.json_values import Json, dtype_name
from xdit_compile.artifact.native_writer import all_in_functions
from xdit_compile.ir.program import Program
from xdit_compile.runtime.deferred.patch_propagation import Cut
from xdit_compile.runtime.pipefusion.stage_executor import StageProgram


def program_json(program: Program, add: Callable[[bytes, str], str],
                 constant: Callable[[torch.Tensor], str],
                 package: Callable[[fx.GraphModule], str] | None) -> Json:
    """Where the parts of a program were written.

    Args:
        add: writes a file and gives its name; constant: the same for a tensor among the constants.
        package: the same for a function as machine code; None to have none.
    """
    if package is not None:
        program = all_in_functions(program)
    return {
        "packages": {name: package(m) for name, m in program.functions() if name != "main"} if package else {},
        "functions": {name: add(encode(module), "json") for name, module in program.functions()},
        "inputs": [[i.kind, i.name] if i.part is None else [i.kind, i.name, i.part] for i in program.inputs],
        "constants": {i.name: constant(program.constants[i.name]) for i in program.inputs if i.kind == "constant"},
    }


def stage_json(stage: StageProgram, write: Callable[[Program], Json]) -> Json:
    """Where the programs of a stage were written, and how it exchanges values with others."""
    return {
        "invariant": write(stage.invariant) if stage.invariant else None, "once": write(stage.once),
        "units": {str(unit): write(program) for unit, program in stage.units.items()},
        "held": stage.held, "samples": {str(place): _cut_json(cut) for place, cut in stage.samples.items()},
        "sends": {str(to): names for to, names in stage.sends.items()}, "returns": stage.returns,
        "receives": {str(source): names for source, names in stage.receives.items()},
        "shapes": [[name, unit, list(shape), dtype_name(dtype)] for (name, unit), (shape, dtype) in
                   stage.shapes.items()],
        "cuts": [_cut_json(cut) if cut else None for cut in stage.cuts], "results": stage.results,
        "fixed": stage.fixed, "edges": [asdict(edge) for edge in stage.edges], "blocks": stage.blocks,
    }


def _cut_json(cut: Cut) -> Json:
    return {"dim": cut.dim, "borders": cut.borders}
