"""What is compiled, how often, and that the order of collectives survives it."""

from __future__ import annotations

import operator
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compiled_runs
import pipefusion_runs
import pytest
import torch
from compiled_runs import compiles, deep, difference_of_outputs, inputs
from emulation import held
from pool import Pool
from torch import fx, nn
from torch._dynamo.utils import counters
from torch.fx.experimental.proxy_tensor import make_fx

import xdit_compile
from xdit_compile.driver.compile_stage import compile_stage
from xdit_compile.errors import SpecError
from xdit_compile.frontend.capture import capture
from xdit_compile.ir.program import Program
from xdit_compile.passes import localize, plan
from xdit_compile.runtime.compilation import regional as compiling
from xdit_compile.runtime.compilation.graph_segments import outline_segments
from xdit_compile.runtime.compilation.inductor_backend import _Bare, inductor_compiler, own_options
from xdit_compile.spec import ShardingSpec

EXACT = 1e-5


@pytest.fixture(scope="module")
def compiled() -> Iterator[tuple[nn.Module, Any]]:
    """A model of 24 blocks and the compiled one, which has been called once; counters begin there."""
    torch._dynamo.reset()
    counters.clear()
    model = deep(24)
    parallel = xdit_compile.parallelize(model, "backend=inductor")
    assert difference_of_outputs(parallel, model) <= EXACT
    yield model, parallel


def test_equal_blocks_are_compiled_once_and_steps_compile_nothing(compiled: tuple[nn.Module, Any]) -> None:
    model, parallel = compiled
    assert compiles() == {"lowered": 3, "traced": 0}, "what is before the blocks, a block, what is after"
    for step in range(1, 4):
        assert difference_of_outputs(parallel, model, step) <= EXACT
    assert compiles() == {"lowered": 3, "traced": 0}


def test_weights_are_read_at_each_call(compiled: tuple[nn.Module, Any]) -> None:
    model, parallel = compiled
    before = compiles()
    with torch.no_grad():
        first = model(**inputs())
        model.blocks[3].qkv.weight.mul_(2)  # type: ignore[union-attr, operator]
        model.out.weight = nn.Parameter(model.out.weight.flip(0).contiguous())  # type: ignore[union-attr]
        assert not torch.allclose(first, model(**inputs()))
    assert difference_of_outputs(parallel, model) <= EXACT
    assert compiles() == before


def test_other_strides_and_gradients_are_still_right(compiled: tuple[nn.Module, Any]) -> None:
    model, parallel = compiled
    given = inputs(5)
    given["x"] = given["x"].mT.contiguous().mT
    with torch.no_grad():
        torch.testing.assert_close(parallel(**given), model(**given), atol=1e-5, rtol=1e-5)
        model.embed.weight = nn.Parameter(model.embed.weight.T.contiguous().T)  # type: ignore[union-attr]
    model.blocks[0].requires_grad_(False)  # type: ignore[index]
    assert difference_of_outputs(parallel, model, 6) <= EXACT


def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options inductor is called with; nothing is compiled, which is what takes time."""
    found = []

    def compile(module: fx.GraphModule, tensors: Any, *, dynamic_shapes: str, options: dict[str, Any]) -> Any:
        found.append(options["config_patches"])
        return module

    monkeypatch.setattr(torch._inductor, "standalone_compile", compile)
    return found


def test_models_of_one_kind_share_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    options = asked(monkeypatch)
    models = deep(2), deep(4)
    ours = [xdit_compile.parallelize(m, "backend=inductor,mode=max-autotune-no-cudagraphs") for m in models]
    assert all(difference_of_outputs(p, m) <= EXACT for p, m in zip(ours, models, strict=True))
    assert len(options) == 3


def test_many_programs_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than dynamo would compile of one piece of code."""
    options = asked(monkeypatch)
    model = deep(2)
    parallel = xdit_compile.parallelize(model, "backend=inductor,mode=max-autotune-no-cudagraphs")
    sizes = range(20, 29)
    assert len(sizes) > torch._dynamo.config.recompile_limit
    with torch.no_grad():
        for tokens in sizes:
            given = inputs(tokens=tokens)
            torch.testing.assert_close(parallel(**given), model(**given), atol=1e-5, rtol=1e-5)
    assert len(options) == 3 * len(sizes)


def test_mode_and_options_reach_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    options = asked(monkeypatch)
    spec = {"backend": "inductor", "mode": "max-autotune",
            "compile_options": {"max_autotune": False, "epilogue_fusion": True}}
    model = deep(2)
    assert difference_of_outputs(xdit_compile.parallelize(model, spec), model) <= EXACT
    assert options == 3 * [own_options() | {
        "coordinate_descent_tuning": True, "max_autotune": False, "epilogue_fusion": True}]


