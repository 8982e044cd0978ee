"""Pictures as files, whole or not at all, and the same for the same data."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xdit_compile.errors import XditError

NO_DATE: dict[str, dict[str, None]] = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None},
                                       "pdf": {"CreationDate": None, "Creator": None, "Producer": None}}
"""Of each kind of picture, what would make two of the same data differ."""


@contextmanager
def figure(width: float, height: float, path: Path, what: str) -> Iterator[Any]:
    """An empty figure of so many inches, in matplotlib's own style; written to ``path`` at the end, as SVG, PNG or PDF
    by the name of the file; ``what`` it shows.

    Raises:
        XditError: matplotlib cannot be imported, or the file cannot be written.
    """
    if (kind := path.suffix.lower().removeprefix(".")) not in NO_DATE:
        raise XditError(f"{what} is drawn as {', '.join(NO_DATE)}, by the end of the file's name; {path} ends in "
                        f"{kind or 'none'}")
    try:
        import matplotlib
        from matplotlib import style
        from matplotlib.figure import Figure
    except ImportError as error:
        raise XditError(f"drawing {what} needs matplotlib, which cannot be imported ({error}); "
                        "pip install 'xdit-compile[plots]'") from error
    with style.context("default"), matplotlib.rc_context({"svg.hashsalt": "xdit_compile", "svg.fonttype": "none"}):
        made = Figure(figsize=(width, height), layout="constrained")
        yield made
        _write(made, path, kind, what)


def _write(made: Any, path: Path, kind: str, what: str) -> None:
    if not path.parent.is_dir():
        raise XditError(f"{what} cannot be written to {path}: there is no folder {path.parent}")
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as drafts:
            draft = Path(drafts) / f"picture.{kind}"
            made.savefig(draft, format=kind, dpi=150, metadata=NO_DATE[kind])
            draft.replace(path)
    except OSError as error:
        raise XditError(f"{what} cannot be written to {path}: {error}") from error
