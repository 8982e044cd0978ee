"""A kernel that does not keep its word is refused at its first use, with what it does instead."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from xdit_compile.kernels import attention_lse, torch_kernel
from xdit_compile.kernels.base import Kernel, KernelUnavailable, like_rows
from xdit_compile.kernels.probe import broken_promise
from xdit_compile.kernels.registry import KERNELS

Attention = tuple[Tensor, Tensor]


def right(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: Any) -> Attention:
    out, lse = torch_kernel.definition(q, k, v, mask, scale)
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse


def base_two(*given: Any) -> Attention:
    out, lse = right(*given)
    return out, lse / math.log(2)


def by_tokens(*given: Any) -> Attention:
    out, lse = right(*given)
    return out, lse.transpose(1, 2).contiguous()


def padded(*given: Any) -> Attention:
    out, lse = right(*given)
    return out, torch.nn.functional.pad(lse, (0, 31))


def no_sums(*given: Any) -> Attention:
    out, lse = right(*given)
    return out, torch.zeros_like(lse)


def half_sums(*given: Any) -> Attention:
    out, lse = right(*given)
    return out, lse.half()


def scores_alone(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: Any) -> Attention:
    return right(q, k, v, mask, scale)[0], right(q, k, v, mask, None)[1]


def no_scale(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: Any) -> Attention:
    return right(q, k, v, mask, None)


def no_mask(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: Any) -> Attention:
    return right(q, k, v, None, scale)


def heads_in_turns(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: Any) -> Attention:
    group = q.shape[1] // k.shape[1]
    return right(q, k.repeat(1, group, 1, 1), v.repeat(1, group, 1, 1), mask, scale)


def causal(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: Any) -> Attention:
    return right(q, k, v, torch.ones(q.shape[2], k.shape[2]).tril() > 0, scale)


def by_heads(*given: Any) -> Attention:
    return torch_kernel.definition(*given)


def raises(*given: Any) -> Attention:
    raise AttributeError("the package has changed")


def rough(*given: Any) -> Attention:
    out, lse = right(*given)
    return out * 1.04, lse


WRONG: dict[str, tuple[Any, str]] = {
    "base two": (base_two, "to base 2, not natural"),
    "by tokens": (by_tokens, r"log-sum-exp has the shape \[2, 33, 4\], not \[2, 4, 33\]"),
    "padded": (padded, r"log-sum-exp has the shape \[2, 4, 64\]"),
    "no sums": (no_sums, "log-sum-exp is zero"),
    "half sums": (half_sums, "log-sum-exp is of torch.float16, not torch.float32"),
    "sums of other scores": (scores_alone, "not that of the scores"),
    "no scale": (no_scale, "does not heed the scale"),
    "heads in turns": (heads_in_turns, "fewer key heads than query heads it reads them in another order"),
    "causal": (causal, "its results differ by .* from the definition"),
    "by heads": (by_heads, "lies in memory with the strides"),
    "raises": (raises, "on a small example it fails: AttributeError: the package has changed"),
    "rough": (rough, "differ by"),
}


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def put(forward: Any, **options: Any) -> None:
        made = Kernel("other", lambda: None, lambda *_: None, forward, like_rows)
        monkeypatch.setitem(KERNELS, "other", replace(made, **options))

    yield put
    broken_promise.cache_clear()


def attend(kv_heads: int = 2, mask: Tensor | None = None) -> Tensor:
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, kv_heads, 7, 8)
    return attention_lse(q, k, k, mask, None, "other")[0]


@pytest.mark.parametrize("name", WRONG)
def test_refused(named: Any, name: str) -> None:
    forward, says = WRONG[name]
    named(forward)
    with pytest.raises(KernelUnavailable, match=f"'other'.*{says}"):
        attend()


def test_a_mask_that_is_not_heeded(named: Any) -> None:
    named(no_mask)
    attend()
    with pytest.raises(KernelUnavailable, match="does not heed the mask"):
        attend(mask=torch.rand(5, 7) < 0.5)


def test_used_when_right_and_asked_once(named: Any) -> None:
    calls = []
    named(lambda *given: calls.append(1) or right(*given))
    attend()
    probes = len(calls)
    attend()
    assert len(calls) == probes + 1
    attend(kv_heads=4)  # another kind of problem
    assert len(calls) > probes + 2


def test_what_says_that_it_is_approximate_may_be(named: Any) -> None:
    named(rough, approximate=True)
    attend()
    named(base_two, approximate=True)
    with pytest.raises(KernelUnavailable, match="base 2"):
        attend()


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]), st.integers(1, 5),
       st.integers(1, 5), st.booleans(), st.booleans())
def test_pytorch_keeps_its_word(dtype: torch.dtype, width: int, value: int, grouped: bool, masked: bool) -> None:
    assert broken_promise(KERNELS["torch"], torch.device("cpu"), dtype, 8 * width, 8 * value, grouped, masked) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_of_this_machine(name: str) -> None:
    kernel, dtype = KERNELS[name], torch.bfloat16
    if reason := kernel.available() or kernel.supports("cuda", dtype, 64, 64, False):
        pytest.skip(reason)
    for grouped in (False, True):
        assert broken_promise(kernel, torch.device("cuda", 0), dtype, 64, 64, grouped, False) is None
