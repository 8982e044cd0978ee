"""What does not change from step to step is computed once, and nothing is used that has changed."""

from __future__ import annotations

import gc
import random
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
import zoo
from cases import made
from hypothesis import given, settings
from hypothesis import strategies as st
from kept_runs import again, error, executor_of, flops, results, stepped, steps_on_ranks
from marks import whole
from pool import Pool
from torch import Tensor, nn

import xdit_compile
from xdit_compile.driver.compile_call import compile_call
from xdit_compile.runtime.execution.executor import Executor
from xdit_compile.runtime.execution.loop_invariant_cache import ENTRIES, LoopInvariantCache
from xdit_compile.spec import ShardingSpec

EXACT = 1e-5  # of the output's scale, in float32
MOVED = 1e-3  # what a change does to the result is more


def run_of(name: str, spec: str = "ulysses=1") -> tuple[nn.Module, Any, dict[str, Any]]:
    """A model, the same in parallel on one rank, and inputs that it was called with."""
    case = zoo.CASES[name]
    model, inputs = made(case), case.inputs(2, True)
    run = xdit_compile.parallelize(model, spec)
    results(run, again(inputs))  # captures, which counts as work
    return model, run, inputs


# What is saved


def text(inputs: dict[str, Any]) -> tuple[int, int]:
    """Text tokens of the whole batch, and their features."""
    *rows, width = inputs["encoder_hidden_states"].shape
    return rows[0] * rows[1], width


def pixart(c: Any, inputs: dict[str, Any]) -> int:
    """Caption projection; keys and values of each block's cross attention; embeddings of two sides and their ratio."""
    tokens, width = text(inputs)
    inner, batch = c.num_attention_heads * c.attention_head_dim, len(inputs["timestep"])
    third = inner // 3
    return (2 * tokens * (width * inner + inner * inner) + c.num_layers * 2 * 2 * tokens * c.cross_attention_dim * inner
            + 2 * 3 * batch * (256 * third + third * third))  # fmt: skip


def wan(c: Any, inputs: dict[str, Any]) -> int:
    """Text embedder; keys and values of each block's cross attention."""
    tokens, width = text(inputs)
    inner = c.num_attention_heads * c.attention_head_dim
    return 2 * tokens * (width * inner + inner * inner) + c.num_layers * 2 * 2 * tokens * inner * inner


def sd3(c: Any, inputs: dict[str, Any]) -> int:
    """Text goes through the blocks, so that only its embedder is saved, and that of the pooled text."""
    tokens, width = text(inputs)
    inner, batch = c.num_attention_heads * c.attention_head_dim, len(inputs["timestep"])
    return 2 * tokens * width * c.caption_projection_dim + 2 * batch * (c.pooled_projection_dim * inner + inner * inner)


@pytest.mark.parametrize(("name", "formula"), [("pixart_alpha", pixart), ("wan", wan), ("sd3", sd3)])
def test_operations_are_saved(name: str, formula: Any) -> None:
    model, run, inputs = run_of(name)
    saved = formula(model.config, inputs)
    executed = [flops(run, stepped(model, inputs, i)) for i in range(3)]
    assert executed[0] - executed[1] == saved > 0 and executed[1] == executed[2]
    explained = xdit_compile.explain(model, "ulysses=1", inputs)
    assert explained.kept is not None and (explained.kept.flops, explained.kept.of) == (saved, executed[0])
    assert set(explained.kept.changes) == {"hidden_states", "timestep"}
    assert executor_of(run)._cache is not None and explained.to_dict()["kept"]["flops"] == saved
    (kept,) = executor_of(run)._cache._sets.values()  # type: ignore[union-attr]
    memory = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in kept.values}
    assert explained.kept.nbytes == sum(memory.values())
    assert "ept from step to step" in str(explained) and "kept from step to step" in explained.summary()
    for i in range(3):
        assert error(model, run, stepped(model, inputs, i)) <= EXACT
    assert run.runners["forward"].group.counts["kept"] == 2 + 2, "the second loop begins with nothing"


def test_stages_save_their_share() -> None:
    """Each its blocks' keys and values, and both what all blocks take."""
    case = zoo.CASES["pixart_alpha"]
    model, inputs = made(case), case.inputs(2, True)
    kept = [xdit_compile.explain(model, "pipefusion=2,patches=2", inputs, rank=r).kept for r in range(2)]
    tokens, inner = text(inputs)[0], 48
    shared = pixart(model.config, inputs) - 3 * 4 * tokens * inner * inner
    assert shared > 0 and [k and k.flops - shared for k in kept] in (
        [4 * n * tokens * inner * inner for n in split] for split in ((1, 2), (2, 1)))


