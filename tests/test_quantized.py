"""Packed weights: kinds as libraries make them, families of models and ways of sharing calls out, drawn against each
other; a parallel model gives what its quantized self gives on one device."""

from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path
from typing import Any

import artifact_runs
import emulation
import pytest
import quantized
import quantized_ranks
import stagewise
import torch
import zoo
from cases import made
from emulation import difference
from marks import whole
from pool import Pool
from torch import Tensor, nn

import xdit_compile
from xdit_compile.driver.compile_stage import staged
from xdit_compile.frontend.capture import capture
from xdit_compile.ir.call_arguments import call_arguments
from xdit_compile.ir.packed_tensors import named_parts, parts
from xdit_compile.ir.program import Program
from xdit_compile.ir.pytree import flatten
from xdit_compile.passes import localize, plan
from xdit_compile.passes.hoist import split_loop_invariant
from xdit_compile.passes.pipefusion import plan_pipeline
from xdit_compile.spec import ShardingSpec

FAMILIES = ("flux", "sd3", "pixart_alpha", "wan", "hunyuan_video")
MAIN = ("int8", "int8_dynamic", "layerwise", "q8_0")
SPECS = ("ulysses=2", "ring=2", "cfg=2")
TOLERANCE = 1e-5
WHOLE = ("nf4", "fp4")
"""Kinds with an operator of their own on some CPUs, which has no rule: it is computed whole, and reported."""


def drawn() -> list[Any]:
    """All pairs of families and main kinds, of which a quick run takes every fifth; other kinds on one model."""
    pairs = [(f, k) for f in FAMILIES for k in MAIN]
    others = [k for k in quantized.KINDS if k not in MAIN]
    quick = {*pairs[::5], *(("dit", k) for k in ("q4_0", "fp8", "nf4"))}
    return [pytest.param(*pair, marks=() if pair in quick else pytest.mark.whole)
            for pair in (*pairs, *(("dit", k) for k in others))]


