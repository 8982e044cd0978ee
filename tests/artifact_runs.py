"""What the workers of the pool run for the tests of artifacts."""

from __future__ import annotations

import xdit_compile


def refused(path: str, ranks: int) -> str:
    """What is said when so many ranks load an artifact for another number."""
    try:
        xdit_compile.load(path, ranks=range(ranks), timeout=60)
    except xdit_compile.ArtifactError as error:
        return str(error)
    return ""
