"""Composite operators that have no rule, taken apart into those that they are made of, as PyTorch does to run them.

PyTorch writes some thousand operators in terms of others (``CompositeImplicitAutograd``). Capture keeps many whole, of
which few need to be: linear, attention, convolutions and norms have rules. What is left here costs nothing to take
apart, since eager PyTorch does so at each call, and rules are needed for what remains alone.
"""

from __future__ import annotations

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from xdit_compile.ir.program import drop_unused
from xdit_compile.passes.graph_editor import Editor
from xdit_compile.passes.rules import find_rule

COMPOSITE = "CompositeImplicitAutograd"


def expand_composites(graph: fx.Graph, kept: frozenset = frozenset()) -> None:
    """Rewrite every composite operator that has no rule and is not among ``kept``, which later passes rewrite."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target not in kept and _composite(node.target):
            inside = _parts(node)
            if inside is not None:
                _replace(node, inside)
    drop_unused(graph)


def _composite(target: object) -> bool:
    return isinstance(target, torch._ops.OpOverload) and find_rule(target) is None and (
        torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), COMPOSITE))


def _parts(node: fx.Node) -> fx.Graph | None:
    """The operators that ``node`` is made of, as a graph of its tensors; None where they depend on values."""
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, fx.Node)]
    examples = [leaves[i].meta["val"] for i in places]

    def run(*tensors: torch.Tensor) -> object:
        given = list(leaves)
        above = torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize))
        with above, FunctionalTensorMode(export=True):
            for i, tensor in zip(places, tensors, strict=True):
                given[i] = FunctionalTensor.to_functional(tensor)
            args, kwargs = pytree.tree_unflatten(given, spec)
            return pytree.tree_map_only(FunctionalTensor, _settled, node.target(*args, **kwargs))

    mode = detect_fake_mode(examples)
    if mode is None:
        return None
    try:
        with mode, torch.no_grad():
            graph = make_fx(run)(*examples).graph
    except (NotImplementedError, RuntimeError, AssertionError):  # steps depend on values, or have no functional form
        return None
    graph.eliminate_dead_code()
    whole = any(n.target is node.target for n in graph.nodes) or graph.find_nodes(op="get_attr")
    return None if whole else graph


def _settled(tensor: FunctionalTensor) -> torch.Tensor:
    """The value that a functional tensor has by now."""
    torch._sync(tensor)
    return torch._from_functional_tensor(tensor.elem)


def _replace(node: fx.Node, inside: fx.Graph) -> None:
    edit = Editor(node)
    given = [leaf for leaf in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(leaf, fx.Node)]
    env = dict(zip(inside.find_nodes(op="placeholder"), given, strict=True))
    for part in inside.nodes:
        if part.op == "call_function":
            args, kwargs = fx.map_arg((part.args, part.kwargs), env.__getitem__)
            env[part] = edit.call(part.target, *args, **kwargs)
    made = inside.output_node().args[0]
    if isinstance(made, fx.Node):
        edit.replace_with(env[made])
        return
    for item in list(node.users):  # of several results, each is taken by its number
        item.replace_all_uses_with(env[made[item.args[1]]])
