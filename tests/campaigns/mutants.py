"""Which lines of the core does no test hold? One line is changed at a time, and its tests are run.

    python tests/campaigns/mutants.py --count 40 --seed 0
    python tests/campaigns/mutants.py --count 400 --seed 0 --only passes/rules
    python tests/campaigns/mutants.py --count 400 --seed 0 --numbers 17 203       # of the 400, these two

First all these tests run once, under coverage, which takes some minutes (kept with ``--map FILE``). Changes are
cosmic-ray's, and one more: an assigned value becomes 0. Each is made in a copy of the package; tests that run the
changed line come first, quick ones before slow ones, then those that are named here for the file. A test that fails, or
takes ten minutes, has caught it. Changes that change nothing (``equivalents.py``) are not tried. Survivors are listed
as diffs. Exit code 1 if there are any.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import importlib
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import parso
import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Example, Operator
from cosmic_ray.plugins import get_operator, operator_names
from equivalents import EQUIVALENTS
from line_coverage import LineCoverage
from tqdm import tqdm

# Slow to import, and the same for all mutants; the package itself is each mutant's own.
for slow in ("torch._dynamo", "torch.export", "torch.distributed.fsdp", "diffusers", "hypothesis", "safetensors.torch"):
    importlib.import_module(slow)

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 600
NOTHING = "nothing"
MOST = 60
"""Seconds of tests that run a line, of which many are run by nearly all."""
PROCESSES = re.compile(r"\bPool\b|subprocess")
"""In a file whose tests start processes, of which coverage sees nothing."""

TARGETS = {
    "xdit_compile/ir/layout.py": ["tests/test_layout.py", "tests/test_rules.py"],
    "xdit_compile/ir/guards.py": ["tests/test_state_read.py", "tests/test_capture.py"],
    "xdit_compile/ir/containers.py": ["tests/test_values_in_and_out.py"],
    "xdit_compile/passes/rules/attention.py": ["tests/test_mixed_attention.py", "tests/test_rules.py",
                                               "tests/test_displaced_sequence.py"],
    "xdit_compile/passes/rules/reduction.py": ["tests/test_rules.py", "tests/test_displaced_sequence.py"],
    "xdit_compile/passes/rules/*.py": ["tests/test_rules.py"],
    "xdit_compile/passes/shard.py": ["tests/test_rules.py", "tests/test_seeds.py", "tests/test_batch.py"],
    "xdit_compile/passes/emitter.py": ["tests/test_strides.py", "tests/test_rules.py"],
    "xdit_compile/passes/interpreter.py": ["tests/test_rules.py", "tests/test_seeds.py", "tests/test_explain.py"],
    "xdit_compile/passes/sharded_value.py": ["tests/test_rules.py", "tests/test_seeds.py"],
    "xdit_compile/passes/token_axis.py": ["tests/test_seeds.py", "tests/test_exactness.py", "tests/test_explain.py"],
    "xdit_compile/passes/batch_axis.py": ["tests/test_seeds.py", "tests/test_batch.py"],
    "xdit_compile/passes/attention_plan.py": ["tests/test_mixed_attention.py", "tests/test_rules.py",
                                              "tests/test_kernels.py"],
    "xdit_compile/passes/attention_collectives.py": ["tests/test_mixed_attention.py", "tests/test_rules.py"],
    "xdit_compile/passes/lower_attention.py": ["tests/test_rules.py", "tests/test_batch.py"],
    "xdit_compile/passes/fuse_attention.py": ["tests/test_fuse_attention.py", "tests/test_seeds.py"],
    "xdit_compile/passes/canonicalize.py": ["tests/test_canonical.py", "tests/test_capture.py"],
    "xdit_compile/passes/expand_einsum.py": ["tests/test_canonical.py"],
    "xdit_compile/passes/composite.py": ["tests/test_canonical.py"],
    "xdit_compile/passes/spelling.py": ["tests/test_canonical.py"],
    "xdit_compile/passes/simplify.py": ["tests/test_passes.py", "tests/test_canonical.py"],
    "xdit_compile/passes/graph_editor.py": ["tests/test_passes.py", "tests/test_canonical.py"],
    "xdit_compile/passes/recorded.py": ["tests/test_passes.py", "tests/test_explain.py"],
    "xdit_compile/passes/verifier.py": ["tests/test_passes.py"],
    "xdit_compile/passes/functionalize_writes.py": ["tests/test_canonical.py", "tests/test_operators.py"],
    "xdit_compile/passes/overlap_communication.py": ["tests/test_overlap.py"],
    "xdit_compile/passes/hoist.py": ["tests/test_kept.py", "tests/test_displaced.py"],
    "xdit_compile/passes/patch_axis.py": ["tests/test_stages.py", "tests/test_displaced.py"],
    "xdit_compile/passes/pipefusion.py": ["tests/test_stages.py", "tests/test_displaced.py", "tests/test_planner.py"],
    "xdit_compile/passes/stage_partition.py": ["tests/test_stages.py", "tests/test_displaced.py"],
    "xdit_compile/kernels/merging.py": ["tests/test_kernels.py"],
    "xdit_compile/kernels/probe.py": ["tests/test_kernel_probe.py"],
    "xdit_compile/runtime/execution/loop_invariant_cache.py": ["tests/test_kept.py"],
    "xdit_compile/runtime/pipefusion/schedule.py": ["tests/test_schedule.py"],
    "xdit_compile/frontend/model_state.py": ["tests/test_state.py", "tests/test_state_read.py", "tests/test_edits.py",
                                             "tests/test_kept.py"],
    "xdit_compile/frontend/state_watch.py": ["tests/test_state.py", "tests/test_state_read.py", "tests/test_edits.py"],
    "xdit_compile/frontend/reads.py": ["tests/test_state_read.py", "tests/test_hidden_places.py"],
    "xdit_compile/frontend/objects.py": ["tests/test_state.py", "tests/test_state_read.py",
                                         "tests/test_hidden_places.py"],
    "xdit_compile/frontend/looks.py": ["tests/test_what_a_tensor_is.py"],
    "xdit_compile/frontend/results.py": ["tests/test_values_in_and_out.py"],
    "xdit_compile/frontend/operator_log.py": ["tests/test_alike_blocks.py", "tests/test_state_read.py"],
    "xdit_compile/frontend/repeated_blocks.py": ["tests/test_alike_blocks.py", "tests/test_capture.py"],
    "xdit_compile/frontend/block_fingerprint.py": ["tests/test_alike_blocks.py", "tests/test_state_read.py",
                                                   "tests/test_capture.py"],
    "xdit_compile/artifact/*_reader.py": ["tests/test_stage_artifacts.py", "tests/test_artifact.py", "-k",
                                          "not compiled_ahead"],
    "xdit_compile/artifact/files.py": ["tests/test_artifact.py", "-k", "not compiled_ahead"],
}
"""Files, and the tests that should catch a change in them."""

LEFT_OUT = ("RemoveDecorator", "VariableReplacer", "VariableInserter", "ExceptionReplacer", "Eq_Is", "NotEq_IsNot")
"""Operators of cosmic-ray that are not drawn: some need options; and of small numbers, ``is`` says what ``==`` does."""

EVERYWHERE = [name for name in operator_names() if not name.endswith(LEFT_OUT)]


class AssignZero(Operator):
    """``x = anything`` becomes ``x = 0``."""

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        if node.type == "expr_stmt" and len(node.children) == 3 and node.children[1].get_code().strip() == "=":
            yield node.children[2].start_pos, node.children[2].end_pos

    def mutate(self, node: Any, index: int) -> Any:
        node.children[2] = parso.python.tree.Number(" 0", node.children[2].start_pos)
        return node

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (Example("x = a + b", "x = 0"),)


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    file: Path
    operator: str
    changed: str

    def diff(self) -> str:
        lines = difflib.unified_diff(self.file.read_text().splitlines(), self.changed.splitlines(), lineterm="", n=0)
        return "\n".join(line for line in lines if not line.startswith(("---", "+++")))

    def changes_nothing(self) -> str | None:
        """The reason, where it is known to."""
        changes = [line for line in self.diff().splitlines() if not line.startswith("@@")]
        old, new = ("\n".join(c[1:].strip() for c in changes if c[0] == sign) for sign in "-+")
        return EQUIVALENTS.get((str(self.file.relative_to(ROOT / "xdit_compile")), old, new))

    def lines(self) -> list[int]:
        """Numbers of the lines that it changes."""
        old, new = self.file.read_text().splitlines(), self.changed.splitlines()
        changes = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
        return [n + 1 for kind, a, b, _, _ in changes if kind != "equal" for n in range(a, max(b, a + 1))]


@cache
def operators() -> dict[str, Operator]:
    return {name: get_operator(name)() for name in EVERYWHERE} | {"AssignZero": AssignZero()}


@cache
def places(file: Path) -> dict[Any, list[tuple[str, int]]]:
    """For each part of the source that may be changed, by which operators, and as the how manieth of theirs."""
    found: dict[Any, list[tuple[str, int]]] = defaultdict(list)
    nodes = [*ast_nodes(get_ast(file.read_text()))]
    for name, operator in operators().items():
        positions = [position for node in nodes for position in operator.mutation_positions(node)]
        for number, position in enumerate(positions):
            found[position].append((name, number))
    return dict(found)


def meaning(source: str) -> str:
    """What runs outside of tests: without annotations and names of types, without decorators, which hold the examples
    of rules, and without ``strict`` of zip, which only doubts that sizes are equal."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            node.decorator_list = [d for d in node.decorator_list if not ast.unparse(d).startswith("rule(")]
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        if isinstance(node, ast.arg):
            node.annotation = None
        if isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
        if isinstance(node, ast.Call):
            node.keywords = [k for k in node.keywords if k.arg != "strict"]
    examples = ("r.tensor(", "lambda r:")
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    tree.body = [n for n in tree.body if not (isinstance(n, ast.FunctionDef) and any(
        e in ast.unparse(n) for e in examples)) and not _names_a_type(n, used)]
    return ast.dump(tree)


def _names_a_type(node: ast.stmt, used: Collection[str]) -> bool:
    """Whether this gives a name in capitals and small letters, which annotations alone mention."""
    return isinstance(node, ast.Assign) and not {ast.unparse(t) for t in node.targets} & {*used} and (
        re.fullmatch(r"_?[A-Z]\w*[a-z]\w*", ast.unparse(node.targets[0])) is not None)


def drawn(files: list[Path], rng: random.Random) -> Mutant:
    """A change that means something."""
    weights = [len(places(f)) for f in files]
    while True:
        (file,) = rng.choices(files, weights)
        operator, number = rng.choice(places(file)[rng.choice(sorted(places(file)))])
        changed = mutate_code(file.read_text(), operators()[operator], number)
        try:
            if changed is not None and meaning(changed) != meaning(file.read_text()):
                return Mutant(file, operator.removeprefix("core/"), changed)
        except SyntaxError:
            continue


def named_for(file: Path) -> list[str]:
    return next(t for pattern, t in TARGETS.items() if file.match(pattern))


def tests_of(mutant: Mutant, covered: LineCoverage) -> list[str]:
    """What is most likely to catch it comes first. Of files that start no processes, tests that are known not to run
    its line are left out, unless none is known to."""
    running = covered.tests(mutant.file, mutant.lines())
    likely, named = running[: covered.within(running, MOST)], named_for(mutant.file)
    alone = {f for f in named if f.startswith("tests/") and not PROCESSES.search((ROOT / f).read_text())}
    idle = [t for t in covered.all() if t.partition("::")[0] in alone and t not in {*running}] if running else []
    return [*likely, *named, *(f"--deselect={t}" for t in idle)]


class Trial:
    """The tests of one mutant, in a process that is forked from this one: what is slow to import is here already."""

    def __init__(self, number: int, mutant: Mutant, tests: Iterable[str]) -> None:
        self.number, self.mutant = number, mutant
        self.folder = tempfile.mkdtemp()
        self.begun = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(self._run([str(ROOT / t) if t.startswith("tests/") else t for t in tests]))

    def _run(self, tests: list[str]) -> int:
        code = 3
        try:
            os.setsid()
            package = Path(self.folder) / "xdit_compile"
            shutil.copytree(ROOT / "xdit_compile", package)  # with bytecode
            (Path(self.folder) / self.mutant.file.relative_to(ROOT)).write_text(self.mutant.changed)
            log = os.open(Path(self.folder) / "log", os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.chdir(self.folder)
            sys.path[:] = [self.folder, str(ROOT / "tests"), *sys.path[1:], str(ROOT)]
            os.environ["PYTHONPATH"] = f"{self.folder}:{ROOT / 'tests'}"
            code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(ROOT),
                                    "-c", str(ROOT / "pyproject.toml"), *tests]))
        finally:
            sys.stdout.flush()
        return code

    def caught(self) -> bool | None:
        """Whether a test failed; None while they run."""
        ended, status = os.waitpid(self.pid, os.WNOHANG)
        if not ended and time.monotonic() - self.begun < TIMEOUT:
            return None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # and what it has started
        if not ended:
            os.waitpid(self.pid, 0)
        code = os.waitstatus_to_exitcode(status) if ended else 1
        said = (Path(self.folder) / "log").read_text(errors="replace")[-2000:]
        shutil.rmtree(self.folder)
        # Pytest itself failed, or found no test. 4: a file of tests cannot be imported any more.
        if code in (3, 5) or (code == 4 and self.mutant.operator == NOTHING):
            raise RuntimeError(f"{self.mutant.file}: {said}")
        return code != 0


