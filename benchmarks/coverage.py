"""Which models the compiler makes parallel, and how well: the tables in docs/coverage.md.

Every case of the tests is compared with plain PyTorch on real processes, in float32 and, one case of each model,
in bfloat16; every published size of the examples is planned for 2, 4 and 8 ranks without running it. All of it
takes two cores about four hours. With --json it can be interrupted and goes on where it was.

    python benchmarks/coverage.py --output docs/coverage.md
    python benchmarks/coverage.py --cases dit flux --published dit_xl_512
    python benchmarks/coverage.py --json coverage.json --output docs/coverage.md
    python benchmarks/coverage.py --json coverage.json --output docs/coverage.md --again wan flux_dev
    python benchmarks/coverage.py --sharing --output docs/sharing.md      # weights that are shared out, alone

Exit code 1 if anything failed or is inexact; what, is on stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import diffusers
import torch
from tqdm import tqdm

# Before this file's own folder: the examples import their neighbour published, and there is one here too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import zoo
from pool import Pool

from benchmarks import coverage_measures as measures
from benchmarks.coverage_page import failures, page, sharing_page

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = f"torch {torch.__version__.partition('+')[0]}, diffusers {diffusers.__version__}"
SECTIONS = ("cases", "shared", "bfloat16", "published", "test_sizes")


class Measured:
    """What was measured so far, by section and name; in a file, if there is one, after each measurement."""

    def __init__(self, path: Path | None, again: Collection[str] = ()) -> None:
        self.path = path
        self.sections: dict[str, dict[str, measures.Record]] = {name: {} for name in SECTIONS}
        if path and path.exists():
            held = json.loads(path.read_text())
            if held["versions"] != VERSIONS:
                sys.exit(
                    f"{path} was measured with {held['versions']}, and this is {VERSIONS}: use another file"
                )
            for name in SECTIONS:
                self.sections[name] = {k: v for k, v in held.get(name, {}).items() if k not in again}

    def once(self, section: str, name: str, measure: Callable[[], measures.Record]) -> measures.Record:
        """The record, measured now unless it is there."""
        records = self.sections[section]
        if name not in records:
            records[name] = measure()
            self._save()
        return records[name]

    def of(self, chosen: dict[str, Collection[str]]) -> dict[str, dict[str, measures.Record]]:
        """The records of some names, in their order."""
        return {
            s: {n: self.sections[s][n] for n in names if n in self.sections[s]} for s, names in chosen.items()
        }

    def _save(self) -> None:
        if self.path:
            made = self.path.with_name(f"{self.path.name}.part")
            made.write_text(json.dumps({"versions": VERSIONS, **self.sections}, indent=1) + "\n")
            os.replace(made, self.path)


def main() -> int:
    options = _options()
    measured = Measured(options.json, options.again)
    covered = set()
    for name in tqdm(options.published, "published sizes", disable=not options.published):
        found = measured.once("published", name, lambda n=name: measures.planned_published(n))
        covered.add(found.get("class"))
    pool = Pool(1 if options.sharing else 3)
    sized = []
    for name in tqdm(options.cases, "cases", disable=not options.cases):
        if options.sharing:
            measured.once("shared", name, lambda n=name: measures.shared(pool, n))
            continue
        found = measured.once("cases", name, lambda n=name: measures.compared(pool, n))
        if found["class"] not in covered and "problem" not in found:
            covered.add(found["class"])
            sized.append(name)
            measured.once("test_sizes", name, lambda n=name: measures.planned_test(pool, n))
        measured.once("shared", name, lambda n=name: measures.shared(pool, n))
        if name in zoo.BASIC:
            measured.once("bfloat16", name, lambda n=name: measures.halved(pool, n))
    pool.close()
    chosen = {
        "cases": options.cases,
        "shared": options.cases,
        "bfloat16": options.cases,
        "published": options.published,
        "test_sizes": sized,
    }
    shown = measured.of({"shared": options.cases} if options.sharing else chosen)
    text = (sharing_page if options.sharing else page)(shown, _command(options), VERSIONS)
    if options.output:
        options.output.write_text(text)
    else:
        print(text, end="")
    bad = failures(shown)
    for what, reason in bad.items():
        print(f"{what}: {reason}", file=sys.stderr)
    return 1 if bad else 0


def _command(options: argparse.Namespace) -> str:
    """How to make this page again."""
    words = ["python", "benchmarks/coverage.py"]
    if options.sharing:
        words += ["--sharing", *(() if options.cases == [*zoo.CASES] else ("--cases", *options.cases))]
    elif options.cases != [*zoo.CASES] or options.published != [*measures.PUBLISHED]:
        for name in ("cases", "published"):
            words += [f"--{name}", *getattr(options, name)] if getattr(options, name) else []
    if options.output:
        words += ["--output", os.path.relpath(options.output, ROOT)]
    return shlex.join(words)


def _options() -> Any:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/coverage.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=zoo.CASES,
        metavar="NAME",
        help="cases of tests/zoo.py (all, or none where --published names some)",
    )
    parser.add_argument(
        "--published",
        nargs="+",
        choices=measures.PUBLISHED,
        metavar="NAME",
        help="sizes of examples/published*.py (all, or none where --cases names some)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="PATH", help="write the page there instead of printing it"
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="PATH",
        help="keep every measurement there, and do not repeat those that are there",
    )
    parser.add_argument(
        "--again",
        nargs="+",
        choices=zoo.CASES | measures.PUBLISHED,
        default=[],
        metavar="NAME",
        help="measure these again, though they are in the file",
    )
    parser.add_argument(
        "--sharing",
        action="store_true",
        help="all cases (or those named) under tensor and shard, and nothing else: two hours of two cores",
    )
    options = parser.parse_args()
    if options.sharing:
        options.cases, options.published = options.cases or [*zoo.CASES], []
        return options
    everything = not (options.cases or options.published)
    options.cases = options.cases or ([*zoo.CASES] if everything else [])
    options.published = options.published or ([*measures.PUBLISHED] if everything else [])
    return options


if __name__ == "__main__":
    sys.exit(main())
