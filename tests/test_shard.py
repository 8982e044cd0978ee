"""Parameters cut over ranks, or kept on the host: the same bits, one block ahead, and nothing stale."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import cases
import emulation
import pytest
import random_models
import shard_runs
import torch
import zoo
from marks import whole
from pool import Pool, RemoteError
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import xdit_compile
from xdit_compile.cli.main import _bytes as size_of
from xdit_compile.diagnostics.explain import explain
from xdit_compile.driver.compile_call import compile_program
from xdit_compile.errors import SpecError
from xdit_compile.frontend.capture import capture
from xdit_compile.ir.call_arguments import call_arguments
from xdit_compile.ir.host_copy import fetch
from xdit_compile.ir.parameter_groups import ALIGNMENT, parameter_groups
from xdit_compile.ir.program import ARRIVAL, Program, brings_parameters
from xdit_compile.ir.pytree import flatten
from xdit_compile.runtime.execution.parameter_store import ParameterStore
from xdit_compile.spec import ShardingSpec

c10d = torch.ops._c10d_functional
SPECS = ("shard=2", "ulysses=2,shard=2")


# Groups


class Odd(nn.Module):
    """Tied, small, not contiguous, of two dtypes, with a number for a name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(40, 24)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(24, 24), nn.Conv2d(2, 4, 3)) for _ in range(2))
        self.blocks[1][0].weight = self.blocks[0][0].weight
        self.blocks.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.blocks[0][1].bias.data = self.blocks[0][1].bias.data.double()
        self.scale = nn.Parameter(torch.ones(3))
        self.parts = nn.ParameterList([nn.Parameter(torch.randn(300, 2).T)])


def test_groups_are_blocks_and_what_is_outside() -> None:
    found = {g.name: g for g in parameter_groups(Odd())}
    assert set(found) == {"embed:float32", "blocks.0:float32", "blocks.0:float64", "blocks.1:float32", "parts:float32"}
    tied = found["blocks.0:float32"].members[0]
    assert tied.names == ("blocks.0.0.weight", "blocks.1.0.weight")
    for group in found.values():
        ends = [0]
        for member in group.members:
            assert member.offset >= ends[-1] and member.offset * group.dtype.itemsize % ALIGNMENT == 0
            ends.append(member.offset + member.size)
        assert group.share(3) * 3 >= group.length >= ends[-1]


def test_shares_together_are_the_parameters() -> None:
    model = Odd()
    kept = {n: p.detach().clone(memory_format=torch.preserve_format) for n, p in model.named_parameters()}
    groups = parameter_groups(model)
    stores = []
    for rank in range(3):
        copy = Odd()
        with torch.no_grad():
            for n, p in copy.named_parameters():
                p.copy_(kept[n])
        stores.append(ParameterStore(parameter_groups(copy), rank, 3, offload=False))
        stores[-1].take(copy, set(stores[-1].groups), None, torch.device("cpu"))
        assert [n for n, p in copy.named_parameters() if not p.is_meta] == ["scale"]
        assert copy.blocks[0][0].weight is copy.blocks[1][0].weight
    for group in groups:
        memory = torch.cat([s[group.name] for s in stores])
        for member in group.members:
            found = torch.as_strided(memory, member.shape, member.stride, member.offset)
            assert torch.equal(found, kept[member.name])


# Programs


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num()) if a.is_floating_point() else torch.equal(a, b)


def on_ranks(model: nn.Module, arguments: Any, program: Program, spec: str) -> list[tuple[Any, ...]]:
    """What each rank returns, in lock-step."""
    ranks, results = emulation.on_ranks(model, arguments, program, spec)
    check_order(ranks)
    return results


def starts(program: Program) -> list[tuple[str, ...]]:
    """All that ranks come to together, in order."""
    functions, found = dict(program.functions()), list[tuple[str, ...]]()

    def walk(graph: fx.Graph) -> None:
        for node in graph.nodes:
            if node.op == "call_module":
                walk(functions[str(node.target)].graph)
            elif getattr(node.target, "namespace", "") == "_c10d_functional" and node.target is not (
                    c10d.wait_tensor.default):
                of = node.args[0].name if brings_parameters(node) else ""
                found.append((str(node.target), str(node.args[-1]), of))

    walk(program.main.graph)
    return found


