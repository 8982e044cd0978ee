"""JSON from files of strangers, value by value: whoever asks says what it must be, and is told where it is not."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xdit_compile.errors import ArtifactError

LONGEST_TEXT = 4096
"""Characters of a name, a spec or the like."""
LARGEST_NUMBER = 2**48
"""Of sizes and places."""


@dataclass(frozen=True)
class Entry:
    """A value, and where it is: a file, and the keys that lead to it."""

    value: Any
    where: str

    def wrong(self, wanted: str) -> ArtifactError:
        """The error to raise if this is not what is ``wanted``."""
        return ArtifactError(f"{self.where} is {reprlib.repr(self.value)}, which is no {wanted}")

    def __getitem__(self, key: str) -> Entry:
        """That of an object which has to be there."""
        if not isinstance(self.value, dict):
            raise self.wrong("object")
        if key not in self.value:
            raise ArtifactError(f"{self.where} has no {key!r}")
        return Entry(self.value[key], f"{self.where}.{key}")

    def __contains__(self, key: str) -> bool:
        return isinstance(self.value, dict) and key in self.value

    def __bool__(self) -> bool:
        """Whether it is not null."""
        return self.value is not None

    def items(self) -> list[tuple[str, Entry]]:
        """Those of an object."""
        if not isinstance(self.value, dict):
            raise self.wrong("object")
        return [(_short(k, self.where), Entry(v, f"{self.where}.{k[:80]}")) for k, v in self.value.items()]

    def numbered(self, least: int = 0) -> list[tuple[int, Entry]]:
        """Those of an object whose keys are whole numbers, written the one way there is."""
        made = []
        for key, entry in self.items():
            number = int(key) if len(key) < 16 and key.removeprefix("-").isascii() and (
                key.removeprefix("-").isdigit()) else None
            if number is None or str(number) != key or number < least:
                raise ArtifactError(f"{self.where} has the key {reprlib.repr(key)}, which is no whole number of at "
                                    f"least {least}")
            made.append((number, entry))
        return made

    def parts(self, count: int | None = None) -> list[Entry]:
        """Those of a list, which has ``count`` of them if that is given."""
        if not isinstance(self.value, list):
            raise self.wrong("list")
        if count is not None and len(self.value) != count:
            raise ArtifactError(f"{self.where} has {len(self.value)} entries, where there have to be {count}")
        return [Entry(v, f"{self.where}[{i}]") for i, v in enumerate(self.value)]

    def text(self) -> str:
        if not isinstance(self.value, str):
            raise self.wrong("text")
        return _short(self.value, self.where)

    def texts(self) -> tuple[str, ...]:
        return tuple(part.text() for part in self.parts())

    def one_of(self, words: Sequence[str]) -> str:
        if self.text() not in words:
            raise self.wrong(f"one of {', '.join(words)}")
        return self.value

    def whole(self, least: int = 0, most: int = LARGEST_NUMBER) -> int:
        """A whole number within bounds, both included."""
        if type(self.value) is not int or not least <= self.value <= most:
            raise self.wrong(f"whole number from {least} to {most}")
        return self.value

    def wholes(self, least: int = 0, most: int = LARGEST_NUMBER) -> tuple[int, ...]:
        return tuple(part.whole(least, most) for part in self.parts())

    def flag(self) -> bool:
        if not isinstance(self.value, bool):
            raise self.wrong("true or false")
        return self.value


def parse(data: bytes, where: str) -> Entry:
    """The JSON in ``data``, in which keys are there once and numbers are numbers.

    Raises:
        ArtifactError: it is none.
    """
    try:
        return Entry(json.loads(data, object_pairs_hook=_distinct, parse_constant=_no_number), where)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where} is damaged: {error}") from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {reprlib.repr(twice)} is there twice")
    return made


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


def _short(text: str, where: str) -> str:
    if len(text) > LONGEST_TEXT:
        raise ArtifactError(f"{where} has a text of {len(text)} characters, {reprlib.repr(text)}")
    return text
