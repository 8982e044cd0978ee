"""What the package promises about its source: no model by name, arrows one way, small, every rule tested."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import test_rules

import xdit_compile
from xdit_compile.passes.rules import FAMILIES, RULES

PACKAGE = Path(xdit_compile.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
VOCABULARY = ("guards", "layout", "spec", "mesh", "program", "structure", "costs", "errors")

FAMILY_NAMES = (
    "flux", "sd3", "stable_?diffusion", "wan", "pix_?art", "hunyuan", "cog_?video", "cog_?view", "mochi",
    "ltx", "qwen", "sana", "latte", "lumina", "aura_?flow", "chroma", "cosmos", "allegro", "kandinsky",
    "omni_?gen", "hi_?dream", "easy_?animate", "skyreels", "bria", "transformer_?[123]_?d", "mm_?dit",
)  # fmt: skip


def module_name(path: Path) -> str:
    """``passes.rules.shape`` for the file of that module; "" for the package itself."""
    return ".".join(p for p in path.relative_to(PACKAGE).with_suffix("").parts if p != "__init__")


def imports(path: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in it, other than for type checkers alone."""
    names = {module_name(p) for p in FILES}
    package = [xdit_compile.__name__, *path.relative_to(PACKAGE).parent.parts]
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    typing = {id(n) for branch in ast.walk(tree)
              if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
              for n in ast.walk(branch)}  # fmt: skip
    for node in (n for n in ast.walk(tree) if id(n) not in typing):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found |= {source} | {f"{source}.{a.name}" for a in node.names}
    inside = {n.partition(".")[2] for n in found if n.split(".")[0] == xdit_compile.__name__}
    return (inside & names) - {"", module_name(path)}


def imported_under(folder: str) -> Iterator[tuple[str, str]]:
    """Who imports what, of the modules in a folder (or of that one module)."""
    for path in FILES:
        name = module_name(path)
        if name == folder or name.startswith(f"{folder}."):
            yield from ((name, other) for other in sorted(imports(path)))


def words(path: Path) -> Iterator[tuple[int, str]]:
    """Identifiers and strings of a file, without comments and docstrings."""
    tree = ast.parse(path.read_text())
    docs = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield line, node.value
        for field in ("id", "attr", "name", "arg", "module", "asname"):
            if isinstance(word := getattr(node, field, None), str):
                yield line, word


def test_words_are_found_and_docstrings_are_not(tmp_path: Path) -> None:
    source = tmp_path / "x.py"
    source.write_text(
        '"""FluxOne"""\nimport a.flux_two as b\nclass FluxThree:\n    """FluxFour"""\n'
        '    x = "flux five"  # flux six\n    def flux_seven(self, flux_eight): return f"{self} flux nine"\n'
    )
    found = " ".join(word for _, word in words(source)).lower()
    assert all(
        w in found for w in ("flux_two", "fluxthree", "flux five", "flux_seven", "flux_eight", "flux nine")
    )
    assert not any(w in found for w in ("fluxone", "fluxfour", "flux six"))


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_no_model_is_known_by_name(path: Path) -> None:
    import diffusers.models.transformers

    classes = {n for n in dir(diffusers.models.transformers) if n[0].isupper()}
    assert len(classes) > 20
    family = re.compile(rf"(?<![a-z])(?i:{'|'.join(FAMILY_NAMES)})(?![a-z])")
    named = [(line, word) for line, word in words(path)
             if family.search(word) or any(re.search(rf"\b{c}\b", word) for c in classes)]  # fmt: skip
    assert named == []


@pytest.mark.parametrize(
    ("folder", "never"),
    [
        ("runtime", ("passes", "frontend", "report")),
        ("passes", ("frontend", "runtime", "report")),
        ("frontend", ("passes", "runtime", "report")),
        ("kernels", ("frontend", "passes", "runtime", "report")),
        *((name, ("frontend", "passes", "runtime", "report", "kernels")) for name in VOCABULARY),
    ],
)
def test_arrows_point_one_way(folder: str, never: tuple[str, ...]) -> None:
    assert [(a, b) for a, b in imported_under(folder) if b.split(".")[0] in never] == []
    if folder not in VOCABULARY:
        users = ("api", "pipeline", "runner", "standin", "decorator", "encoders", "compiler", "explain", "verify",
                 "cli")
        assert [(a, b) for a, b in imported_under(folder) if b in users] == []
        assert any(b in VOCABULARY for _, b in imported_under(folder)), "imports are seen at all"


def test_imports_have_no_cycle() -> None:
    # A package is imported with each module of it; what it offers from them is no cycle.
    graph = {module_name(p): imports(p) for p in FILES if p.name != "__init__.py"}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(graph)


def test_what_people_come_to_read_is_short() -> None:
    files = [PACKAGE / "layout.py", *(PACKAGE / "passes").rglob("*.py")]
    lines = {module_name(p): sum(bool(line.strip()) for line in p.read_text().splitlines()) for p in files}
    assert sum(lines.values()) <= 4200, lines


def test_each_rule_is_in_the_table_and_in_its_test() -> None:
    (marked,) = (m for m in test_rules.test_rule_on_pieces_equals_operator_on_whole.pytestmark  # type: ignore[attr-defined]
                 if m.name == "parametrize")  # fmt: skip
    assert marked.args == ("op", list(RULES))
    files = {p.stem for p in (PACKAGE / "passes" / "rules").glob("*.py")} - {"__init__"}
    assert files == set(FAMILIES), "a file of rules that is never imported"
    assert {f.apply.__module__.rpartition(".")[2] for f in RULES.values()} == files


def test_rules_are_short() -> None:
    sizes = {
        rule.apply.__qualname__: len(inspect.getsource(rule.apply).splitlines()) for rule in RULES.values()
    }
    assert {name: n for name, n in sizes.items() if n > 45} == {}


def test_every_module_and_public_name_says_what_it_is_for() -> None:
    assert [
        module_name(p)
        for p in FILES
        if p.read_text().strip() and not ast.get_docstring(ast.parse(p.read_text()))
    ] == []
    assert [n for n in xdit_compile.__all__ if not inspect.getdoc(getattr(xdit_compile, n))] == []
    assert xdit_compile.__all__ == sorted(xdit_compile.__all__)
