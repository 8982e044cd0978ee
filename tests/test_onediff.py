"""What onediff is handed, by the real package and compilers registered with it; what users are told without one."""

from __future__ import annotations

import itertools
import re
import sys
import types
import warnings
from typing import Any

import onediff_runs
import pytest
import torch
from compiled_runs import deep, difference_of_outputs, inputs
from pool import Pool

import xdit_compile
from xdit_compile.errors import SpecError, XditError

EXACT = 1e-5
COUNT = itertools.count()
RECORDER = "backend=onediff,onediff_backend=recorder"


def test_functions_without_collectives_are_handed_over(pool: Pool) -> None:
    spec = f'ulysses=2,{RECORDER},compile_options={{"mode": "jit", "level": [1, 2]}}'
    for rank in pool.run(onediff_runs.run, spec, 2, ranks=range(2), timeout=100):
        assert max(rank["errors"]) <= EXACT
        assert any("ulysses" in n for n in rank["notes"]), "there was something to exchange"
        assert rank["kinds"] == {"GraphModule"}
        assert rank["options"] == [{"mode": "jit", "level": [1, 2]}] * len(rank["options"])
        assert sum(len(t) for t in rank["targets"]) > 20
        assert not [t for targets in rank["targets"] for t in targets if "c10d" in t]
        # A block: before the exchange, between start and wait, attention, and the rest; blocks share them.
        assert sum(any("scaled_dot_product" in t for t in targets) for targets in rank["targets"]) == 1


def test_one_process_hands_over_what_inductor_would_get() -> None:
    seen, model = onediff_runs.register("recorder"), deep(3)
    parallel = xdit_compile.parallelize(model, RECORDER)
    for step in range(2):
        assert difference_of_outputs(parallel, model, step) <= EXACT
    assert len(seen) == 3 and all(options is None for _, options in seen)


def changed(change: Any) -> tuple[Any, torch.nn.Module]:
    """Each under a name of its own, as what is compiled is shared."""
    name = f"changed{next(COUNT)}"
    onediff_runs.register(name, change)
    model = deep(2)
    return xdit_compile.parallelize(model, f"backend=onediff,onediff_backend={name}"), model


@pytest.mark.parametrize(("dtype", "factor", "says"), [
    (torch.float32, 1 + 1e-3, r"'changed.*' gives other numbers .* by 0\.001 .* 0\.0001 is usual for torch.float32"),
    (torch.float32, 1 + 1e-5, ""),
    (torch.bfloat16, 1.008, ""),
    (torch.bfloat16, 1.1, r"0\.02 is usual for torch.bfloat16"),
    (torch.float32, float("nan"), "differ by nan"),
])  # fmt: skip
def test_first_call_is_checked_and_used_as_it_is(dtype: torch.dtype, factor: float, says: str) -> None:
    parallel, model = changed(lambda results: tuple(t * factor for t in results))
    model.to(dtype)
    given = {n: t.to(dtype) for n, t in inputs().items()}
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        first = parallel(**given)
        said = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
        assert [bool(re.search(says, s)) for s in said] == ([True] * 3 if says else []), said
        caught.clear()
        torch.testing.assert_close(parallel(**given), first, equal_nan=True)
        assert not [w for w in caught if issubclass(w.category, RuntimeWarning)], "said once"
        if factor != 1:
            assert not torch.equal(first, model(**given))


@pytest.mark.parametrize("change", [lambda r: r[0], lambda r: tuple(t.double() for t in r), lambda r: (*r, r[0]),
                                    lambda r: tuple(t[:, :1] for t in r)])  # fmt: skip
def test_other_shapes_are_an_error(change: Any) -> None:
    parallel, _ = changed(change)
    with torch.no_grad(), pytest.raises(XditError, match=r"compiler 'changed.*' gives .* where the function"):
        parallel(**inputs())


def test_compiler_that_refuses_is_named() -> None:
    def refuse(torch_module: Any, *, options: Any = None) -> Any:
        raise ValueError("no such operator")

    from onediff.infer_compiler.backends.registry import _BACKENDS

    _BACKENDS["refuses"] = refuse
    with pytest.raises(XditError, match=r"'refuses' refuses a function .* ValueError: no such operator; say backend="):
        xdit_compile.parallelize(deep(2), "backend=onediff,onediff_backend=refuses")(**inputs())


@pytest.mark.parametrize(("words", "says"), [
    ("", r"oneflow needs the package oneflow.*ModuleNotFoundError: .*oneflow.*pip install oneflow .*here is torch"),
    (",onediff_backend=oneflow", r"onediff_backend=oneflow needs the package oneflow"),
    (",onediff_backend=nexfort", r"ModuleNotFoundError: .*nexfort.*pip install nexfort==0\.1\.dev330.*2\.4\.0\+cu121"),
    (",onediff_backend=tvm", r"onediff has no compiler named 'tvm'; it knows .*nexfort.*oneflow.*register_backend"),
])  # fmt: skip
def test_compilers_that_are_not_there(words: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("oneflow", "nexfort"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SpecError, match=says):
        xdit_compile.parallelize(deep(2), f"backend=onediff{words}")


def test_what_nexfort_says_of_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def find_spec(self, name: str, *args: object) -> None:
            if name.startswith("nexfort"):
                raise RuntimeError("nexfort requires torch 2.4.0+cu121")

    monkeypatch.setattr(sys, "meta_path", [Refusing(), *sys.meta_path])
    with pytest.raises(SpecError, match=f"Error: nexfort requires torch 2.*here is torch {torch.__version__[:4]}"):
        xdit_compile.parallelize(deep(2), "backend=onediff,onediff_backend=nexfort")


def test_without_onediff(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "onediff"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onediff", None)
    with pytest.raises(SpecError, match=r"package onediff 1.2 or newer: pip install 'xdit-compile\[onediff\]'"):
        xdit_compile.parallelize(deep(2), "backend=onediff,onediff_backend=nexfort")


def test_an_onediff_that_takes_no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    old = types.ModuleType("onediff.infer_compiler")
    old.compile = lambda torch_module, options=None: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "onediff.infer_compiler", old)
    with pytest.raises(SpecError, match=r"whose compile takes a backend and options; installed is onediff 1\.2"):
        xdit_compile.parallelize(deep(2), RECORDER)


def test_options_of_oneflow_are_its_own_class(monkeypatch: pytest.MonkeyPatch) -> None:
    from onediff.infer_compiler import OneflowCompileOptions

    monkeypatch.setitem(sys.modules, "oneflow", types.ModuleType("oneflow"))
    seen, model = onediff_runs.register("oneflow"), deep(2)
    spec = {"backend": "onediff", "compile_options": {"use_graph": False}}
    assert difference_of_outputs(xdit_compile.parallelize(model, spec), model) <= EXACT
    assert [o for _, o in seen] == [OneflowCompileOptions(use_graph=False)] * 3
    with pytest.raises(SpecError, match=r"not those of oneflow.*'no_such'"):
        xdit_compile.parallelize(model, {**spec, "compile_options": {"no_such": 1}})
    onediff_runs._BACKENDS.pop("oneflow")


@pytest.mark.whole
def test_what_stages_keep_is_written(pool: Pool) -> None:
    spec = f"pipefusion=2,patches=3,{RECORDER}"
    seen = pool.run(onediff_runs.displaced, "dit", spec, ranks=range(2), timeout=300)
    assert seen[0][spec]["error"] <= EXACT < seen[0][spec]["exact"]
