"""What making one call of a model parallel would do, without doing it: no processes, no weights."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx, nn

from xdit_compile.diagnostics.block_boxes import block_boxes
from xdit_compile.diagnostics.explanation import Explanation, RankFigures, Row, Traffic, WeightCut
from xdit_compile.diagnostics.fitting import fits
from xdit_compile.diagnostics.origins import Piece, global_functions, pieces
from xdit_compile.diagnostics.stage_costs import Stages, stages_of
from xdit_compile.driver.compile_call import Dump, compile_program, split_invariant
from xdit_compile.driver.compile_stage import staged
from xdit_compile.errors import SpecError
from xdit_compile.frontend.method_module import as_module
from xdit_compile.frontend.program_cache import captured
from xdit_compile.ir.call_arguments import Inputs, call_arguments
from xdit_compile.ir.flops import FORMULAS
from xdit_compile.ir.mesh import STAGE, position_of
from xdit_compile.ir.parameter_groups import ParameterGroup, parameter_groups
from xdit_compile.ir.program import Note, Program, module_of, source_of
from xdit_compile.ir.step_inputs import step_inputs
from xdit_compile.passes import local_groups
from xdit_compile.passes.pipefusion import plan_pipeline
from xdit_compile.pipelines.memory import memory_of, memory_of_stage
from xdit_compile.planner.auto import Auto, resolved
from xdit_compile.progress import progress
from xdit_compile.report.costs import Costs, costs_of
from xdit_compile.report.loop_invariants import InvariantWork, invariant_work, with_invariants
from xdit_compile.report.memory import RankMemory
from xdit_compile.report.operations import contractions
from xdit_compile.spec import ShardingSpec

MOST = 10
"""How many of the largest replicated operations are listed."""


def explain(model: nn.Module, spec: str | Mapping[str, object] | ShardingSpec | Auto, inputs: Inputs, *,
            rank: int = 0, dump: Dump | None = None, method: str = "forward",
            device_memory: int | None = None, every_rank: bool = False) -> Explanation:
    """Capture one call of ``model``, make ``rank``'s program for ``spec``, and say what it does and costs.

    Nothing is computed, sent or started, and the model may be on the meta device.

    Args:
        model: any DiT as a torch.nn.Module, in eval mode.
        spec: as for ``parallelize``; no processes are needed, however many ranks it speaks of. ``auto`` has to know the
            machine, as in ``auto,machine=8xNAME``.
        inputs: example inputs, a dict of keyword arguments or a tuple of positional ones.
        rank: whose program is described. Where shares are uneven, ranks differ.
        dump: called with the name of each pass and the program it made.
        method: which of the model's methods is called; an autoencoder's ``decode``, say.
        every_rank: whether the figures of all ranks are counted, which takes as long again for each.
        device_memory: bytes of a device. If the rank takes more, other specs are tried that would make it fit.

    Raises:
        SpecError: the spec does not fit the model, or has no such rank.
        CaptureError: the model cannot be captured.
    """
    if method != "forward":
        model = as_module(model, method)
    args, kwargs = call_arguments(model, inputs)
    spec = resolved(spec, model, args, kwargs)
    if not 0 <= rank < spec.world_size:
        raise SpecError(f"rank {rank} is none of the {spec.world_size} ranks of {spec}")
    start = time.perf_counter()
    program = captured(model, args, kwargs)
    middle = time.perf_counter()
    changes, stages = step_inputs(model, args, kwargs), None
    left_out: tuple[str, ...] = ()
    groups = parameter_groups(model)
    if spec.pipefusion_degree > 1:
        whole, body, local, costs, kept, stages, memory, own = _stage(program, spec, rank, dump, changes, groups)
    else:
        compiled = compile_program(program, spec, rank, dump, changes, groups)
        whole, local = compiled.whole, compiled.local
        body, costs = whole, with_invariants(costs_of(local), compiled.invariant, compiled.body)
        kept = invariant_work(local, compiled.invariant, compiled.body, compiled.changes, costs.flops)
        memory, own, left_out = memory_of(compiled), compiled.groups, compiled.left_out
    end = time.perf_counter()
    notes, calls = local.notes, local.calls()
    replicated = sorted(_replicated(local), key=lambda row: -row.flops) if spec.world_size > 1 else []
    return Explanation(
        type(model).__name__, spec, rank, calls, _operators(program), middle - start, end - middle,
        tuple(_row(n, calls) for n in notes if n.kind == "seed"),
        tuple(_rewritten(body, local, costs, "scaled_dot_product_attention")),
        tuple(_rewritten(body, local, costs, "conv")),
        _traffic(costs),
        tuple(_row(n, calls) for n in notes if n.kind == "fallback"),
        tuple(replicated[:MOST]), sum(row.flops for row in replicated), costs, costs_of(whole), kept, stages,
        local.history, memory, None if device_memory is None else fits(
            program, spec, rank, changes, groups, memory, device_memory), _weight_cuts(own), block_boxes(local),
        _figures(program, spec, changes, groups) if every_rank else (), left_out)


def _figures(program: Program, spec: ShardingSpec, changes: Mapping[int, str],
             groups: Sequence[ParameterGroup]) -> tuple[RankFigures, ...]:
    """What each rank computes, sends and takes."""
    made = []
    for rank in range(spec.world_size):
        with progress(f"counting rank {rank} of {spec.world_size}"):
            if spec.pipefusion_degree > 1:
                _, _, _, costs, _, stages, memory, _ = _stage(program, spec, rank, None, changes, groups)
                sent = costs.sent + stages.sent(rank)
            else:
                compiled = compile_program(program, spec, rank, None, changes, groups)
                costs, memory = with_invariants(costs_of(compiled.local), compiled.invariant, compiled.body), memory_of(
                    compiled)
                sent = costs.sent
        made.append(RankFigures(rank, costs.flops, sent, memory))
    return tuple(made)


def _stage(program: Program, spec: ShardingSpec, rank: int, dump: Dump | None, changes: Mapping[int, str],
           groups: Sequence[ParameterGroup]
           ) -> tuple[Program, Program, Program, Costs, InvariantWork | None, Stages, RankMemory,
                      tuple[ParameterGroup, ...]]:
    """The whole program, what ``rank``'s stage is of it, that rank's program for a patch, its costs of a step and what
    it keeps, all stages, what the rank takes, and what it has of the model's parameters."""
    pipeline = plan_pipeline(program, spec)
    _, stage = staged(pipeline, rank, dump, groups=groups)
    found = stages_of(pipeline, stage.edges)
    units = [costs_of(stage.units[unit]) for unit in stage.patches]
    invariant, rest = split_invariant(program, stage.once, changes)
    once = with_invariants(costs_of(stage.once), invariant, rest)
    costs = Costs(once.flops + sum(u.flops for u in units), max(u.activations for u in (once, *units)),
                  tuple(c for u in (once, *units) for c in u.collectives))
    kept = invariant_work(stage.once, invariant, rest, tuple(changes.values()), costs.flops)
    index = position_of(rank, spec)[STAGE]
    return (pipeline.whole, pipeline.stages[index].body, stage.units[stage.patches[-1]], costs, kept, found,
            memory_of_stage(stage), local_groups(pipeline.whole, pipeline.seeds, groups, rank))


