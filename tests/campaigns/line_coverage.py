"""Which tests run a line of the package, and how long they take: what runs a line may tell that it was changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from xml.etree import ElementTree

from coverage import CoverageData

ROOT = Path(__file__).resolve().parents[2]


class LineCoverage:
    """Of some files, by their paths below the root, and the numbers of their lines."""

    def __init__(self, lines: dict[str, dict[str, list[str]]], seconds: dict[str, float]) -> None:
        self._lines, self._seconds = lines, seconds

    @classmethod
    def measured(cls, files: Iterable[Path], tests: Sequence[str]) -> LineCoverage:
        """By running files of tests once, which takes some minutes. What other processes run is not seen."""
        with tempfile.TemporaryDirectory() as folder:
            data, times = Path(folder) / "data", Path(folder) / "times.xml"
            done = subprocess.run(
                [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", "-p", "no:cacheprovider",
                 "--cov=xdit_compile", "--cov-context=test", "--cov-report=", f"--junitxml={times}", *tests],
                cwd=ROOT, env={**os.environ, "COVERAGE_FILE": str(data)}, check=False)
            if done.returncode > 1:  # one that fails may do so for being slow
                raise RuntimeError(f"pytest ended with {done.returncode}")
            cases = ElementTree.parse(times).iter("testcase")
            seconds = {f"{c.get('classname')}.{c.get('name')}": float(c.get("time", 0)) for c in cases}
            found = CoverageData(str(data))
            found.read()
            tests_run = {c.rpartition("|")[0] for c in found.measured_contexts() if "|" in c}
            taken = {t: seconds[key] for t in tests_run if (key := _as_reported(t)) in seconds}
            return cls({str(f.relative_to(ROOT)): {
                str(line): sorted({c.rpartition("|")[0] for c in contexts if "|" in c})
                for line, contexts in found.contexts_by_lineno(str(f)).items()} for f in files}, taken)

    @classmethod
    def kept(cls, at: Path | None, files: Iterable[Path], tests: Sequence[str]) -> LineCoverage:
        """From a file, or measured, and then written there."""
        if at and at.exists():
            held = json.loads(at.read_text())
            return cls(held["lines"], held["seconds"])
        made = cls.measured(files, tests)
        if at:
            at.write_text(json.dumps({"lines": made._lines, "seconds": made._seconds}))
        return made

    def all(self) -> list[str]:
        return [*self._seconds]

    def tests(self, file: Path, lines: Iterable[int]) -> list[str]:
        """Those that run one of these lines, quick ones first."""
        held = self._lines.get(str(file.relative_to(ROOT)), {})
        running = {t for line in lines for t in held.get(str(line), ()) if t in self._seconds}
        return sorted(running, key=self._seconds.__getitem__)

    def within(self, tests: Sequence[str], most: float) -> int:
        """How many of these, from the first, take ``most`` seconds."""
        return bisect_right([*accumulate(map(self._seconds.__getitem__, tests))], most)


def _as_reported(test: str) -> str:
    """``tests/test_a.py::TestB::test_c[d]`` as reports have it: tests.test_a.TestB.test_c[d]."""
    path, _, rest = test.partition(".py::")
    name, bracket, parameters = rest.partition("[")
    return f"{path.replace('/', '.')}.{name.replace('::', '.')}{bracket}{parameters}"
