"""Pictures as SVG files, whole or not at all, and the same for the same data."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xdit_compile.errors import XditError


@contextmanager
def figure(width: float, height: float, path: Path, what: str) -> Iterator[Any]:
    """An empty figure of so many inches, in matplotlib's own style; written to ``path`` at the end, ``what`` it shows.

    Raises:
        XditError: matplotlib cannot be imported, or the file cannot be written.
    """
    try:
        import matplotlib
        from matplotlib import style
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise XditError(f"drawing {what} needs matplotlib, which cannot be imported ({error}); "
                        "pip install 'xdit-compile[plots]'") from error
    with style.context("default"), matplotlib.rc_context({"svg.hashsalt": "xdit_compile", "svg.fonttype": "none"}):
        made = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(made)
        yield made
        _write(made, path, what)


def _write(made: Any, path: Path, what: str) -> None:
    if not path.parent.is_dir():
        raise XditError(f"{what} cannot be written to {path}: there is no folder {path.parent}")
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as drafts:
            draft = Path(drafts) / "picture.svg"
            made.savefig(draft, format="svg", metadata={"Date": None, "Creator": None})
            draft.replace(path)
    except OSError as error:
        raise XditError(f"{what} cannot be written to {path}: {error}") from error