def _operators(program: Program) -> dict[str, int]:
    """Captured nodes of each operator, most frequent first."""
    counts = Counter(str(n.target) for _, m in program.functions() for n in m.graph.nodes
                     if n.op == "call_function" and hasattr(n.target, "_schema"))
    return dict(counts.most_common())


def _row(note: Note, calls: Mapping[str, int]) -> Row:
    return Row(note.function, note.node, note.module, note.source, note.text, calls[note.function])


def _rewritten(whole: Program, local: Program, costs: Costs, family: str) -> Iterator[Row]:
    """What became of each operator of a family that costs operations."""
    graphs, made, calls = dict(whole.functions()), dict(local.functions()), local.calls()
    for function, origin in global_functions(whole, local).items():
        held = {p.origin: p for p in pieces(graphs[origin].graph, made[function].graph).values()}
        for node in graphs[origin].graph.nodes:
            if node.target in FORMULAS and node.target.__name__.startswith(family):
                here = {"canonical": origin, "seed": ""}
                said = [n.text for n in local.notes
                        if (n.node, n.function) == (node.name, here.get(n.kind, function))]
                sent = sum(c.sent for c in costs.collectives
                           if (c.function, c.origin) == (function, node.name))
                yield Row(function, node.name, module_of(node), source_of(node),
                          "; ".join(said) or _standing(node, held, local), calls[function], sent)


def _standing(node: fx.Node, held: Mapping[fx.Node, Piece], local: Program) -> str:
    """What a node's layout says of an operator that no note speaks of."""
    if local.spec is None or local.spec.world_size == 1:
        return "as it is"
    piece = held.get(node)
    if piece is None:
        return "equal to another"
    return f"local: gives {piece.layout}" if piece.layout.sharded else "whole on every rank"


def _weight_cuts(groups: Sequence[ParameterGroup]) -> tuple[WeightCut, ...]:
    """Parameters that ranks share out, those of like blocks together."""
    counts = Counter((re.sub(r"(?<=\.)\d+(?=\.)", "*", m.name), str(m.layout)) for group in groups
                     for m in group.members if m.layout is not None and m.layout.sharded)
    return tuple(WeightCut(name, layout, count) for (name, layout), count in counts.items())


def _traffic(costs: Costs) -> tuple[Traffic, ...]:
    """Collectives grouped by what they are and serve, most bytes first."""
    found: dict[tuple[Any, ...], Traffic] = {}
    for c in costs.collectives:
        key = (c.kind, c.axis, c.why, c.function, c.module if c.function == "main" else "")
        have = found.get(key) or Traffic(c.kind, c.axis, c.ranks, c.why, c.function, c.module, c.source, 0, 0)
        found[key] = replace(have, count=have.count + c.times, sent=have.sent + c.sent)
    return tuple(sorted(found.values(), key=lambda t: -t.sent))


def _replicated(local: Program) -> Iterator[Row]:
    """Operators that cost operations and whose result every rank computes whole."""
    calls = local.calls()
    for function, node, cost in contractions(local):
        layout = node.meta.get("layout")
        if layout is not None and not layout.sharded:
            yield Row(function, node.meta["origin"], module_of(node), source_of(node),
                      f"{node.target} gives {layout}", calls[function], flops=cost)
