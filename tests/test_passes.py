"""Each pass has an identity and leaves a record; what other passes made is not used."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import cases
import pytest
import zoo

import xdit_compile
from xdit_compile import log
from xdit_compile.cli.pass_dump import PassDump
from xdit_compile.errors import ArtifactError
from xdit_compile.ir import pass_record
from xdit_compile.ir.pass_record import source_digest
from xdit_compile.passes import pass_digests

ANALYSES = ["canonicalize", "batch_axis", "token_axis"]
REWRITES = ["shard", "lower_attention", "simplify", "overlap_communication"]


def test_every_pass_leaves_a_record(tmp_path: Path) -> None:
    case = zoo.CASES["sd3"]
    explained = xdit_compile.explain(cases.made(case), "ulysses=2", case.inputs(1, False), dump=PassDump(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "passes.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == ANALYSES + REWRITES
    assert lines == explained.to_dict()["passes"] and "Passes" in str(explained)
    by_name = {line["name"]: line for line in lines}
    assert by_name["token_axis"]["matched"]["seed"] >= len(explained.seeds) > 0
    assert by_name["shard"]["matched"]["attention"] == len(explained.attentions) > 0
    assert by_name["lower_attention"]["operators"]["_c10d_functional.all_to_all_single.default"] > 0
    assert by_name["simplify"]["nodes_after"] < by_name["simplify"]["nodes_before"]
    assert by_name["overlap_communication"]["operators"] == {}, "it orders nodes and makes none"
    for before, after in pairwise(lines):
        assert before["nodes_after"] == after["nodes_before"] and after["seconds"] >= 0
    programs = sorted(p.name for p in tmp_path.glob("*.py"))
    assert programs == [f"{i:02}-{name}.py" for i, name in enumerate(["canonicalize", *REWRITES])]
    assert {line["name"]: line["digest"] for line in lines} == pass_digests()


def test_stages_leave_records_too() -> None:
    case = zoo.CASES["dit"]
    explained = xdit_compile.explain(cases.made(case), "pipefusion=2,patches=2", case.inputs(1, False))
    assert [p.name for p in explained.passes] == [
        "canonicalize", "batch_axis", "patch_axis", "hoist", "stage_partition", *REWRITES]


@pytest.mark.parametrize(("edited", "changed"), [
    ("xdit_compile.passes.rules.shape", {"shard", "batch_axis", "token_axis"}),
    ("xdit_compile.passes.overlap_communication", {"overlap_communication"}),
    ("xdit_compile.ir.program", set(pass_digests())),
])
def test_a_pass_is_another_when_its_source_or_what_it_uses_is(edited: str, changed: set[str],
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    before, source = pass_digests(), pass_record._source
    source_digest.cache_clear()
    monkeypatch.setattr(pass_record, "_source", lambda m: source(m) + b"\n# edited" if m == edited else source(m))
    try:
        after = pass_digests()
    finally:
        source_digest.cache_clear()
    assert {name for name in before if after[name] != before[name]} == changed


def test_an_artifact_of_other_passes_is_refused(tmp_path: Path) -> None:
    case = zoo.CASES["dit"]
    path = xdit_compile.export(cases.made(case), "ulysses=1", case.inputs(1, False), tmp_path / "a.xdit",
                               weights="included")
    said = json.loads((path / "manifest.json").read_text())
    for passes in (said["passes"] | {"shard": "0" * 16}, said["passes"] | {"another": "0" * 16},
                   {n: d for n, d in said["passes"].items() if n != "shard"}):
        (path / "manifest.json").write_text(json.dumps(said | {"passes": passes}))
        with pytest.raises(ArtifactError, match=r"other passes .*(shard|another).*export the model anew"):
            xdit_compile.load(path)
    (path / "manifest.json").write_text(json.dumps(said | {"version": 1}))
    with pytest.raises(ArtifactError, match="version 1 of the format"):
        xdit_compile.load(path)


SCRIPT = """
import torch, xdit_compile
layer = torch.nn.TransformerEncoderLayer(16, 2, batch_first=True).eval()
model = xdit_compile.parallelize(layer, "ulysses=1,backend=inductor" if COMPILE else "ulysses=1")
with torch.no_grad():
    for _ in range(3):
        model(torch.ones(1, 8, 16))
"""


def said(level: str | None, rank: str = "0", ranks: str | None = None, compile: bool = False) -> list[str]:
    given = {"XDIT_COMPILE_LOG": level, "XDIT_COMPILE_LOG_RANKS": ranks, "RANK": rank}
    env = {k: v for k, v in os.environ.items() if k not in given} | {k: v for k, v in given.items() if v is not None}
    done = subprocess.run([sys.executable, "-c", SCRIPT.replace("COMPILE", str(compile))], env=env, check=True,
                          capture_output=True, text=True)
    return [line for line in done.stderr.splitlines() if "xdit_compile" in line]


def test_the_log_is_silent_unless_asked_and_tells_each_event_once() -> None:
    assert said(None) == []
    lines = said("info")
    for event in ("captured TransformerEncoderLayer in", "planned in", "used again"):
        assert sum(event in line for line in lines) == 1, lines
    assert said("info", rank="1") == [] and all("rank 1" in line for line in said("info", rank="1", ranks="all"))
    assert "is none of DEBUG, INFO" in "".join(said("loud"))


def test_loggers_are_those_of_logging(caplog: pytest.LogCaptureFixture) -> None:
    case = zoo.CASES["dit"]
    with caplog.at_level(logging.INFO, logger=log.ROOT):
        xdit_compile.explain(cases.made(case), "ulysses=2", case.inputs(1, False))
    assert [r.name for r in caplog.records if "captured" in r.message] == ["xdit_compile.frontend.capture"]
