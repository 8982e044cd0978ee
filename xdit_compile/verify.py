"""Compare a parallel model with the model as it is, and find the operator at which they part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from rich.console import RenderableType
from torch import fx, nn

from xdit_compile.compiler import Compiled
from xdit_compile.errors import XditError
from xdit_compile.parallel import Runner, parallelize
from xdit_compile.program import Program, module_of, source_of
from xdit_compile.report.difference import Difference, difference
from xdit_compile.report.inputs import Inputs, call_arguments
from xdit_compile.report.plain import jsonable, plain
from xdit_compile.report.side_by_side import OUTPUT, Finding, arguments_of_call, findings, steps
from xdit_compile.report.tables import summary_of_verification, verification_table
from xdit_compile.spec import ShardingSpec
from xdit_compile.structure import flatten

MOST = 5
"""How many differing nodes are named: the first is to blame, the next show how the error spreads."""

Cause = Literal["", "capture", "rewriting", "execution"]


@dataclass(frozen=True)
class OutputDifference:
    """One tensor among the model's results, and the largest differences found on any rank."""

    index: int
    shape: tuple[int, ...]
    dtype: str
    absolute: float
    relative: float


@dataclass(frozen=True)
class NodeDifference:
    """A value of the global program of which the piece of some ``ranks`` is wrong.

    ``function`` is the graph it stands in; for a block function, ``module`` is inside the block that was called.
    """

    function: str
    node: str
    operator: str
    module: str
    source: str
    layout: str
    absolute: float
    relative: float
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Verification:
    """What comparing found; the same on every rank.

    Attributes:
        outputs: every tensor among the results.
        cause: where a difference comes from. ``capture``: the captured program is not the model; ``rewriting``:
            ``nodes`` are the first values that ranks hold wrongly; ``execution``: every node is right when run
            one by one, so it is what the backend makes of the program.
        compared: how many values of the program were compared to find it.
    """

    model: str
    spec: ShardingSpec
    tolerance: float
    outputs: tuple[OutputDifference, ...]
    cause: Cause = ""
    nodes: tuple[NodeDifference, ...] = ()
    compared: int = 0

    @property
    def ok(self) -> bool:
        """Whether every output is within the tolerance."""
        return not any(Difference(o.absolute, o.relative).exceeds(self.tolerance) for o in self.outputs)

    @property
    def worst(self) -> float:
        """The largest relative difference of any output."""
        return max((o.relative for o in self.outputs), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as what JSON can say."""
        return jsonable(self) | {"spec": str(self.spec), "ok": self.ok}

    def summary(self) -> str:
        """One line."""
        return summary_of_verification(self)

    def __rich__(self) -> RenderableType:
        return verification_table(self)

    def __str__(self) -> str:
        return plain(self)


def verify(model: nn.Module, spec: str | Mapping[str, object] | ShardingSpec, inputs: Inputs, *,
           tolerance: float = 1e-5, ranks: Sequence[int] | None = None) -> Verification:
    """Run ``model`` as it is and in parallel on the same inputs, and compare. Every rank calls this alike.

    Where an output differs, both programs are run side by side, node by node, and the first value that a rank
    holds wrongly is named, with the module and the line that made it.

    Args:
        model: any DiT as a torch.nn.Module, in eval mode, with the same weights on every rank.
        spec, ranks: as for ``parallelize``.
        inputs: a dict of keyword arguments or a tuple of positional ones.
        tolerance: the largest difference allowed, relative to the largest value of the tensor compared. The
            default suits float32; bfloat16 carries three digits.

    Raises:
        XditError: the model is on the meta device, or one of what ``parallelize`` and its calls raise.
    """
    if any(p.is_meta for p in model.parameters()):
        raise XditError("verify computes with the model, but its parameters are on the meta device; "
                        "xdit_compile.explain needs no values")
    args, kwargs = call_arguments(inputs)
    parallel = parallelize(model, spec, ranks=ranks)
    runner: Runner = parallel.runner
    with torch.no_grad():
        expected, _ = flatten(model(*args, **kwargs))
        actual, _ = flatten(parallel(*args, **kwargs))
    (compiled, _), = runner.programs.values()
    tensors, _ = flatten((args, kwargs))
    with runner.control.guard("the verification", runner.groups.all), torch.no_grad():
        everyone = _gather(runner, [difference(a, b) for a, b in zip(actual, expected, strict=True)])
        outputs = tuple(
            OutputDifference(i, tuple(x.shape), str(x.dtype).removeprefix("torch."),
                             max(d.absolute for d in found), max(d.relative for d in found))
            for i, (x, found) in enumerate(zip(expected, zip(*everyone, strict=True), strict=True)))
        result = Verification(type(model).__name__, runner.spec, tolerance, outputs)
        return result if result.ok else _Search(runner, compiled, model, tensors, tolerance).run(result, expected)


class _Search:
    """Looks for where two programs part. Every rank runs the same collectives, whatever it finds by itself."""

    def __init__(self, runner: Runner, compiled: Compiled, model: nn.Module, tensors: Sequence[torch.Tensor],
                 tolerance: float) -> None:
        self.runner, self.tolerance = runner, tolerance
        self.whole, self.local = compiled.whole, compiled.local
        self.whole_arguments = _arguments(compiled.whole, model, tensors)
        self.local_arguments = _arguments(compiled.local, model, tensors)
        self.compared = 0

    def run(self, result: Verification, expected: Sequence[torch.Tensor]) -> Verification:
        """``result`` with the cause and the nodes to blame."""
        *_, end = steps(self.whole.main, self.whole_arguments)
        captured = [difference(a, b) for a, b in zip(end.value, expected, strict=True)]
        if any(d.exceeds(self.tolerance) for d in captured):
            return _with(result, "capture")
        nodes = self._nodes()
        return _with(result, "rewriting" if nodes else "execution", nodes, self.compared)

    def _nodes(self) -> tuple[NodeDifference, ...]:
        found = self._compare(self.whole.main, self.local.main, self.whole_arguments, self.local_arguments)
        first = next((n for n in self.whole.main.graph.nodes if found and n.name == found[0].node), None)
        if first is not None and first.op == "call_module":
            return self._inside(first) or tuple(found[:MOST])
        return tuple(found[:MOST])
