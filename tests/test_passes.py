"""Each pass has an identity and leaves a record; what other passes made is not used."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import cases
import pytest
import torch
import zoo

import xdit_compile
from xdit_compile import log
from xdit_compile.cli.pass_dump import PassDump
from xdit_compile.errors import ArtifactError
from xdit_compile.ir import pass_record
from xdit_compile.ir.pass_record import source_digest
from xdit_compile.passes import pass_digests

ANALYSES = ["canonicalize", "batch_axis", "tensor_axis", "token_axis"]
REWRITES = ["shard", "lower_attention", "simplify", "shard_parameters", "overlap_communication"]


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
        "canonicalize", "batch_axis", "tensor_axis", "patch_axis", "hoist", "stage_partition", *REWRITES]


@pytest.mark.parametrize(("edited", "changed"), [
    ("xdit_compile.passes.rules.shape", {"canonicalize", "shard", "batch_axis", "tensor_axis", "token_axis"}),
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


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    """What is on the error stream when the package is imported and says something, under an environment."""
    logger = logging.getLogger(log.ROOT)
    before = logger.handlers[:], logger.level, logger.propagate

    def said(level: str | None, rank: str = "0", ranks: str | None = None) -> str:
        for name, value in (("XDIT_COMPILE_LOG", level), ("RANK", rank), ("XDIT_COMPILE_LOG_RANKS", ranks)):
            monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
        logger.handlers.clear()
        log.configure()
        logging.getLogger(f"{log.ROOT}.frontend.capture").info("captured it")
        return capsys.readouterr().err

    yield said
    logger.handlers[:], logger.level, logger.propagate = before


def test_the_log_is_silent_unless_asked_and_rank_0_s_unless_all_are(asked: Callable[..., str]) -> None:
    assert asked(None) == "" == asked("warning") == asked("info", rank="1")
    assert "rank 0] captured it" in asked("info") and "rank 1] captured it" in asked("info", rank="1", ranks="all")
    assert "LOUD is none of DEBUG, INFO, WARNING, ERROR" in asked("loud")


def test_each_event_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    layer = torch.nn.TransformerEncoderLayer(16, 2, batch_first=True).eval()
    model = xdit_compile.parallelize(layer, "ulysses=1,backend=inductor")
    with caplog.at_level(logging.INFO, logger=log.ROOT), torch.no_grad():
        for _ in range(3):
            model(torch.ones(1, 8, 16))
    for event in ("captured TransformerEncoderLayer in", "planned in", "used again", "by inductor took"):
        assert sum(event in r.message for r in caplog.records) == 1, caplog.text