def outcomes(mutants: Iterable[Mutant], covered: LineCoverage, jobs: int,
             tests: list[str] | None = None) -> Iterator[tuple[int, Mutant, bool, float]]:
    """Each mutant, whether it was caught by its tests, or by these, and after how many seconds."""
    running: list[Trial] = []
    waiting = enumerate(mutants)
    while True:
        while len(running) < jobs and (following := next(waiting, None)):
            running.append(Trial(*following, tests or tests_of(following[1], covered)))
        if not running:
            return
        time.sleep(0.1)
        for trial in running[:]:
            if (caught := trial.caught()) is not None:
                running.remove(trial)
                yield trial.number, trial.mutant, caught, time.monotonic() - trial.begun


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="files whose path holds this")
    parser.add_argument("--numbers", type=int, nargs="+", help="of all drawn, only these")
    parser.add_argument("--jobs", type=int, default=2, help="how many are tried at once")
    parser.add_argument("--map", type=Path, help="where to keep which tests run a line; read if it is there")
    given = parser.parse_args()
    files = sorted({f for pattern in TARGETS for f in ROOT.glob(pattern) if given.only in str(f)})
    rng, counts = random.Random(given.seed), Counter[str]()
    named = sorted({t for f in files for t in named_for(f) if t.startswith("tests/")})
    covered = LineCoverage.kept(given.map, files, named)
    unchanged = Mutant(files[0], NOTHING, files[0].read_text())
    for found in outcomes([unchanged], covered, 1, ["--collect-only", *covered.all(), *named]):
        assert not found[2], "tests cannot be collected"
    drawn_ones = {n: drawn(files, rng) for n in range(given.count)}
    chosen = {n: m for n, m in drawn_ones.items() if not given.numbers or n in given.numbers}
    for number, mutant in chosen.items():
        if reason := mutant.changes_nothing():
            counts["equivalent"] += 1
            print(f"{number}: {mutant.file.relative_to(ROOT)} {mutant.operator} equivalent: {reason}", flush=True)
    numbers = [n for n, m in chosen.items() if not m.changes_nothing()]
    tried = outcomes((chosen[n] for n in numbers), covered, given.jobs)
    for place, mutant, caught, seconds in tqdm(tried, total=len(numbers), unit="mutant"):
        counts["caught" if caught else "survived"] += 1
        verdict = "caught" if caught else "SURVIVED"
        what = f"{mutant.file.relative_to(ROOT)} {mutant.operator}"
        print(f"{numbers[place]}: {what} {verdict} {seconds:.0f} s", flush=True)
        if not caught:
            print("    " + mutant.diff().replace("\n", "\n    "), flush=True)
    print(f"{len(chosen)} mutants of {len(files)} files, seed {given.seed}: {dict(counts)}")
    return int(counts["survived"] > 0)


if __name__ == "__main__":
    sys.exit(main())
