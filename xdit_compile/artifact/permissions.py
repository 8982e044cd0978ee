"""Which operators the graphs of artifacts may call, and what each may do: a list, made of what our own programs call.

``benchmarks/permissions.py`` makes it. A person has read what the kernels of each operator do with what they are given,
and has said of which kind it is. What a kind means is checked by `checks` and `graph_reader`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import torch

import xdit_compile.kernels.ops  # noqa: F401  (programs call its operators)
from xdit_compile.errors import ArtifactError

KINDS: Mapping[str, str] = {
    "element-wise": "one result, by broadcasting; shapes are all that kernels rely on, and they compare them",
    "view": "the first argument's values, or some of them, as a view or a copy",
    "several": "views, as many as sizes and numbers say: counted before they are made",
    "bits": "the bytes of the first argument as numbers of another type, as packed weights are read; but as no truth "
            "values, which kernels believe to be 0 or 1",
    "move": "values of tensors, moved or repeated; sizes follow from shapes and numbers",
    "factory": "a value made of numbers; its size is that of the numbers",
    "reduction": "sums, largest values and the like along dimensions",
    "product": "matrix products and norms; shapes are compared by their kernels",
    "window": "convolutions, pooling and resizing; may need memory for unfolded windows",
    "attention": "softmax(q k^T) v; some kernels believe shapes, so these are compared here",
    "index": "reads or writes a new tensor by indices; kernels compare each with the size, constants are compared here",
    "write": "writes into its first argument, which has to be what is kept from step to step",
    "arrival": "a copy of an input that goes on while other work is done, and the wait for it; nothing else may take "
               "what is on its way, which is compared here",
    "collective": "exchanges values in one of the artifact's own groups, whose sizes are compared here",
    "call": "stands for the call of a function",
}
"""What is known of the operators of each kind."""


@dataclass(frozen=True)
class Permission:
    """What an operator may do.

    Attributes:
        kind: one of ``KINDS``; writes: names of arguments that it writes into.
    """

    kind: str
    writes: tuple[str, ...]


@cache
def permissions() -> Mapping[str, Permission]:
    """By the operators' names, as in ``aten.add.Tensor``."""
    listed = json.loads((files(__package__) / "permissions.json").read_text())
    return {name: Permission(entry["kind"], tuple(entry["writes"])) for name, entry in listed.items()
            if entry["kind"]}


@cache
def operator_named(name: Any) -> tuple[torch._ops.OpOverload, Permission]:
    """The operator of this full name (``torch.ops.aten.add.Tensor``), and what it may do.

    Raises:
        ArtifactError: it is not on the list, or this PyTorch does not have it.
    """
    prefix, _, short = name.partition("torch.ops.") if isinstance(name, str) else ("", "", "")
    permission = None if prefix else permissions().get(short)
    if permission is None:
        raise ArtifactError(f"it calls {name!r}, which is not on the list of operators that artifacts may call")
    namespace, packet, overload = short.split(".")
    found = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload, None)
    if not isinstance(found, torch._ops.OpOverload):
        raise ArtifactError(f"it calls {name!r}, which PyTorch {torch.__version__} does not have")
    writes = tuple(a.name for a in found._schema.arguments if a.alias_info and a.alias_info.is_write)
    if writes != permission.writes:
        raise ArtifactError(f"it calls {name!r}, which writes into other arguments in PyTorch {torch.__version__} than "
                            "in the one that the list of operators was made with")
    return found, permission


def name_of(operator: torch._ops.OpOverload) -> str:
    """Its name on the list."""
    return f"{operator.namespace}.{operator._opname}.{operator._overloadname}"
