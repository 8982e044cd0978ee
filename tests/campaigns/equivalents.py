"""Changes that change nothing, and why: no test can tell them, so ``mutants.py`` does not try them.

By file, the lines before and after, without indentation: they stay known while other lines come and go.
"""

from __future__ import annotations

EQUIVALENTS: dict[tuple[str, str, str], str] = {
    ("ir/layout.py",
     "return (0, *ends.values()) if order == sorted(order) and list(ends) == list(range(patches)) else None",
     "return (0, *ends.values()) if order <= sorted(order) and list(ends) == list(range(patches)) else None"):
        "no order of a list comes before the sorted one",
    ("passes/spelling.py",
     "order = sorted(range(held.ndim), key=lambda i: (-held.stride(i), -held.shape[i], i))",
     "order = sorted(range(held.ndim), key=lambda i: (-held.stride(i), ~held.shape[i], i))"):
        "~n is -n - 1: the same order",
    ("passes/rules/resize.py",
     'if most and (len(x.dims[i].segments) > 1 or mode == "circular" or min(pads) < 0):',
     'if most and (len(x.dims[i].segments) > 1 or mode <= "circular" or min(pads) < 0):'):
        "no other mode that this operator is called with sorts before it",
}
