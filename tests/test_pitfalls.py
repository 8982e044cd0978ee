"""Known pitfalls of PyTorch's distributed and compiling parts, as far as they show without a GPU (docs/pitfalls.md)."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from cases import made
from pool import Pool
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

import xdit_compile
from xdit_compile.artifact import native_reader
from xdit_compile.frontend.capture import capture
from xdit_compile.ir.call_arguments import call_arguments
from xdit_compile.ir.program import is_collective
from xdit_compile.passes import localize, plan
from xdit_compile.runtime.compilation.inductor_backend import inductor_compiler
from xdit_compile.spec import ShardingSpec

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from gpu_parts import ranks

WAIT = torch.ops._c10d_functional.wait_tensor.default


def calls() -> Iterator[ast.Call]:
    """All of the package's."""
    for path in Path(xdit_compile.__file__).parent.rglob("*.py"):
        yield from (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call))


def test_no_group_is_tied_to_a_device_and_no_messages_are_batched() -> None:
    """With ``device_id`` groups are split off from the first, by all of its ranks together; the first batch of messages
    of a group must include all of its ranks."""
    names = [getattr(c.func, "attr", getattr(c.func, "id", "")) for c in calls()]
    assert "init_process_group" in names and "isend" in names, "what is looked for is there"
    assert "batch_isend_irecv" not in names and "P2POp" not in names
    assert not [c for c in calls() if any(k.arg == "device_id" for k in c.keywords)]


def test_ranks_do_not_compare_graphs_while_they_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(torch._inductor, "standalone_compile", lambda *_, options, **__: given.update(options) or (
        lambda *tensors: tensors))
    graph = fx.Graph()
    graph.output((graph.call_function(torch.ops.aten.relu.default, (graph.placeholder("x"),)),))
    inductor_compiler(ShardingSpec(backend="inductor"))(fx.GraphModule({}, graph))(torch.ones(2))
    name = "aten_distributed_optimizations.spmd_check"
    assert name not in torch._inductor.list_options() or given["config_patches"][name] is False


@pytest.mark.parametrize("spec", ["ulysses=2", "ulysses=2,exchange=apart", "ring=2", "tensor=2"])
def test_nobody_looks_at_a_result_before_the_wait(spec: str) -> None:
    """As another type, or in another shape: compilers have lost the wait then."""
    case = zoo.CASES["pixart_alpha"]
    model = made(case).requires_grad_(False)
    with torch.no_grad():
        captured = capture(model, *call_arguments(model, case.inputs(1, True)))
    local = localize(*plan(captured, ShardingSpec.parse(spec)), 0)
    starts = [n for _, m in local.functions() for n in m.graph.nodes if is_collective(n) and n.target is not WAIT]
    assert starts and all(u.target is WAIT for n in starts for u in n.users)


@pytest.mark.parametrize(("device", "index"), [("cuda:1", 1), ("cpu", -1)])
def test_machine_code_runs_on_the_device_of_what_it_is_given(monkeypatch: pytest.MonkeyPatch, device: str,
                                                              index: int) -> None:
    loaded: list[int] = []
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda path, device_index: loaded.append(device_index))
    graph = fx.Graph()
    with FakeTensorMode(allow_non_fake_inputs=True):
        graph.placeholder("x").meta["val"] = torch.empty(2, device=device)
    native_reader.CompiledFunction(Path("function.pt2"), graph)
    assert loaded == [index]


def exchanged() -> Any:
    return ranks.empty("cpu", "", "")


def test_all_to_alls_with_empty_shares(pool: Pool) -> None:
    assert pool.run(exchanged) == [{"difference": 0.0}] * 4


def test_the_page_names_tests_that_are_there() -> None:
    root = Path(__file__).resolve().parents[1]
    page = (root / "docs/pitfalls.md").read_text()
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("| ") and "---" not in line][1:]
    assert len(rows) == 12
    for *_, held in rows:
        named = [part.strip().strip("`") for part in held.split(",")]
        assert named
        for name in named:
            file, _, item = name.partition("::")
            assert item and item in (root / file).read_text(), name
