"""Which versions of Python, PyTorch and diffusers does it run with?

For each combination an environment of its own is made (``.compat/``, kept for the next time), in which a chosen list of
tests runs; what came of it is a row of ``docs/compatibility.md``. Rows of other runs stay: ``docs/compatibility.json``
holds them.

    python benchmarks/compat.py --list
    python benchmarks/compat.py                                   # all combinations, about an hour each
    python benchmarks/compat.py --only py311-torch2.11.0 --quick
    python benchmarks/compat.py --only py311-torch2.11.0 --python /some/environment/bin/python    # one that is there

Where PyTorch has no build for CPUs, one for CUDA runs on a CPU too. A combination needs its ``pythonX.Y`` on the path.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS, FOLDER = ROOT / "docs/compatibility.md", ROOT / "docs/compatibility.json", ROOT / ".compat"
PINNED = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)

QUICK = ("test_loops", "test_schedule", "test_spec", "test_kernel_probe", "test_overlap", "test_kernels",
         "test_layout", "test_canonical", "test_passes", "test_seeds", "test_mixed_attention", "test_rules")
"""What graphs, rules and kernels are."""
CHOSEN = (*QUICK, "test_capture", "test_alike_blocks", "test_state", "test_writes", "test_zoo", "test_parallelize",
          "test_waiting", "test_compiling", "test_pitfalls", "test_artifact", "test_stages", "test_pipefusion",
          "test_pipelines_tiny", "test_shard", "test_tensor", "test_vae", "test_mechanisms", "test_control",
          "test_launch")
"""Of the rest, what meets PyTorch and diffusers most."""


@dataclass(frozen=True)
class Combination:
    """Versions that are installed together; what is not named is pinned in ``constraints.txt``."""

    python: str
    torch: str = PINNED["torch"]
    diffusers: str = PINNED["diffusers"]

    @property
    def name(self) -> str:
        others = [f"{name}{getattr(self, name)}" for name in ("torch", "diffusers")
                 if getattr(self, name) != PINNED[name]]
        return "-".join([f"py{self.python.replace('.', '')}", *others])


COMBINATIONS = (Combination("3.11"), Combination("3.12"), Combination("3.13"), Combination("3.11", torch="2.14.1"),
                Combination("3.11", torch="2.12.0"), Combination("3.11", torch="2.11.0"),
                Combination("3.13", torch="2.11.0"))


def environment(combination: Combination) -> Path:
    """The Python of an environment for it, made unless it is there."""
    folder = FOLDER / combination.name
    python = folder / "bin/python"
    if not (folder / "ready").exists():
        subprocess.run([f"python{combination.python}", "-m", "venv", "--clear", str(folder)], check=True)
        pins = PINNED | {"torch": combination.torch, "diffusers": combination.diffusers}
        constraints = folder / "constraints.txt"
        constraints.write_text("\n".join(f"{name}=={version}" for name, version in pins.items()))
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(constraints)]
        subprocess.run([*pip, "torch"], check=True)
        subprocess.run([*pip, "-e", f"{ROOT}[test]"], check=True)
        (folder / "ready").touch()
    return python


def versions(python: Path) -> dict[str, str]:
    """Those that are there."""
    code = ("import json, platform, torch, diffusers; print(json.dumps({'python': platform.python_version(), "
            "'torch': torch.__version__, 'diffusers': diffusers.__version__}))")
    out = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1])


def tested(python: Path, names: Sequence[str], minutes: float) -> Iterator[dict[str, Any]]:
    """After each file: how many tests so far passed, failed and were skipped, and which failed. Each file is a process
    of its own: what ends one is a failure of that file alone."""
    found: dict[str, Any] = {"files": [], "passed": 0, "skipped": 0, "failed": []}
    start = time.monotonic()
    for name in tqdm(names, desc=str(python.parents[1].name), unit="file"):
        if time.monotonic() - start > 60 * minutes:
            found["failed"].append(f"{name}: not begun within {minutes:g} minutes")
            continue
        found["files"].append(name)
        with TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            run = subprocess.run(
                [str(python), "-m", "pytest", f"tests/{name}.py", "-q", "-p", "no:cacheprovider",
                 f"--junitxml={report}"],
                cwd=ROOT, capture_output=True, text=True,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
            if not report.exists():
                found["failed"].append(f"{name}: ended with {run.returncode}")
            for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
                kinds = {child.tag for child in case}
                if kinds & {"failure", "error"}:
                    found["failed"].append(f"{name}::{case.get('name')}")
                else:
                    found["skipped" if "skipped" in kinds else "passed"] += 1
        found["minutes"] = round((time.monotonic() - start) / 60, 1)
        yield found


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """All results as a page."""
    lines = ["# Compatibility", "",
             "What was run with which versions, by `make compat` (`benchmarks/compat.py`), on CPUs. *Files*:",
             "test files of the chosen list, each in a process of its own. PyTorch's version says for which device it",
             "was built; a build for CUDA runs on a CPU too. What is not in the table was not run.", "",
             "| Python | PyTorch | diffusers | files | passed | skipped | failed |", "|---|---|---|---:|---:|---:|---|"]
    for one in results.values():
        failed = ", ".join(f"`{name}`" for name in one["failed"]) or "none"
        lines.append(f"| {one['python']} | {one['torch']} | {one['diffusers']} | {len(one['files'])} | "
                     f"{one['passed']} | {one['skipped']} | {failed} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[c.name for c in COMBINATIONS], help="some combinations")
    parser.add_argument("--list", action="store_true", help="show them")
    parser.add_argument("--quick", action="store_true", help="only the tests of graphs, rules and kernels")
    parser.add_argument("--files", nargs="+", help="test files, in the place of the chosen ones")
    parser.add_argument("--python", type=Path, help="of an environment that is there, for a single combination")
    parser.add_argument("--minutes", type=float, default=60, help="begin no further file of a combination after these")
    options = parser.parse_args()
    chosen = [c for c in COMBINATIONS if not options.only or c.name in options.only]
    if options.list:
        print("\n".join(f"{c.name}: Python {c.python}, torch {c.torch}, diffusers {c.diffusers}" for c in chosen))
        return
    if options.python and len(chosen) != 1:
        sys.exit("--python is for a single combination: name it with --only")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for combination in chosen:
        python = options.python or environment(combination)
        names = options.files or (QUICK if options.quick else CHOSEN)
        here = versions(python)
        for found in tested(python, names, options.minutes):
            results[combination.name] = here | found
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
