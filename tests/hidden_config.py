"""A module of Python that tests read and write as models do with their own."""

from typing import Any

SCALE = 1.0
TABLE: Any = None
CACHE: dict[Any, Any] = {}
