"""Artifacts whose ranks have shares of the parameters: the numbers of the model, each rank's part read alone, and
nothing believed that a file says of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import artifact_runs
import cases
import hostile
import pytest
import shard_runs
import torch
import zoo
from marks import whole
from pool import Pool

import xdit_compile
from xdit_compile.errors import ArtifactError
from xdit_compile.spec import ShardingSpec

EXACT = 1e-5


def exported(folder: Path, name: str, spec: str, **options: Any) -> Path:
    """The calls that workers do, as they would be exported."""
    case = zoo.CASES[name]
    return xdit_compile.export(cases.made(case), spec, [case.inputs(*call) for call in shard_runs.CALLS],
                               folder / "model.xdit", **options)


@pytest.mark.parametrize(("name", "spec"), [
    ("dit", "ulysses=2,shard=2"), whole("dit", "pipefusion=2,ulysses=2,warmup=all,shard=2"),
    whole("dit", "cfg=2,ulysses=2,shard=2,offload=block"), whole("flux", "ulysses=2,ring=2,shard=4"),
    whole("wan", "offload=block")])
def test_shares_give_the_same_bits(pool: Pool, tmp_path: Path, name: str, spec: str) -> None:
    path = exported(tmp_path, name, spec, weights="included")
    parsed = ShardingSpec.parse(spec)
    for seen in pool.run(artifact_runs.shared, str(path), None, name, spec, shard_runs.plain(spec),
                         ranks=range(parsed.world_size), timeout=240):
        assert seen["same"] and seen["error"] <= EXACT
        assert "cannot be saved" in seen["state"] and seen["look"] == ("cpu", "torch.float32")
        if parsed.pipefusion_degree == 1:
            # Rows that two shares have a part of are read by both.
            assert seen["read"] * parsed.shard_degree <= 1.1 * seen["all"]
            assert 0.9 * seen["all"] <= seen["held"] * parsed.shard_degree <= 1.1 * seen["all"]
        else:
            assert seen["read"] <= 0.55 * seen["all"]


@pytest.mark.parametrize(("name", "spec"), [
    ("sd3", "tensor=2"), whole("flux", "tensor=2,ulysses=2,shard=2"),
    whole("sd3", "tensor=2,pipefusion=2,warmup=all"), whole("wan", "tensor=3,offload=block"),
    whole("hunyuan_dit", "tensor=2,cfg=2")])
def test_tensor_ranks_read_their_parts(pool: Pool, tmp_path: Path, name: str, spec: str) -> None:
    path = exported(tmp_path, name, spec)
    cases.made(zoo.CASES[name]).save_pretrained(tmp_path / "weights")
    degree = ShardingSpec.parse(spec).tensor_degree * ShardingSpec.parse(spec).shard_degree
    for seen in pool.run(artifact_runs.shared, str(path), str(tmp_path / "weights"), name, spec,
                         shard_runs.plain(spec), ranks=range(ShardingSpec.parse(spec).world_size), timeout=240):
        assert seen["error"] <= EXACT
        # A cut by input features is a part of each row, and rows are read whole.
        assert seen["read"] <= 0.8 * seen["all"] and seen["held"] <= (1 / degree + 0.2) * seen["all"]


# What files say


@pytest.fixture(scope="module")
def waiting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("waiting"), "dit", "offload=block", weights="included")


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("cut"), "dit", "tensor=2", weights="included")


Edit = Callable[[Any], None]


def members(said: Any) -> list[Any]:
    return said["shares"][0][0]["members"]


def parted(said: Any) -> list[Any]:
    """A parameter of which a rank has a part."""
    return next(m for group in said["shares"][0] for m in group["members"] if m[2])


def first_input(said: Any, kind: str) -> list[Any]:
    return next(i for i in said["calls"][0]["ranks"][0]["body"]["inputs"] if i[0] == kind)


WRONG: dict[str, tuple[Edit, str]] = {
    "no shares": (lambda s: s.update(shares=None), "which is no list"),
    "shares of other ranks": (lambda s: s["shares"].append([]), "entries, where there have to be"),
    "a group without parameters": (lambda s: s["shares"][0][0].update(members=[]), "parameters of 0 types"),
    "an unknown parameter": (lambda s: members(s)[0].__setitem__(0, "../x"), "which is no tensor of the artifact"),
    "a parameter twice": (lambda s: members(s).append(members(s)[0]), "has a parameter that is"),
    "a group twice": (lambda s: s["shares"][0].append(s["shares"][0][0]), "is there twice"),
    "another group": (lambda s: s["shares"][0][0].update(path="x"), "takes the parameter_share .* which is not there"),
    "a group less": (lambda s: s["shares"][0].pop(0), "takes the parameter_share .* which is not there"),
    "a parameter less": (lambda s: members(s).pop(), r"takes the parameter_share .* as float32\[\d+\], but it is"),
    "dimensions that are none": (lambda s: members(s)[0].__setitem__(1, [0, 0]), "which is no order of"),
    "dimensions without end": (lambda s: members(s)[0].__setitem__(1, list(range(10**5))), "which is no order of"),
    "a part of no dimension": (lambda s: members(s)[0].__setitem__(2, []), "is of 0 dimensions of"),
    "a weight of another type": (lambda s: s["tensors"][members(s)[0][0]].update(dtype="float64"),
                                 "parameters of 2 types|but it is float64|is torch.float32"),
    "a weight taken whole too": (lambda s: first_input(s, "parameter").__setitem__(
        slice(None), ["parameter", members(s)[0][0]]), "but it is|whole, and as a share"),
    "a share of an argument": (lambda s: first_input(s, "argument").append([]), "which is no kind and name"),
}
"""Of shares that wait on the host, or are parts."""

WRONG_PARTS: dict[str, tuple[Edit, str]] = {
    "a range outside": (lambda s: parted(s)[2][0].__setitem__(-1, [0, 10**6]), "which is no whole number from 0 to"),
    "a range backwards": (lambda s: parted(s)[2][0][-1].reverse(), "which is no list of ranges"),
    "ranges over each other": (lambda s: parted(s)[2][0].append(parted(s)[2][0][0]), "which is no list of ranges"),
    "ranges without end": (lambda s: parted(s)[2].__setitem__(0, [[0, 10**6]] * 9), "no whole number from 0 to"),
    "a range of three": (lambda s: parted(s)[2][0][0].append(1), "has 3 entries"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("which", ["waiting", "cut"])
def test_spoiled_shares_are_refused(request: pytest.FixtureRequest, which: str, name: str) -> None:
    refused(request.getfixturevalue(which), *WRONG[name])


@pytest.mark.parametrize("name", WRONG_PARTS)
def test_spoiled_parts_are_refused(cut: Path, name: str) -> None:
    refused(cut, *WRONG_PARTS[name])


def refused(path: Path, edit: Edit, complaint: str) -> None:
    kept = (path / "manifest.json").read_text()
    said = json.loads(kept)
    edit(said)
    try:
        (path / "manifest.json").write_text(json.dumps(said))
        with pytest.raises(ArtifactError, match=complaint):
            xdit_compile.inspect(path, check_all=True)
    finally:
        (path / "manifest.json").write_text(kept)


def node(nodes: list[Any], target: str) -> Any:
    return next(n for n in nodes if n["target"] == f"torch.ops.xdit_compile.{target}.default")


def early(nodes: list[Any]) -> None:
    """What is on its way is taken by whoever takes it once it has come."""
    made = node(nodes, "fetched")
    nodes[nodes.index(made)] = {**made, "target": "torch.ops.aten.relu.default"}


def dropped(nodes: list[Any]) -> None:
    fetch = json.loads(json.dumps(node(nodes, "fetch")))
    fetch["outputs"][0]["as_tensor"]["name"] = "more"
    nodes.append(fetch)


def computed(nodes: list[Any]) -> None:
    """Nobody promises that what was computed stays as it is while it is copied."""
    fetch = node(nodes, "fetch")
    nodes.insert(nodes.index(fetch), {"target": "torch.ops.aten.relu.default", "metadata": {}, "inputs": [
        json.loads(json.dumps(fetch["inputs"][0]))], "outputs": [{"as_tensor": {"name": "more"}}]})
    fetch["inputs"][0]["arg"]["as_tensor"]["name"] = "more"


def waited_for(nodes: list[Any]) -> None:
    made = node(nodes, "fetched")
    made["inputs"][0]["arg"]["as_tensor"]["name"] = node(nodes, "fetch")["inputs"][0]["arg"]["as_tensor"]["name"]


@pytest.mark.parametrize(("change", "complaint"), [
    (early, "a copy that is still on its way"), (dropped, "starts 1 copies that nothing waits for"),
    (computed, "copies what is no input"), (waited_for, "waits for what is not on its way")])
def test_what_is_on_its_way_is_waited_for(waiting: Path, change: Edit, complaint: str) -> None:
    said = hostile.manifest(waiting)
    name = said["calls"][0]["ranks"][0]["body"]["functions"]["main"]
    kept, document = (waiting / name).read_bytes(), json.loads((waiting / name).read_text())
    change(document["graph_module"]["graph"]["nodes"])
    try:
        hostile.renewed(waiting, name, json.dumps(document).encode())
        with pytest.raises(ArtifactError, match=complaint):
            xdit_compile.load(waiting)
    finally:
        hostile.renewed(waiting, name, kept)


def test_weights_that_do_not_fit_are_named(waiting: Path, tmp_path: Path) -> None:
    path = exported(tmp_path, "dit", "offload=block")
    model = cases.made(zoo.CASES["dit"])
    with pytest.raises(ArtifactError, match="does not include"):
        xdit_compile.load(path)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "weights")
    with pytest.raises(ArtifactError, match=r"is torch.bfloat16\[.*exported with torch.float32"):
        xdit_compile.load(path, tmp_path / "weights")


def test_edits_of_a_loaded_model_that_shares_would_not_see_are_refused(waiting: Path) -> None:
    loaded = xdit_compile.load(waiting)
    inputs = zoo.CASES["dit"].inputs(*shard_runs.CALLS[0])
    with torch.no_grad():
        loaded(**inputs)
        next(p for p in loaded.parameters() if p.is_meta).mul_(2)
        with pytest.raises(xdit_compile.XditError, match="written into"):
            loaded(**inputs)


def test_copies_are_not_compiled_ahead(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="leave native=True"):
        exported(tmp_path, "dit", "offload=block", native=True)
