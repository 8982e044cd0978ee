"""What the package promises about its source: no model by name, arrows one way, small, every rule tested."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import networkx
import pytest
import test_rules

import xdit_compile
from xdit_compile.passes.rules import FAMILIES, RULES

PACKAGE = Path(xdit_compile.__file__).parent
REPOSITORY = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py"))
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "log": set(),
    "progress": set(),
    "spec": {"errors"},
    "kernels": {"errors"},
    "ir": {"errors", "spec"},
    "frontend": {"errors", "ir", "progress"},
    "passes": {"errors", "spec", "kernels", "ir"},
    "report": {"errors", "ir"},
    "runtime.control": {"errors", "spec", "ir", "progress"},
    "runtime.compilation": {"errors", "spec", "ir", "progress"},
    "runtime.execution": {"errors", "spec", "ir", "runtime.compilation"},
    "runtime.deferred": {"spec", "runtime.control"},
    "runtime.pipefusion": {"errors", "ir", "runtime.control", "runtime.deferred", "runtime.execution"},
    "runtime": {"errors", "spec", "runtime.control", "runtime.deferred", "runtime.pipefusion", "progress"},
    "driver": {"errors", "spec", "ir", "frontend", "passes", "runtime", "runtime.control", "runtime.deferred",
               "runtime.execution", "runtime.pipefusion", "progress"},
    "planner": {"errors", "spec", "ir", "frontend", "passes", "report", "runtime", "runtime.control",
                "runtime.pipefusion", "driver"},
    "artifact": {"errors", "spec", "ir", "frontend", "kernels", "passes", "report", "driver", "planner", "runtime",
                 "runtime.control", "runtime.compilation", "runtime.execution", "runtime.deferred",
                 "runtime.pipefusion", "progress"},
    "pipelines": {"errors", "spec", "ir", "frontend", "report", "driver", "runtime", "runtime.control",
                  "runtime.execution", "runtime.deferred", "runtime.pipefusion", "progress"},
    "api": {"errors", "spec", "ir", "frontend", "driver", "planner", "pipelines", "runtime", "runtime.compilation"},
    "decorator": {"spec", "api", "driver", "planner", "pipelines", "runtime.deferred"},
    "diagnostics": {"errors", "spec", "ir", "frontend", "passes", "report", "driver", "planner", "pipelines", "api",
                    "runtime.deferred", "runtime.pipefusion", "progress"},
    "engine": {"errors", "spec", "ir", "driver", "artifact", "pipelines", "planner", "api", "runtime",
               "runtime.control", "progress"},
    "serve": {"errors", "engine", "pipelines"},
    "cli": {"errors", "spec", "ir", "frontend", "report", "runtime", "planner", "pipelines", "artifact", "api",
            "diagnostics", "engine", "serve", "progress"},
    "compat": {"errors", "spec", "runtime", "pipelines", "api", "cli"},
    "__main__": {"cli"},
}  # fmt: skip
"""Which room may know which. Written down in docs/architecture.md too; a room further down never appears further up."""

QUESTIONS = (
    "how `cat` is sharded",
    "how a missing rule is made up for",
    "what happens when a rank dies",
    "which flags of xDiT are refused",
    "how a mask is cut under Ulysses",
    "what decides that text is sharded",
    "where LoRA state enters the cache key",
    "how a patch reads what a later patch had one step before",
    "which ranks form a ring",
    "what a rank does when its turn in guidance comes",
    "what an artifact may call when it is read",
    "how a word of the spec is read",
)
"""What someone who comes to the code asks first; CONTRIBUTING.md answers each with a path."""

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


def room(module: str) -> str:
    """The room that a module is in: its folder, of the runtime's the folder in that."""
    first, *rest = module.split(".")
    inside = first == "runtime" and rest and (PACKAGE / first / rest[0]).is_dir()
    return f"{first}.{rest[0]}" if inside else first


def arrows() -> dict[str, set[str]]:
    """Which rooms each room imports."""
    found: dict[str, set[str]] = {name: set() for name in ARROWS}
    for path in FILES:
        if name := module_name(path):
            found.setdefault(room(name), set()).update({room(other) for other in imports(path)} - {room(name)})
    return found


def test_each_room_imports_what_the_table_allows_and_nothing_else() -> None:
    assert arrows() == ARROWS


def test_rooms_and_modules_form_no_circle() -> None:
    modules = {module_name(p): imports(p) for p in FILES if p.name != "__init__.py"}
    for graph in (ARROWS, modules):
        made = networkx.DiGraph([(a, b) for a, others in graph.items() for b in others])
        assert made.number_of_edges() > 20, "imports are seen at all"
        assert [c for c in networkx.strongly_connected_components(made) if len(c) > 1] == []


def test_the_architecture_page_shows_the_same_table() -> None:
    text = (REPOSITORY / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| `([\w./]+)` \|[^|]*\| ([^|]*) \|$", text, re.M)
    shown = {name.removesuffix("/").removesuffix(".py").replace("/", "."): set(re.findall(r"`([\w.]+)`", knows))
             for name, knows in rows}  # fmt: skip
    assert shown == ARROWS


def test_the_architecture_page_reads_in_ten_minutes() -> None:
    """But for the lists of imports, which nobody reads from end to end."""
    text = re.sub(r"(`[\w./]+` )+\|$", "|", (REPOSITORY / "docs" / "architecture.md").read_text(), flags=re.M)
    assert len(text.split()) <= 2500


def test_documents_are_in_the_index() -> None:
    shown = set(re.findall(r"\]\(([\w.-]+\.md)\)", (REPOSITORY / "docs" / "README.md").read_text()))
    assert shown == {p.name for p in (REPOSITORY / "docs").glob("*.md")} - {"README.md"}


def test_the_root_is_what_a_user_touches() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 8


def test_newcomers_questions_are_answered_by_paths_that_exist() -> None:
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    rows = dict(re.findall(r"^\| ([^|]+) \| `([\w/.]+:\w+)` \|$", text, re.M))
    assert set(QUESTIONS) <= rows.keys()
    for question, answer in rows.items():
        path, _, name = answer.partition(":")
        assert (REPOSITORY / path).is_file(), question
        assert re.search(rf"^\s*(def|class) {name}\b|^{name}\b.* = ", (REPOSITORY / path).read_text(), re.M), question


def test_what_people_come_to_read_is_short() -> None:
    files = [PACKAGE / "ir" / "layout.py", *(PACKAGE / "passes").rglob("*.py")]
    lines = {module_name(p): sum(bool(line.strip()) for line in p.read_text().splitlines()) for p in files}
    assert sum(lines.values()) <= 5700, lines


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