def test_switched_off() -> None:
    model, run, inputs = run_of("sd3", "keep=off")
    executed = {flops(run, stepped(model, inputs, i)) for i in range(3)}
    assert len(executed) == 1 and run.runners["forward"].group.counts["kept"] == 0
    explained = xdit_compile.explain(model, "keep=off", inputs)
    assert explained.kept is None and explained.local.flops == executed.pop()


def test_weights_are_not_kept_twice() -> None:
    """What autocast makes of them is made at each step, as it is without us; rotary tables are kept."""
    case = zoo.CASES["flux"]
    model, inputs = made(case), case.inputs(1, True)
    with torch.autocast("cpu", torch.bfloat16):
        explained = xdit_compile.explain(model, "ulysses=1", inputs)
    assert explained.kept is not None and any("_to_copy" in op for op in explained.operators)
    tokens = inputs["hidden_states"].shape[1] + inputs["txt_ids"].shape[0]
    assert 2 * tokens * 16 * 4 <= explained.kept.nbytes < 4 * tokens * 16 * 4 + 40_000 < sum(
        p.numel() for p in model.parameters())


# What has changed


CHANGES = ("another prompt", "written into", "a parameter", "a parameter's data", "a parameter's memory",
           "a new parameter")


@pytest.mark.parametrize("what", CHANGES)
def test_change_is_seen(what: str) -> None:
    model, run, inputs = run_of("pixart_alpha")
    for i in range(2):
        assert error(model, run, stepped(model, inputs, i)) <= EXACT
    calls = run.runners["forward"].group.counts["kept"]
    assert calls == 1
    moved = stepped(model, inputs, 2)
    before = results(run, moved)
    layer: Any = model.get_submodule("caption_projection.linear_1")
    with torch.no_grad():
        if what == "another prompt":
            moved["encoder_hidden_states"] = moved["encoder_hidden_states"].flip(1)
        elif what == "written into":
            moved["encoder_hidden_states"].mul_(-1)
        elif what == "a parameter":
            layer.weight.mul_(-1)
        elif what == "a parameter's data":
            layer.weight.data.mul_(-1)
        elif what == "a parameter's memory":
            layer.weight.data = -layer.weight.data
        else:
            layer.weight = nn.Parameter(-layer.weight, requires_grad=False)
    moved = stepped(model, moved, 1)
    assert error(model, run, moved) <= EXACT
    assert max((a - b).abs().max() for a, b in zip(results(model, moved), before, strict=True)) > MOVED


