"""What a call is made with, as short texts that ranks can compare."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from xdit_compile.ir.containers import CONSTANTS
from xdit_compile.runtime.control.tensor_digest import digest


def call_fingerprint(arguments: Mapping[str, Any]) -> dict[str, str]:
    """One text for each leaf of the arguments, and one for the global random state unless a generator is among
    them: where no generator is given, noise is drawn from that."""
    found = {}
    for path, leaf in pytree.tree_flatten_with_path(dict(arguments))[0]:
        found[pytree.keystr(path[:1]).strip("[]'") + pytree.keystr(path[1:])] = _text(leaf)
    if not any(isinstance(leaf, torch.Generator) for leaf in pytree.tree_leaves(dict(arguments))):
        found["random state (seed all ranks alike: torch.manual_seed, or a generator)"] = digest(torch.get_rng_state())
    return found


def _text(leaf: Any) -> str:
    if isinstance(leaf, CONSTANTS):
        return repr(leaf)
    if isinstance(leaf, torch.Tensor):
        return digest(leaf)
    if isinstance(leaf, torch.Generator):
        return f"generator {digest(leaf.get_state())}"
    if callable(content := getattr(leaf, "tobytes", None)):  # arrays, pictures
        return f"{type(leaf).__name__} {hashlib.blake2b(content(), digest_size=8).hexdigest()}"
    return getattr(leaf, "__qualname__", type(leaf).__name__)
