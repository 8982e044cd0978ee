"""Mechanisms of others are honoured, refused or without effect, as ``docs/mechanisms.md`` says of each."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import mechanisms
import mechanisms_ranks
import pytest
from pool import Pool

PAGE = Path(__file__).parent.parent / "docs" / "mechanisms.md"
EXACT = 1e-5


def rows_of_the_page() -> dict[str, str]:
    found = re.findall(r"^\| (.+?) \| \*(honoured|refused|has no effect)\* \|", PAGE.read_text(), re.MULTILINE)
    assert len(found) == len(dict(found))
    return dict(found)


def test_the_page_and_the_tests_have_the_same_rows() -> None:
    tested = {name: row.word for name, row in mechanisms.ROWS.items()} | mechanisms_ranks.WORDS
    assert rows_of_the_page() == tested


@pytest.mark.parametrize("name", mechanisms.ROWS)
def test_row(name: str) -> None:
    row = mechanisms.ROWS[name]
    if row.word == "refused":
        with pytest.raises(RuntimeError, match=re.escape(row.says)):  # of PyTorch's own, or an XditError
            row.act()
        return
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        error = row.act()
    assert error <= EXACT
    ours = [str(w.message) for w in said if row.says and row.says in str(w.message)]
    assert bool(ours) == (row.word == "has no effect")


def test_rows_of_several_ranks(pool: Pool) -> None:
    for seen in pool.run(mechanisms_ranks.scenes, ranks=range(2), timeout=150):
        assert seen.keys() == mechanisms_ranks.WORDS.keys()
        for name, word in mechanisms_ranks.WORDS.items():
            found = seen[name]
            assert found <= EXACT if word == "honoured" else mechanisms_ranks.SAYS[name] in found, (name, found)