def half(w: Tensor) -> None:
    w[: len(w) // 2].mul_(-1)


@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("write", [lambda w: w.mul_(1.1), half, lambda w: w.copy_(torch.randn(w.shape))])
def test_writes_that_are_not_counted_do_not_survive_a_loop(within: bool, write: Any) -> None:
    """EMA copies and LoRA that is fused write through ``.data``; prompts are encoded once."""
    model, run, inputs = run_of("pixart_alpha")
    kept = run.runners["forward"].group.counts
    for loop in range(3):
        for i in range(3):
            assert error(model, run, stepped(model, inputs, i)) <= EXACT
            if within or i == 2:
                write(model.get_submodule("caption_projection.linear_1").weight.data)
        assert kept["kept"] == (0 if within else 2 * (loop + 1))


def test_loops_of_one_step() -> None:
    """The same time again, with the same prompt: a new loop; with another: the other half of guidance."""
    model, run, inputs = run_of("sd3")
    weight = model.get_parameter("context_embedder.weight")
    other = again(inputs)
    for _ in range(3):
        assert error(model, run, stepped(model, inputs, 1)) <= EXACT
        assert error(model, run, stepped(model, other, 1)) <= EXACT
        weight.data[0, 0] += 1
    assert run.runners["forward"].group.counts["kept"] == 0


def test_prompts_by_turns() -> None:
    """As guidance calls a model; of many, the last few are kept."""
    model, run, inputs = run_of("wan")
    prompts = [again(inputs) for _ in range(ENTRIES + 1)]
    for p, prompt in enumerate(prompts):
        prompt["encoder_hidden_states"] *= p + 1
    first = [flops(run, stepped(model, p, 0)) for p in prompts[:2]]
    later = [flops(run, stepped(model, p, i)) for i in (1, 2) for p in prompts[:2]]
    assert len({*first}) == len({*later}) == 1 and later[0] < first[0]
    assert all(error(model, run, stepped(model, p, i)) <= EXACT for i in (3, 4) for p in prompts)
    kept = executor_of(run)._cache
    assert kept is not None and len(kept) == ENTRIES


def test_repeated_by_turns() -> None:
    """Both calls of guidance once more, after an uncounted change of weights."""
    model, run, inputs = run_of("sd3")
    calls = [stepped(model, again(inputs), 1) for _ in range(2)]
    assert all(error(model, run, c) <= EXACT for c in calls)
    model.get_parameter("context_embedder.weight").data.mul_(-1)
    assert all(error(model, run, c) <= EXACT for c in calls)


def test_nothing_is_held() -> None:
    model, run, inputs = run_of("sd3")
    kept = executor_of(run)._cache
    assert kept is not None and len(kept) == 0, "the first prompt is gone"
    results(run, stepped(model, inputs, 0))
    values = [weakref.ref(v) for s in kept._sets.values() for v in s.values]
    assert values
    del inputs["encoder_hidden_states"]
    assert all(v() is None for v in values) and len(kept) == 0
    inputs = zoo.CASES["sd3"].inputs(2, True)
    results(run, inputs)
    values = [weakref.ref(v) for s in kept._sets.values() for v in s.values]
    assert all(v() is not None for v in values)
    del model, run, kept
    gc.collect()
    assert all(v() is None for v in values)


class Told(nn.Module):
    """Returns what it makes of the prompt, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)

    def forward(self, x: Tensor, t: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        told = self.embed(prompt)
        return x * t[:, None, None] + told, told, told.transpose(1, 2)


def test_caller_may_write_into_results() -> None:
    model = Told().eval().requires_grad_(False)
    run = xdit_compile.parallelize(model, "ulysses=1")
    prompt = torch.randn(2, 3, 4)
    for i in range(3):
        call = {"x": torch.randn(2, 3, 4), "t": torch.full((2,), 0.9 - 0.2 * i), "prompt": prompt}
        assert error(model, run, call) == 0
        for result in run(**call):
            result.zero_()
    assert run.runners["forward"].group.counts["kept"] == 2, "the second call of each pair is the first once more"


class Placed(nn.Module):
    """Positions from a constant table, as the paper has them; the sample comes last."""

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        rates = torch.exp(torch.arange(4) * -0.5)
        return x * t[:, None, None] + torch.outer(torch.arange(x.shape[1]), rates).sin()


def test_constant_tables_are_folded() -> None:
    model = Placed().eval()
    run = xdit_compile.parallelize(model, "ulysses=1")
    for i in range(3):
        assert error(model, run, {"x": torch.randn(2, 3, 4), "t": torch.full((2,), 0.9 - 0.2 * i)}) <= EXACT
    assert run.runners["forward"].group.counts["kept"] == 2
    operators = {str(n.target) for n in executor_of(run).program.main.graph.nodes if n.op == "call_function"}
    assert operators and not any("sin" in o or "exp." in o for o in operators), operators


def test_inference_mode() -> None:
    """Tensors that do not count writes: nothing made of them is kept."""
    with torch.inference_mode():
        model, run, inputs = run_of("sd3")
        for i in range(2):
            assert error(model, run, stepped(model, inputs, i)) <= EXACT
        inputs["encoder_hidden_states"].mul_(-1)
        assert error(model, run, stepped(model, inputs, 2)) <= EXACT
    assert run.runners["forward"].group.counts["kept"] == 0


class Writing(Told):
    """Leaves something in what it is given."""

    def forward(self, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:  # type: ignore[override]
        prompt.add_(1)
        return x * t[:, None, None] + self.embed(prompt)


class Untimed(Told):
    """No step of a loop."""

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:  # type: ignore[override]
        return x + self.embed(prompt)


def test_only_steps_of_a_loop_keep() -> None:
    x, t = torch.randn(2, 3, 4), torch.rand(2)
    for model, args in ((Untimed(), (x, x.clone())), (Writing(), (x, t, x.clone()))):
        compiled = compile_call(model.eval().requires_grad_(False), ShardingSpec(), args, {})
        assert compiled.invariant is None and compiled.body is compiled.local
        assert compiled.captured.output_spec.changes_arguments == isinstance(model, Writing)
    assert compile_call(Told().eval(), ShardingSpec(), (x, t, x.clone()), {}).invariant is not None


# Any program


class Made(nn.Module):
    """Random operators on a sample, a time, two conditions and weights; twice the same block."""

    def __init__(self, plan: list[tuple[int, int, int]], block: bool = True) -> None:
        super().__init__()
        self.plan = plan
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("table", torch.randn(2, 3, 4))
        self.inner = nn.ModuleList(Made(plan[::-1], False) for _ in range(2 * block))

    def forward(self, x: Tensor, t: Tensor, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
        values = [x, t, one, two, self.table, torch.arange(4.0).expand(2, 3, 4)]
        for op, a, b in self.plan:
            first, second = values[a % len(values)], values[b % len(values)]
            values.append([
                lambda a, b: a + b, lambda a, b: a.sin(), lambda a, b: a @ (self.weight * 2).T / 3,
                lambda a, b: a.transpose(1, 2).reshape(2, 3, 4), lambda a, b: torch.cat([a, b], 1)[:, 1:4],
                lambda a, b: a.chunk(2, -1)[1].repeat(1, 1, 2), lambda a, b: a @ self.weight.softmax(0)][op](
                    first, second))
            if op == 6 and self.inner:
                values.extend(self.inner[b % 2](values[-1], second, first, values[a % len(values)]))
        return values[-1], values[-2]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 30), st.integers(0, 30)), min_size=2, max_size=9))
def test_both_parts_are_the_whole(plan: list[tuple[int, int, int]]) -> None:
    model = Made(plan).eval().requires_grad_(False)
    tensors = [torch.randn(2, 3, 4) for _ in range(4)]
    compiled = compile_call(model, ShardingSpec(), tensors, {})
    assert compiled.changes == ("x", "t")
    whole = Executor(compiled.local, model)
    parts = Executor(compiled.body, model, compiled.invariant)
    for step in range(3):
        tensors[:2] = [torch.randn(2, 3, 4) for _ in range(2)]
        if step == 2:
            tensors[3] = torch.randn(2, 3, 4)
        for a, b, c in zip(whole(tensors), parts(tensors), model(*tensors), strict=True):
            assert torch.equal(a, b) and torch.allclose(a, c, atol=1e-5)
    if compiled.invariant is not None:
        assert not {"arg_0", "arg_1"} & {i.name for i in compiled.invariant.inputs}
        assert any(i.kind == "invariant" for i in compiled.body.inputs)


# Ranks


@pytest.mark.parametrize(("name", "spec"), [
    ("pixart_alpha", "pipefusion=2,patches=2"),
    *(whole(n, s) for n, s in [
        ("flux", "pipefusion=2,warmup=all"), ("wan", "ulysses=2"),
        ("sd3", "ring=2"), ("sd3", "cfg=2"), ("wan", "pipefusion=2,patches=2"), ("lumina2", "ulysses=2"),
        ("pixart_sigma", "ulysses=2,pipefusion=2,patches=2")])])  # fmt: skip
def test_ranks_with_prompts_of_their_own(pool: Pool, name: str, spec: str) -> None:
    world = ShardingSpec.parse(spec).world_size
    seen = pool.run(steps_on_ranks, name, spec, ranks=range(world), timeout=150)
    for rank in seen:
        assert all(rank["equal"]) and rank["collectives"] == rank["off"] == 0
        if "patches" not in spec:
            assert max(rank["errors"]) <= EXACT
    assert [s["used again"] for s in seen] == [*[3] * (world - 1), 0]


@pytest.mark.whole
@pytest.mark.parametrize("name", zoo.CASES)
def test_every_model(name: str) -> None:
    """Exact, or, where a sample is at a threshold of sparse attention, at least what it is with nothing kept."""
    model, run, inputs = run_of(name)
    off = xdit_compile.parallelize(model, "keep=off")
    for i in range(2):
        call = stepped(model, inputs, i)
        assert error(model, run, call) <= max(zoo.CASES[name].tolerance, error(model, off, call))


@pytest.mark.parametrize("seed", range(20))
def test_values_are_kept_for_the_tensors_they_were_made_of(seed: int) -> None:
    """However like these are to others: large ones differ in one place that nobody looks at."""
    rng, counts = random.Random(seed), Counter[str]()
    first = torch.zeros(rng.choice([3, 500_000]), 2)
    first = first.t() if rng.random() < 0.3 else first
    other, written = first.clone(), first.clone()
    other[1, 1] = 1.0
    tensors, state, cache = [first, other, written], [torch.ones(2)], LoopInvariantCache((0,), counts)
    for step in range(12):
        x = rng.choice(tensors)
        if rng.random() < 0.2:
            rng.choice([x, state[0]]).add_(1)
        kept = cache([x, torch.tensor(step)], state, lambda x=x: (x.sum() + state[0].sum(),))
        assert kept.values[0] == x.sum() + state[0].sum()
    assert counts["kept"] > 0