def answer(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        return flatten(model(**copy.deepcopy(inputs)))[0]


def changed(name: str, kind: str) -> nn.Module:
    model = made(zoo.CASES[name])
    quantized.KINDS[kind](model)
    return model.eval()


@lru_cache(maxsize=1)
def captured(name: str, kind: str) -> tuple[nn.Module, Any, list[Tensor], Program]:
    model = changed(name, kind)
    arguments = call_arguments(model, zoo.CASES[name].inputs(2, True))
    left = copy.deepcopy(arguments)
    with torch.no_grad():
        result = model(*left[0], **left[1])
        before = {n: (id(t), t.dtype) for n, t in named_parts(dict(model.named_parameters())).items()}
        program = capture(model, *arguments)
        assert before == {n: (id(t), t.dtype) for n, t in named_parts(dict(model.named_parameters())).items()}
    return model, arguments, flatten((result, left))[0], program


def tolerance(name: str, kind: str) -> float:
    """Where activations are rounded to a few levels, the last bit of a value may decide between two of them. So much a
    model by itself answers otherwise when its inputs differ in their last bits."""
    if "dynamic" not in kind:
        return TOLERANCE
    model, arguments, expected, _ = captured(name, kind)
    found = TOLERANCE
    for seed in range(4):
        tensors, structure = flatten(arguments)
        noise = torch.Generator().manual_seed(seed)
        args, kwargs = structure.build([t * (1 + 2e-7 * torch.randn(t.shape, generator=noise))
                                        if t.is_floating_point() and t.numel() > 8 else t for t in tensors])
        with torch.no_grad():
            other = flatten((model(*args, **kwargs), (args, kwargs)))[0]
        found = max([found, *map(difference, other[:1], expected[:1])])
    return 3 * found


@pytest.mark.parametrize(("name", "kind", "spec"), [
    (name, kind, spec) if i == j else whole(name, kind, spec)
    for i, (name, kind) in enumerate([("flux", "int8"), ("sd3", "layerwise"), ("pixart_alpha", "int8")])
    for j, spec in enumerate(["tensor=2", "shard=2,ulysses=2", "offload=block"])])
def test_weights_in_parts(name: str, kind: str, spec: str) -> None:
    found = emulation.together(*captured(name, kind), spec)
    assert found.error <= TOLERANCE and found.work < 1.25


@pytest.mark.parametrize(("name", "kind"), [
    ("flux", "q8_0"), ("dit", "q4_0"), ("dit", "intx"),
    *(whole("dit", k) for k in ("q4_1", "q5_0", "q5_1", "iq4_nl", "bf16")),
    *(whole(f, k) for f in FAMILIES for k in MAIN if (f, k) != ("flux", "q8_0"))])
def test_packed_weights_are_shared_out(name: str, kind: str) -> None:
    """Of what is packed in blocks of numbers, rows alone are."""
    model, arguments, expected, program = captured(name, kind)
    for spec in ("tensor=2", "tensor=2,ulysses=2"):
        found = emulation.together(model, arguments, expected, program, spec)
        assert found.error <= tolerance(name, kind) and found.work < 1.25, spec


@pytest.mark.parametrize("kind", ["q8_0", whole("int8")])
def test_packed_weights_that_were_given_up_are_edited(kind: str) -> None:
    """Their parts come back for what is done to all modules, and look as if they were there when adapters come."""
    model, plain, inputs = changed("flux", kind), changed("flux", kind), zoo.CASES["flux"].inputs(1, False)
    parallel = xdit_compile.parallelize(model, "offload=block")
    first = answer(parallel, inputs)
    held = named_parts(dict(parallel.named_parameters()))
    assert not [n for n, t in held.items() if t.numel() > 256 and not t.is_meta]
    objects = list(map(id, parallel.parameters()))

    def other(module: nn.Module) -> None:
        for part in named_parts(dict(module.named_parameters(recurse=False))).values():
            part.add_(part.eq(3).to(part.dtype) if part.dtype in (torch.int8, torch.uint8) else part * 0.01)

    with torch.no_grad():
        plain.apply(other)
        parallel.apply(other)
    assert list(map(id, parallel.parameters())) == objects
    edited = answer(plain, inputs)
    assert max(map(difference, edited, first)) > 1e-3
    assert max(map(difference, answer(parallel, inputs), edited)) < TOLERANCE
    weights = {f"transformer.transformer_blocks.0.attn.to_q.lora_{k}.weight": torch.randn(size) for k, size in zip(
        "AB", ((4, 64), (64, 4)), strict=True)}
    for each in (plain, parallel):
        each.load_lora_adapter(dict(weights), prefix="transformer")
    adapted = answer(plain, inputs)
    assert max(map(difference, adapted, edited)) > 1e-3
    assert max(map(difference, answer(parallel, inputs), adapted)) < TOLERANCE


@pytest.mark.parametrize(("kind", "spec"), [
    ("int8", "ulysses=1"), ("int8", "offload=block"), whole("q8_0", "offload=block"), whole("fp8", "ulysses=1"),
    whole("nf4", "ulysses=1"), whole("nf4", "offload=block"), whole("int8_dynamic", "offload=block")])
def test_packed_models_are_moved_and_cast(kind: str, spec: str) -> None:
    """PyTorch swaps tensors that wrap others, which nothing that watches them may be in the way of."""
    model, inputs = changed("dit", kind), zoo.CASES["dit"].inputs(1, False)
    parallel, expected = xdit_compile.parallelize(model, spec), answer(model, inputs)
    for move in (lambda m: m, lambda m: m.to("cpu"), lambda m: m.to(torch.float32), lambda m: m.cpu()):
        assert max(map(difference, answer(move(parallel), inputs), expected)) < TOLERANCE
    if spec == "ulysses=1":
        parallel.transformer_blocks[0].to("cpu")
        assert max(map(difference, answer(parallel, inputs), expected)) < TOLERANCE


@pytest.mark.parametrize(("name", "kind"), drawn())
def test_ranks_together_give_the_numbers_of_one(name: str, kind: str) -> None:
    model, arguments, expected, program = captured(name, kind)
    # What is packed comes into the program as it is in memory.
    packed = named_parts(dict(model.named_parameters(remove_duplicate=False)))
    for node, what in zip(program.main.graph.find_nodes(op="placeholder"), program.inputs, strict=True):
        if what.kind == "parameter" and what.name in packed:
            assert node.meta["val"].dtype == packed[what.name].dtype
    # Where layers are computed whole, there may be nothing left of a batch to share out.
    for spec in (s for s in SPECS if s != "cfg=2" or kind not in WHOLE):
        found = emulation.together(model, arguments, expected, program, spec)
        assert found.error <= tolerance(name, kind), spec
        if kind in WHOLE:
            continue
        assert found.work < 1.25 and (spec == "cfg=2" or found.methods == {spec.partition("=")[0]})
        assert not any("_int_mm" in note.text and note.kind == "fallback" for note in found.notes)


@pytest.mark.parametrize(("name", "kind"), [
    whole(*p.values) if "int8_dynamic" in p.values else p for p in drawn() if {*WHOLE}.isdisjoint(p.values)])
def test_stages_give_the_numbers_of_one(name: str, kind: str) -> None:
    found = stagewise.emulate(zoo.CASES[name], 1, True, "pipefusion=2,patches=2", quantized.KINDS[kind])
    limit = tolerance(name, kind)
    assert found.exact <= limit and found.patched <= limit


@pytest.mark.parametrize("kind", ["q4_0", whole("layerwise"), whole("int8"), whole("fp8")])
def test_unpacked_weights_are_not_kept(kind: str) -> None:
    """Neither from step to step, nor by a stage from patch to patch: there would be more of them than packed ones."""
    model, _, _, program = captured("flux", kind)
    weights = {tuple(p.shape) for m in model.modules() if isinstance(m, nn.Linear)
               for p in [torch.empty(m.out_features, m.in_features)]}
    weights |= {shape[::-1] for shape in weights}
    sample = next(i.name for i in program.inputs if i.kind == "argument")
    local = localize(*plan(program, ShardingSpec.parse("ulysses=2")), 0)
    invariant, _ = split_loop_invariant(local, [sample])
    assert invariant is not None
    kept = list(invariant.main.graph.output_node().meta["val"])
    pipeline = plan_pipeline(program, ShardingSpec.parse("pipefusion=2,patches=2"))
    for rank in range(2):
        kept += staged(pipeline, rank)[1].once.main.graph.output_node().meta["val"]
    assert kept and not [t.shape for t in kept if tuple(t.shape) in weights]


@pytest.mark.parametrize("kind", ["int8", "layerwise", "q8_0", whole("int8_dynamic"), whole("nf4"), whole("fp8")])
def test_weights_that_are_written_or_replaced_are_read(kind: str) -> None:
    model, inputs = changed("dit", kind), zoo.CASES["dit"].inputs(1, True)
    parallel = xdit_compile.parallelize(model, "ulysses=1")
    first = answer(model, inputs)
    assert max(map(difference, answer(parallel, inputs), first)) < TOLERANCE
    path = "transformer_blocks.0.ff.net.2"
    layer = model.get_submodule(path)
    with torch.no_grad():
        memory = next(iter(parts(layer.weight).values()))
        memory.view(-1)[:16] = 0
    written = answer(model, inputs)
    assert max(map(difference, written, first)) > 1e-4
    assert max(map(difference, answer(parallel, inputs), written)) < TOLERANCE
    other = made(zoo.CASES["dit"], seed=5)
    quantized.KINDS[kind](other)
    layer.weight = other.get_submodule(path).weight
    replaced = answer(model, inputs)
    assert max(map(difference, replaced, written)) > 1e-3
    assert max(map(difference, answer(parallel, inputs), replaced)) < TOLERANCE
    # Another type of weights is another program.
    plain = made(zoo.CASES["dit"]).get_submodule(path)
    model.get_submodule("transformer_blocks.0.ff.net").add_module("2", plain)
    assert max(map(difference, answer(parallel, inputs), answer(model, inputs))) < TOLERANCE


def test_metadata_that_changes_is_noticed() -> None:
    """A parameter's own attributes tell what its bytes mean."""
    from gguf import GGMLQuantizationType

    model, inputs = changed("dit", "q4_1"), zoo.CASES["dit"].inputs(1, True)
    parallel = xdit_compile.parallelize(model, "ulysses=1")
    first = answer(parallel, inputs)
    for layer in (b.attn1.to_q for b in model.transformer_blocks):
        # Of as many bytes for as many numbers, each of another meaning.
        assert layer.weight.quant_type == GGMLQuantizationType.Q4_1
        layer.weight.quant_type = GGMLQuantizationType.Q4_1
    assert max(map(difference, answer(parallel, inputs), first)) < TOLERANCE
    model.transformer_blocks[1].attn1.to_q.compute_dtype = torch.float64
    with pytest.raises(Exception, match=r"dtype|Double"):
        answer(model, inputs)
    with pytest.raises(Exception, match=r"dtype|Double"):
        answer(parallel, inputs)


@pytest.mark.parametrize("kind", ["int8", whole("int8_dynamic"), "q8_0", "layerwise", whole("q3_k"), whole("fp8")])
def test_artifacts_hold_what_is_packed(kind: str, tmp_path: Path) -> None:
    model, inputs = changed("dit", kind), zoo.CASES["dit"].inputs(1, False)
    expected = answer(model, inputs)
    xdit_compile.export(model, "ulysses=1", inputs, tmp_path / "model.xdit", weights="included")
    loaded = xdit_compile.load(tmp_path / "model.xdit")
    assert max(map(difference, answer(loaded, inputs), expected)) < TOLERANCE
    held = sum(p.numel() * p.element_size() for p in named_parts(dict(model.named_parameters())).values())
    assert sum(f.stat().st_size for f in (tmp_path / "model.xdit").glob("*.safetensors")) < 1.3 * held


@pytest.mark.parametrize(("kind", "spec"), [
    ("q8_0", "tensor=2"), whole("int8", "tensor=2"), whole("int8", "ulysses=2,shard=2"),
    whole("q8_0", "ulysses=2,shard=2"), whole("layerwise", "tensor=2"), whole("fp8", "ulysses=2,shard=2")])
def test_ranks_load_their_shares_of_what_is_packed(pool: Pool, tmp_path: Path, kind: str, spec: str) -> None:
    model, inputs = changed("dit", kind), zoo.CASES["dit"].inputs(1, False)
    expected = answer(model, inputs)
    path = xdit_compile.export(model, spec, inputs, tmp_path / "model.xdit", weights="included")
    for found in pool.run(artifact_runs.called, str(path), inputs, ranks=range(2), timeout=120):
        assert difference(found, *expected) < TOLERANCE


def test_explain_counts_what_is_packed() -> None:
    plain, packed = made(zoo.CASES["flux"]), changed("flux", "int8")
    inputs = zoo.CASES["flux"].inputs(1, False)
    both = [xdit_compile.explain(m, "pipefusion=2,patches=2", inputs).stages.stages for m in (plain, packed)]
    for one, other in zip(*both, strict=True):
        assert other.parameters < 0.5 * one.parameters


@pytest.mark.parametrize("kind", ["int8", whole("q8_0"), whole("layerwise"), whole("int8_dynamic")])
def test_inductor_compiles_it(kind: str) -> None:
    model, inputs = changed("dit", kind), zoo.CASES["dit"].inputs(1, False)
    parallel = xdit_compile.parallelize(model, "ulysses=1,backend=inductor")
    assert max(map(difference, answer(parallel, inputs), answer(model, inputs))) < tolerance("dit", kind)


@pytest.mark.parametrize(("kind", "spec"), [
    ("int8", "ulysses=2,shard=2"), ("q8_0", "tensor=2"), ("layerwise", "pipefusion=2,patches=2,warmup=all"),
    ("int8_dynamic", "tensor=2"),
    whole("int8", "ulysses=2"), whole("q8_0", "pipefusion=2,warmup=all"), whole("q4_0", "data=2,shard=2,offload=block"),
    whole("fp8", "ulysses=2,shard=2"), whole("nf4", "ulysses=2,shard=2"),
    whole("nf4", "ulysses=2,shard=2,offload=block"),
    whole("int8", "tensor=2"), whole("int8_dynamic", "tensor=2,offload=block"), whole("layerwise", "ulysses=2,shard=2"),
    whole("q8_0", "ring=2"), whole("layerwise", "ulysses=2"), whole("int8", "pipefusion=2,patches=2,warmup=all"),
    whole("int8", "cfg=2"), whole("int8_dynamic", "pipefusion=2,warmup=all"), whole("nf4", "ulysses=2")])
def test_on_real_processes(pool: Pool, kind: str, spec: str) -> None:
    batch = 2 if "cfg" in spec or "data" in spec else 1
    for found in pool.run(quantized_ranks.differences, "flux", kind, spec, batch, ranks=range(2), timeout=150):
        assert max(found["steps"]) < (0.05 if "dynamic" in kind else TOLERANCE)
        assert "pipefusion" not in spec or found["held"] < 0.8 * found["every"]
        # Shares are no parameters of the model.
        assert not {"shard", "tensor", "offload"} & {*spec.replace("=", ",").split(",")} or (
            found["held"] < 0.1 * found["every"])
