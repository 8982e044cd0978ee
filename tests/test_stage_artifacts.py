"""Every name, number and size that an artifact says of a stage is compared with its programs before it is believed."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cases
import pytest
import zoo
from marks import whole

import xdit_compile
from xdit_compile.artifact.files import ArtifactFolder
from xdit_compile.artifact.load import ArtifactLoader
from xdit_compile.artifact.running import Running
from xdit_compile.errors import ArtifactError

QUICK = 40


def harmless(stage: Any, place: tuple[Any, ...], made: Any) -> bool:
    """What no program depends on: which blocks a stage has, for whoever looks at its weights; names within a program of
    what it takes by its place; an order of what is told apart by name. And the same values in another order are another
    program, which a file may hold."""
    names = "inputs" in place and isinstance(made, str)
    if names:
        kind, _ = reached(stage, place[:-1])
        return kind in ("cache", "invariant")
    swapped = place in (("shapes",), ("held",)) and sorted(map(str, made)) == sorted(map(str, reached(stage, place)))
    return place[0] == "blocks" or swapped


def reached(value: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        value = value[key]
    return value


def spoiled(value: Any) -> Iterator[Any]:
    """The same, a little otherwise."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, value - 1, -value - 1)
    elif isinstance(value, str):
        yield f"{value}_"
    elif isinstance(value, list):
        yield [*value, *(value[-1:] or [0])]
        if value:
            yield value[:-1]
        if value != value[::-1]:
            yield value[::-1]
    elif value is None:
        yield 1


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to all parts of a value; of a long list, its ends."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, part in value.items():
            yield from places(part, (*path, key))
    elif isinstance(value, list):
        for i in dict.fromkeys((*range(min(2, len(value))), len(value) - 1) if value else ()):
            yield from places(value[i], (*path, i))


def put(stage: Any, path: tuple[Any, ...], value: Any) -> Any:
    made = at = copy.deepcopy(stage)
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return made


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    case = zoo.CASES["dit"]
    return xdit_compile.export(cases.made(case), "pipefusion=2,patches=2", case.inputs(2, False),
                               tmp_path_factory.mktemp("stages") / "model.xdit")


def tried(path: Path, rank: int) -> list[tuple[tuple[Any, ...], Any]]:
    stage = json.loads((path / "manifest.json").read_text())["calls"][0]["ranks"][rank]["stage"]
    found: list[tuple[tuple[Any, ...], Any]] = []
    for place in places(stage):
        found += [(place, made) for made in spoiled(reached(stage, place)) if not harmless(stage, place, made)]
    return found


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("count", [QUICK, whole(10**6)])
def test_what_is_said_of_a_stage_is_not_believed(exported: Path, rank: int, count: int) -> None:
    manifest = json.loads((exported / "manifest.json").read_text())
    good, all_of_it = manifest["calls"][0]["ranks"][rank]["stage"], tried(exported, rank)
    passed = []
    try:
        for place, made in random.Random(rank).sample(all_of_it, min(count, len(all_of_it))):
            manifest["calls"][0]["ranks"][rank]["stage"] = put(good, place, made)
            (exported / "manifest.json").write_text(json.dumps(manifest))
            try:
                ArtifactLoader(ArtifactFolder.at(exported), Running(), None).memory(rank)
            except ArtifactError:
                continue
            passed.append((place, made))
    finally:
        manifest["calls"][0]["ranks"][rank]["stage"] = good
        (exported / "manifest.json").write_text(json.dumps(manifest))
    assert not passed, "believed: " + ", ".join(f"{place} {made!r:.60}" for place, made in passed)