def check_order(ranks: list[Program]) -> None:
    """All ranks start the same in one order; no more than two arrivals are in memory that are read within a while."""
    assert all(starts(r) == starts(ranks[0]) for r in ranks)
    for program in ranks:
        nodes = list(program.main.graph.nodes)
        place = {n: i for i, n in enumerate(nodes)}
        begun = {n.meta[ARRIVAL]: place[n] for n in reversed(nodes) if n.target in (
            fetch, c10d.all_gather_into_tensor.default) and brings_parameters(n)}
        first: dict[int, int] = {}
        for node in nodes:
            for number in {n.meta[ARRIVAL] for n in node.all_input_nodes if brings_parameters(n)}:
                if not brings_parameters(node):
                    first.setdefault(number, place[node])
        for number, at in first.items():
            assert begun[number] < at
            if number + 2 in begun and not any("offload" in str(p.spec) for p in ranks):
                assert begun[number + 2] > at, "more than one block ahead"


QUICK = {(n, SPECS[i % 2]) for i, n in enumerate(zoo.BASIC) if i % 14 == 0} | {("flux", SPECS[1]), ("dit", SPECS[0])}


@pytest.mark.parametrize(("name", "spec"), [
    pytest.param(n, s, marks=[] if (n, s) in QUICK else pytest.mark.whole) for n in zoo.CASES for s in SPECS])
def test_shares_give_the_same_bits(name: str, spec: str) -> None:
    model, arguments, _, program = emulation._captured(zoo.CASES[name], 2, True)
    # Alone, parameters are cut over ranks that share nothing else but the batch.
    spec = spec if "ulysses" in spec else f"data=2,{spec}"
    try:
        expected = on_ranks(model, arguments, program, shard_runs.plain(spec))
    except SpecError:
        pytest.skip("this batch cannot be cut")
    found = on_ranks(model, arguments, program, spec)
    for a, b in zip(expected, found, strict=True):
        assert all(map(equal, a, b))


@pytest.mark.parametrize("seed", [s if s in (0, 3, 5) else whole(s) for s in range(200)])
def test_random_models_give_the_same_bits(seed: int) -> None:
    _, model, arguments = random_models.drawn(seed)
    args = call_arguments(model, arguments)
    program = capture(model, *args)
    expected = on_ranks(model, args, program, "ring=3")
    for spec in ("ring=3,shard=3", "ring=3,offload=block", "ring=3,shard=3,offload=block"):
        for a, b in zip(expected, on_ranks(model, args, program, spec), strict=True):
            assert all(map(equal, a, b))


def test_what_is_read_again_far_away_comes_again() -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in (*self.blocks, self.blocks[0]):
                x = torch.nn.functional.gelu(block(x))
            return x

    model = Again().eval().requires_grad_(False)
    program = capture(model, (torch.randn(2, 32),), {})
    local = compile_program(program, ShardingSpec.parse("data=2,shard=2"), groups=parameter_groups(model)).local
    came = [of for _, _, of in starts(local) if of]
    assert len(came) == 6 and came[0] == came[-1] and len(set(came)) == 5


# Real processes


@pytest.mark.parametrize(("name", "spec"), [
    ("dit", "ulysses=2,shard=2"), ("flux", "ulysses=2,shard=2,offload=block"), whole("wan", "offload=block"),
    whole("dit", "pipefusion=2,ulysses=2,patches=2,shard=2"), whole("dit", "cfg=2,ulysses=2,shard=2"),
    whole("flux", "ulysses=2,ring=2,shard=4"), whole("wan", "pipefusion=2,ulysses=2,warmup=all,shard=2,offload=block"),
    whole("dit", "ulysses=2,shard=2,backend=inductor"), *(whole(name, "ulysses=2,shard=2") for name in (
        "sd3", "pixart_alpha", "hunyuan_dit", "cogvideox", "mochi", "ltx", "hunyuan_video", "qwen_image", "latte"))])
def test_processes_give_the_same_bits(pool: Pool, name: str, spec: str) -> None:
    parsed = ShardingSpec.parse(spec)
    for seen in pool.run(shard_runs.like_plain, name, spec, ranks=range(parsed.world_size), timeout=240):
        assert all(seen["same"]), seen
        assert seen["captures"] == [1, 1]
        # Parameters that were given up leave blocks as alike as they were.
        assert seen["functions"][0] == seen["functions"][1]
        if parsed.pipefusion_degree == 1:
            assert seen["left"] < 4096
            assert seen["all"] * 0.98 <= seen["held"] * parsed.shard_degree <= seen["all"] * 1.1


def test_edits_that_shares_would_not_see_are_refused(pool: Pool) -> None:
    for said in pool.run(shard_runs.refused, "dit", "ulysses=2,shard=2", ranks=range(2), timeout=240):
        # What is put around modules is followed.
        assert {how for how, text in said.items() if "first call" in text} == {
            "state_dict", "load_state_dict", "of a child", "assigned", "written into", "written through .data",
            "put into .data", "pickled", "replaced", "a part moved", "cast"}


