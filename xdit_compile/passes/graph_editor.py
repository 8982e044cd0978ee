"""Adding nodes to a copy of a global graph, with what they return and where they come from."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode


class Editor:
    """Inserts nodes before ``node``, on whose behalf they are made."""

    def __init__(self, node: fx.Node) -> None:
        self.node, self.graph = node, node.graph

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        with self.graph.inserting_before(self.node):
            made = self.graph.call_function(target, args, kwargs)
        made.meta = {k: v for k, v in self.node.meta.items() if k in ("nn_module_stack", "stack_trace")}
        args, kwargs = fx.map_arg((args, kwargs), val)
        # What makes a tensor of nothing is told by no argument that it is to be a fake one.
        mode = detect_fake_mode((self.node.meta["val"], args, kwargs))
        with mode or nullcontext(), torch.no_grad():
            made.meta["val"] = target(*args, **kwargs)
        return made

    def replace_with(self, other: fx.Node) -> None:
        self.node.replace_all_uses_with(other)


def val(node: fx.Node) -> torch.Tensor:
    """The fake tensor that ``node`` returns."""
    return node.meta["val"]
