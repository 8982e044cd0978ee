"""What ranks send each other: listed types come back, anything else is an error, and nothing is unpickled."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from hypothesis import given, settings
from hypothesis import strategies as st

import xdit_compile
from xdit_compile.errors import XditError
from xdit_compile.runtime.control.message_codec import decoded, encoded

LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary(),
                   st.sampled_from([torch.float32, torch.bfloat16, torch.device("cpu"), torch.Size([2, 3])]))
KEYS = st.one_of(st.text(), st.integers(), st.tuples(st.integers(), st.text()))
VALUES = st.recursive(LEAVES, lambda inner: st.one_of(
    st.lists(inner), st.lists(inner).map(tuple), st.dictionaries(KEYS, inner)))


def there_and_back(value: Any) -> Any:
    text, tensors = encoded(value)
    queue = iter(tensors)

    def given_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        tensor = next(queue)
        assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)
        return tensor

    return decoded(text, given_tensor)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)) and type(a) is type(b):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and type(a) is type(b):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and bool(a == b)


@settings(max_examples=150, deadline=None)
@given(VALUES)
def test_values_come_back(value: Any) -> None:
    assert same(there_and_back(value), value)


def test_tensors_and_outputs_come_back() -> None:
    x = torch.randn(2, 3)
    back = there_and_back(({"out": Transformer2DModelOutput(sample=x)}, float("inf")))
    assert type(back[0]["out"]) is Transformer2DModelOutput and back[0]["out"].sample is x and back[1] == float("inf")


@dataclass
class Other:
    x: int


@pytest.mark.parametrize("value", [Other(1), {1, 2}, object(), print, 1j, Path("x"), [Other(1)]])
def test_anything_else_is_refused_by_name(value: Any) -> None:
    with pytest.raises(XditError, match=r"cannot be sent to other ranks; what can is None, bool"):
        encoded(value)


@pytest.mark.parametrize("held", [
    {"output": "os:system", "fields": [["command", "true"]]}, {"output": "test_codec:Other", "fields": [["x", 1]]},
    {"eval": "1"}, {"dtype": "load"}, {}, {"tuple": 3}, {"bytes": 5}, {"tensor": "x"}, {"dict": [[1]]}])
def test_messages_of_strangers_make_nothing(held: Any) -> None:
    with pytest.raises(XditError):
        decoded(json.dumps(held).encode(), lambda shape, dtype: torch.empty(shape, dtype=dtype))


def test_no_rank_unpickles_what_another_sends() -> None:
    package = Path(xdit_compile.__file__).parent
    calls = ("all_gather_object", "broadcast_object_list", "send_object_list", "gather_object", "scatter_object_list")
    found = [(p.name, word) for p in package.rglob("*.py") for word in calls if word in p.read_text()]
    assert found == []
    assert [p.name for p in package.rglob("*.py") if "import pickle" in p.read_text()] == ["launch.py"]