@pytest.mark.parametrize("spec", ["ulysses=2,shard=2,offload=block", whole("ulysses=2,shard=2")])
def test_each_rank_reads_its_share_alone(pool: Pool, tmp_path: Path, spec: str) -> None:
    cases.made(zoo.CASES["flux"]).save_pretrained(tmp_path, max_shard_size="400KB")
    found = pool.run(shard_runs.from_files, "flux", str(tmp_path), spec, ranks=range(2), timeout=240)
    for seen in found:
        assert all(seen["same"])
        # Rows that two shares have a part of are read by both.
        assert 0.45 * seen["all"] < seen["read"] < 0.55 * seen["all"]
    assert sum(seen["read"] for seen in found) >= found[0]["all"]


def test_guidance_in_turns_needs_all_parameters_in_each_group(pool: Pool) -> None:
    with pytest.raises(RemoteError, match="take turns in calls whose batch cannot be cut"):
        pool.run(shard_runs.like_plain, "dit", "cfg=2,ulysses=1,shard=2", ranks=range(2), timeout=120)


# Memory that is said ahead


class Live(TorchDispatchMode):
    """The most bytes of parameters that had been fetched and were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self._found = 0, list[tuple[int, int]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is fetch:
            self._found.append((made.untyped_storage()._weak_ref(), made.untyped_storage().nbytes()))
        self.peak = max(self.peak, sum(n for ref, n in self._found if not torch.UntypedStorage._expired(ref)))
        return made


def test_no_more_is_alive_than_explain_says() -> None:
    case = zoo.CASES["flux"]
    model, inputs = cases.made(case), case.inputs(1, True)
    said = explain(model, "offload=block", inputs).memory
    parallel = xdit_compile.parallelize(model, "offload=block")
    parallel(**inputs)
    (ready,) = parallel.runners["forward"].programs.values()
    with Live() as live:
        ready.executor(flatten(((), inputs))[0])
    assert live.peak == said.gathered
    sizes = sorted(g.length * g.dtype.itemsize for g in parameter_groups(model))
    assert said.gathered <= 2 * sizes[-1] and said.weights < 4096 and sum(sizes) == said.host


def test_a_rank_of_eight_takes_an_eighth_and_two_blocks() -> None:
    from diffusers import Flux2Transformer2DModel

    with torch.device("meta"):
        model = Flux2Transformer2DModel().to(torch.bfloat16).eval()

        def meta(*shape: int) -> torch.Tensor:
            return torch.empty(*shape, dtype=torch.bfloat16)

        inputs = {"hidden_states": meta(1, 4096, 128), "encoder_hidden_states": meta(1, 512, 15360),
                  "timestep": meta(1), "guidance": meta(1), "img_ids": meta(1, 4096, 4), "txt_ids": meta(1, 512, 4)}
    nbytes = sum(p.nbytes for p in model.parameters())
    assert nbytes > 60e9
    found = explain(model, "ulysses=8,shard=8", inputs, device_memory=8 * 10**9)
    block = max(g.length * g.dtype.itemsize for g in parameter_groups(model))
    assert found.memory.weights <= nbytes / 8 * 1.001
    assert found.memory.weights + found.memory.gathered <= nbytes / 8 * 1.001 + 2 * block
    assert found.fit is not None and not found.fit.fits
    trials = {t.spec: t.memory for t in found.fit.trials}
    both = trials["ulysses=8,shard=8,offload=block"]
    assert both is not None and both.device < 8e9 < found.memory.device and both.host == found.memory.weights
    assert "what other words would take" in str(found).lower() and "pipefusion=8" in trials
    assert "ulysses=4,tensor=2,shard=4" in trials


def test_what_fits_needs_no_other_words() -> None:
    case = zoo.CASES["dit"]
    found = explain(cases.made(case), "ulysses=2", case.inputs(2, True), device_memory=10**9)
    assert found.fit is not None and found.fit.fits and not found.fit.trials
    assert "It fits a device of 1.00 GB" in str(found)
    assert found.to_dict()["memory"]["device"] == found.memory.device


@pytest.mark.parametrize(("text", "nbytes"), [("24GB", 24 * 10**9), ("80 GiB", 80 * 2**30), ("1.5tb", 1500 * 10**9),
                                              ("512", 512)])
def test_sizes_as_people_write_them(text: str, nbytes: int) -> None:
    assert size_of(text) == nbytes
    with pytest.raises(argparse.ArgumentTypeError, match="as 24GB"):
        size_of(f"about {text}")
