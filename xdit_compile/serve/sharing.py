"""Calls that may be made as one: only of a kind that gave, tried once, the same bits as each by itself.

What is compared are floating-point numbers, before they become pictures, which would hide a difference in the last
bits. That all of them are equal for samples drawn at random means that sums are taken in the same order, whatever is
summed.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xdit_compile.pipelines.call_signature import CallSignature
from xdit_compile.serve.job import Unit
from xdit_compile.serve.results import samples_of

PROMPT, NEGATIVE = "prompt", "negative_prompt"


class Sharing:
    """What is known of kinds of calls.

    Calls are of a kind if all their arguments but the subject (the prompt, or what the call needs a list of) and the
    seed are equal, for one number of calls. Another number is another kind: how matrices are multiplied, and so the
    last bits, depends on how many rows they have.

    Args:
        most: calls that share one; 1 for none.
    """

    def __init__(self, signature: CallSignature, most: int) -> None:
        self._most = most if "generator" in signature.kinds else 1
        listed = [n for n in signature.needed if any(not isinstance(k, str) for k in signature.kinds[n])]
        of_prompts = any(not isinstance(k, str) for k in signature.kinds.get(PROMPT, ()))
        self._subject = PROMPT if of_prompts else listed[0] if listed else None
        self._known: dict[Any, bool] = {}
        self._taken = signature.kinds

    def next(self, waiting: deque[Unit]) -> list[Unit]:
        """Take the first that waits, and those behind it that may share its call."""
        first = waiting.popleft()
        found, key = [first], self._key(first)
        if self._most > 1 and key is not None and self._known.get((key, self._most), True):
            found += [unit for unit in waiting if self._key(unit) == key][: self._most - 1]
            for unit in found[1:]:
                waiting.remove(unit)
        return found

    def kind(self, units: Sequence[Unit]) -> Any:
        """What is known of one kind is kept under this."""
        return self._key(units[0]), len(units)

    def holds(self, kind: Any) -> bool:
        """Whether calls of this kind were found to be the same as one."""
        return self._known.get(kind, False)

    def open(self, units: Sequence[Unit]) -> bool:
        """Whether that is still to be found out, and these calls would tell. Texts of as many words would not: padded
        to the longest of a batch, others might be encoded otherwise than alone."""
        subjects = [unit.job.checked.arguments[self._subject] for unit in units] if self._subject else []
        texts = [len(one.split()) for one in subjects if isinstance(one, str)]
        return len(units) > 1 and self.kind(units) not in self._known and (not texts or len(set(texts)) > 1)

    def learn(self, kind: Any, same: bool) -> None:
        """What was found."""
        self._known[kind] = same

    def merged(self, units: Sequence[Unit]) -> dict[str, Any]:
        """The arguments of one call for all."""
        made = dict(units[0].job.checked.arguments)
        assert self._subject is not None
        subjects = [unit.job.checked.arguments[self._subject] for unit in units]
        made[self._subject] = [one[0] if isinstance(one, list) else one for one in subjects]
        if isinstance(made.get(NEGATIVE), str):
            made[NEGATIVE] = [made[NEGATIVE]] * len(units)
        return made

    def parted(self, answer: Any, count: int) -> list[Any] | None:
        """The answers to each, of that to all."""
        return samples_of(answer, count)

    @property
    def exact(self) -> dict[str, str]:
        """What asks for floating-point numbers in place of pictures."""
        return {"output_type": "np"} if "output_type" in self._taken else {}

    def same(self, singles: Sequence[Any], parts: Sequence[Any] | None) -> bool:
        """Whether answers are the same bits, and not of pictures."""
        return parts is not None and all(_equal(a, b) for a, b in zip(singles, parts, strict=True))

    def _key(self, unit: Unit) -> str | None:
        """What calls that may share one have in common; None for one that is made alone."""
        arguments = unit.job.checked.arguments
        subject = arguments.get(self._subject) if self._subject else None
        if not isinstance(subject, str) and not (isinstance(subject, list) and len(subject) == 1):
            return None
        others = {n: v for n, v in arguments.items() if n != self._subject}
        if any(n.startswith("num_") and n.endswith("_per_prompt") and v != 1 for n, v in others.items()):
            return None
        try:
            return json.dumps(others, sort_keys=True)
        except TypeError:  # pictures
            return None


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping):
        return isinstance(other, Mapping) and all(
            _equal(v, other.get(n)) for n, v in one.items() if v is not None)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return isinstance(one, np.ndarray) and isinstance(other, np.ndarray) and one.dtype.kind == "f" and (
        np.array_equal(one, other))