@pytest.mark.parametrize(
    ("options", "says"),
    [({"max_autotun": True}, "'max_autotun', which is no option of torch.compile; near to it: max_autotune"),
     ({"max_autotune": "yes"}, "torch.compile refuses compile_options")],
)
def test_options_that_torch_has_not(options: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        xdit_compile.parallelize(deep(2), {"backend": "inductor", "compile_options": options})


# --------------------------------------------------------------------------------------------------
# Cutting


def local() -> tuple[nn.Module, Program]:
    model = deep(2)
    return model, localize(*plan(capture(model, *compiled_runs.arguments(model)), ShardingSpec()), 0)


def operators(module: fx.GraphModule) -> list[Any]:
    return [n.target for n in module.graph.nodes if n.op == "call_function" and n.target is not operator.getitem]


@pytest.mark.parametrize("apart", ["nothing", "linear", "everything", "every third"])
def test_cut_graphs_mean_the_same(apart: str) -> None:
    model, program = local()
    nodes = {n: i for m in (program.main, program.main.blocks) for i, n in enumerate(m.graph.nodes)}
    stays = {"nothing": lambda n: False, "everything": lambda n: True, "every third": lambda n: nodes[n] % 3 == 0,
             "linear": lambda n: n.target is torch.ops.aten.linear.default}[apart]
    made: list[fx.GraphModule] = []

    def build(module: fx.GraphModule) -> fx.GraphModule:
        made.append(module)
        return module

    block = outline_segments(program.main.blocks, stays, build, {})
    cut = outline_segments(program.main, stays, build, {"blocks": block})
    given = held(model, program, [*inputs().values()])
    assert torch.equal(cut(*given)[0], program.main(*given)[0])
    for before, after in ((program.main, cut), (program.main.blocks, block)):
        assert operators(after) == [n.target for n in before.graph.nodes if n.target in operators(before) and stays(n)]
    assert len(made) == {"nothing": 3, "everything": 0}.get(apart, len(made)) and all(
        not any(stays(n) for n in m.graph.nodes if n.op == "call_function" and n in nodes) for m in made)


def test_functions_of_patches_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """More patches of one size are more programs, and nothing more to compile."""
    counts = []
    for patches in (2, 4):
        made: list[fx.GraphModule] = []
        monkeypatch.setattr(compiling, "compiler_for", lambda spec, made=made: lambda m: made.append(m) or m.forward)
        compiling._SHARED.clear()
        model, spec = deep(4), ShardingSpec.parse(f"pipefusion=2,patches={patches},backend=inductor")
        stage = compile_stage(capture(model, *compiled_runs.arguments(model, tokens=8 * patches)), spec, 0).stage
        assert stage is not None and len(stage.units) == patches + 1
        kept = [compiling.compiled(program.main, spec) for program in (stage.once, *stage.units.values())]
        assert kept
        counts.append(len(made))
    assert counts[0] == counts[1]


# --------------------------------------------------------------------------------------------------
# On several processes


def test_exchanges_overlap_with_work_in_the_code_of_inductor(pool: Pool) -> None:
    for rank in pool.run(compiled_runs.run, "ulysses=2,backend=inductor", 2, ranks=range(2), timeout=300):
        assert max(rank["errors"]) <= EXACT and rank["first"] == rank["after"] and not rank["first"]["traced"]
        assert any("ulysses" in n for n in rank["notes"])
        (code,) = {c for c in rank["codes"] if "all_to_all_single" in c}
        code = code.partition("def call(")[2]
        calls = re.findall(r"(all_to_all_single|wait_tensor|addmm|\bmm|attention)\w*(?:\.default)?\(", code)
        # Queries, keys and values; the first half of the MLP while they travel; the result back.
        assert calls == ["addmm", "all_to_all_single", "addmm", "wait_tensor", "attention", "all_to_all_single",
                         "wait_tensor", "addmm"]


@pytest.mark.whole
def test_uneven_shares_on_three_processes(pool: Pool) -> None:
    for rank in pool.run(compiled_runs.run, "ring=3,backend=inductor", 3, ranks=range(3), timeout=300):
        assert max(rank["errors"]) <= EXACT and rank["first"] == rank["after"] and not rank["first"]["traced"]
        assert any("ring" in n for n in rank["notes"])


@pytest.mark.whole
def test_stages_compile_different_programs(pool: Pool) -> None:
    spec = "pipefusion=2,patches=3,backend=inductor"
    seen = pool.run(pipefusion_runs.displaced_errors, "dit", 1, True, [spec], ranks=range(2), timeout=500)
    assert seen[0][spec]["error"] <= EXACT < seen[0][spec]["exact"]
    assert torch.equal(seen[0][spec]["sample"], seen[1][spec]["sample"])


AGAIN = """
import compiled_runs, xdit_compile
from torch._dynamo.utils import counters
model = compiled_runs.deep(2)
assert compiled_runs.difference_of_outputs(xdit_compile.parallelize(model, "backend=inductor"), model) < 1e-5
print(*(counters["inductor"][f"fxgraph_cache_{w}"] for w in ("hit", "miss", "bypass")),
      *(counters["aot_autograd"][f"autograd_cache_{w}"] for w in ("hit", "miss", "bypass")))
"""


@pytest.mark.whole
def test_another_process_finds_what_was_compiled(tmp_path: Path) -> None:
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    said = [subprocess.run([sys.executable, "-c", AGAIN], env=env, capture_output=True, text=True, check=True).stdout
            for _ in range(2)]
    assert [s.split() for s in said] == [["0", "3", "0", "0", "3", "0"], ["3", "0", "0", "3", "0", "0"]]


def test_results_that_are_views_of_arguments_stay_views() -> None:
    """What is around a function at each call is left out only where it does nothing."""
    kinds = []
    for function in (lambda x, y: (x.mT, x @ y), lambda x, y: (x @ y, (x + y).mT)):
        module = make_fx(function)(torch.ones(3, 3), torch.ones(3, 3))
        call = inductor_compiler(ShardingSpec(backend="inductor"))(module)
        for _ in range(3):
            x, y = torch.randn(3, 3), torch.randn(3, 3)
            with torch.no_grad():
                found, expected = call(x, y), function(x, y)
            assert all(map(torch.equal, found, expected))
            assert [r.data_ptr() == x.data_ptr() for r in found] == [r.data_ptr() == x.data_ptr() for r in expected]
        kinds.append(type(*call._made.values()))
    assert kinds[1] is _Bare and kinds[0] is not _Bare
