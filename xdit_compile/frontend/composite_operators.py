"""Composite operators are recorded as they are, where they neither write nor return views of their inputs.

``torch.export`` does this by 21 Python kernels for each of 513 operators, which take 50 ms to put in place. They are
the same each time, so they are made once, and exchanged from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch._subclasses.fake_impls import op_implementations_dict
from torch.export.exported_program import (
    _override_composite_implicit_decomp,
    _split_decomp_table_to_cia_and_python_decomp,
)


@contextmanager
def composites_kept() -> Iterator[None]:
    """Within, they are."""
    kernels, rules = _recording()
    before = {op: dict(op.py_kernels) for op in kernels}
    added = rules.keys() - op_implementations_dict.keys()
    _put(kernels)
    op_implementations_dict.update({op: rules[op] for op in added})
    try:
        yield
    finally:
        _put(before)
        for op in added:
            del op_implementations_dict[op]


def _put(kernels: dict[Any, dict[Any, Callable[..., Any]]]) -> None:
    for op, own in kernels.items():
        op.py_kernels.clear()
        op.py_kernels.update(own)
        op._dispatch_cache.clear()


@cache
def _recording() -> tuple[dict[Any, dict[Any, Callable[..., Any]]], dict[Any, Callable[..., Any]]]:
    """The kernels of composite operators that record them, and what fake tensors do with these operators."""
    composite = _split_decomp_table_to_cia_and_python_decomp({})[0]
    known = dict(op_implementations_dict)
    with _override_composite_implicit_decomp(composite):
        made = {op: dict(op.py_kernels) for op in composite}, dict(op_implementations_dict)
    op_implementations_dict.update(known)  # PyTorch forgets those that were there before
    return made
