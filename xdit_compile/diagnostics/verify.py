"""Compare a parallel model with the model as it is, and find the operator at which they part."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from functools import partial

import torch
from torch import nn

from xdit_compile.api import parallelize
from xdit_compile.diagnostics.blame import Pair, arguments_of, first_differences
from xdit_compile.diagnostics.difference import Difference, difference
from xdit_compile.diagnostics.verification import OutputDifference, Verification
from xdit_compile.driver.compile_call import Compiled
from xdit_compile.driver.model_runner import ModelRunner, ReadyProgram
from xdit_compile.errors import XditError
from xdit_compile.ir.call_arguments import Inputs, call_arguments
from xdit_compile.ir.packed_tensors import named_parts
from xdit_compile.ir.pytree import flatten
from xdit_compile.runtime.deferred.deferred_tensor import materialize
from xdit_compile.spec import ShardingSpec


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
    args, kwargs = call_arguments(model, inputs)
    parallel = parallelize(model, ShardingSpec.parse(spec), ranks=ranks)
    runner: ModelRunner = parallel.runners["forward"]
    with torch.no_grad():
        expected, _ = flatten(model(*args, **kwargs))
        actual = [flatten(materialize(parallel(*args, **kwargs)))[0]]
        if runner.group.spec.patches > 1:
            # Patches that read what an equal step has left are exact too.
            runner.loops.hold()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that the step followed from no results
                actual.append(flatten(materialize(parallel(*args, **kwargs)))[0])
    (ready,) = runner.programs.values()
    compiled, group = ready.compiled, ready.group
    assert isinstance(compiled, Compiled)
    with runner.group.control.guard("the verification", group.process_groups.bind()), torch.no_grad():
        everyone = [[Difference(*d) for d in its] for one in ready.group.gather("the verification", [
            [astuple(difference(a, b)) for a, b in zip(got, expected, strict=True)] for got in actual]) for its in one]
        outputs = tuple(
            OutputDifference(i, tuple(x.shape), str(x.dtype).removeprefix("torch."),
                             max(d.absolute for d in found), max(d.relative for d in found))
            for i, (x, found) in enumerate(zip(expected, zip(*everyone, strict=True), strict=True)))
        result = Verification(type(model).__name__, runner.group.spec, tolerance, outputs)
        if result.ok:
            return result
        if runner.group.spec.approximate:
            return replace(result, cause="approximate")
        if compiled.stage is not None:
            return replace(result, cause="stages")
        tensors, _ = flatten((args, kwargs))
        state = named_parts({**dict(model.named_parameters(remove_duplicate=False)),
                             **dict(model.named_buffers(remove_duplicate=False))})
        whole, local = compiled.whole, compiled.local
        main = Pair("main", whole.main, local.main,
                    arguments_of(whole, state, tensors), arguments_of(local, state, tensors))
        return _explained(result, ready, main, expected)


def _explained(result: Verification, ready: ReadyProgram, main: Pair, expected: Sequence[torch.Tensor]) -> Verification:
    """``result`` with the cause of its differences, and the nodes to blame."""
    captured = [astuple(difference(a, b)) for a, b in zip(main.whole(*main.whole_arguments), expected, strict=True)]
    if any(Difference(*d).exceeds(result.tolerance) for theirs in ready.group.gather(
            "the verification", captured) for d in theirs):
        return replace(result, cause="capture")
    compiled = ready.compiled
    assert isinstance(compiled, Compiled) and compiled.local.position is not None
    position = compiled.local.position
    nodes = first_differences(main, position, result.tolerance,
                              partial(ready.group.gather, "the verification"))
    return replace(result, cause="rewriting" if nodes else "execution", nodes=nodes)
