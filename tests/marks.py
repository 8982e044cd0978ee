"""Marks that tests share."""

from __future__ import annotations

from typing import Any

import pytest


def whole(*values: Any, **options: Any) -> Any:
    """Parameters of a test that run with ``--whole`` alone: what repeats, slowly, what others show."""
    return pytest.param(*values, marks=pytest.mark.whole, **options)
