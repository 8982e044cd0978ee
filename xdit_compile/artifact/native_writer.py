"""Functions of a program as packages of AOTInductor: machine code for one kind of device and one version of PyTorch."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import fx
from torch._C._distributed_c10d import _register_process_group, _unregister_process_group

from xdit_compile.artifact.graph_writer import encode
from xdit_compile.artifact.native_reader import strides_for
from xdit_compile.ir.layout import BATCH, SEQUENCE, TENSOR
from xdit_compile.ir.mesh import RING, SHARD, ULYSSES, axis_sizes, group_name, position_of
from xdit_compile.ir.program import Program, is_collective, output_args
from xdit_compile.runtime.compilation.graph_segments import outline_segments
from xdit_compile.runtime.compilation.inductor_backend import own_options
from xdit_compile.spec import ShardingSpec

aten = torch.ops.aten
WAIT = torch.ops._c10d_functional.wait_tensor.default


def all_in_functions(program: Program) -> Program:
    """``program`` with what its main function does between calls of blocks in functions of its own."""
    children = {name: module for name, module in program.functions() if name != "main"}
    functions = dict(children)

    def build(module: fx.GraphModule) -> fx.GraphModule:
        functions[f"run_{len(functions)}"] = module
        return module

    main = outline_segments(program.main, lambda _: False, build, children)
    for node in main.graph.nodes:
        if node.op == "call_module":
            node.meta["val"] = tuple(n.meta["val"] for n in output_args(functions[str(node.target)].graph))
        elif node.op == "call_function":
            node.meta["val"] = node.args[0].meta["val"][node.args[1]]
    return replace(program, main=main)


class AheadOfTimePackages:
    """Compiles each function once, whichever programs it is in.

    Args:
        add: writes a file and gives its name.
    """

    def __init__(self, add: Callable[[bytes, str], str]) -> None:
        self._add = add
        self._made: dict[bytes, str] = {}

    def of(self, module: fx.GraphModule, spec: ShardingSpec, rank: int) -> str:
        """The file with the package of ``module`` for this rank."""
        from torch._inductor import aoti_compile_and_package, list_mode_options  # as slow to import as PyTorch itself

        content = encode(module)
        if content not in self._made:
            with tempfile.TemporaryDirectory() as folder, _groups(spec, rank), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch's exporter uses what it deprecates itself
                path = str(Path(folder) / "package.pt2")
                inputs = tuple(_example(n.meta["val"]) for n in module.graph.find_nodes(op="placeholder"))
                exported = torch.export.export(fx.GraphModule({}, _unseen(module.graph)), inputs, strict=False)
                asked = {**list_mode_options(spec.compile_mode), **spec.options} if spec.backend == "inductor" else {}
                aoti_compile_and_package(
                    exported, package_path=path, inductor_configs={**own_options(), **asked})
                self._made[content] = self._add(Path(path).read_bytes(), "pt2")
        return self._made[content]


def _unseen(graph: fx.Graph) -> fx.Graph:
    """``graph`` with collectives that read and write views, which lie where the tensors themselves do.

    A compiled function keeps Python's lock (the GIL) while it waits (pytorch/pytorch issue 197516). A thread of gloo
    that drops a tensor which Python has seen, as an argument, a result or in an operator written in Python, needs
    that lock, and whoever starts or waits for the next collective needs the thread: a deadlock. Python never sees
    these views.
    """
    new, env = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        if is_collective(node) and node.target is not WAIT:
            sent, *rest = node.args
            view = new.call_function(aten.unsqueeze.default, (env[sent], -1))
            # What is sent and received is counted along the first dimension: the view's last one is carried along.
            env[node] = new.call_function(node.target, (view, *rest), node.kwargs)
            env[node] = new.call_function(aten.squeeze.dim, (env[node], -1))
        else:
            env[node] = new.node_copy(node, env.__getitem__)
    return new


def _example(like: torch.Tensor) -> torch.Tensor:
    device = torch.device("cpu") if like.device.type == "meta" else like.device
    return torch.empty_strided(like.shape, strides_for(like), dtype=like.dtype, device=device).zero_()


@contextmanager
def _groups(spec: ShardingSpec, rank: int) -> Iterator[None]:
    """Within: the logical names of groups mean something, whose size the compiler asks for. Nothing is sent."""
    sizes, position = axis_sizes(spec), position_of(rank, spec)
    stand_ins = {}
    for axis in (BATCH, SEQUENCE, TENSOR, ULYSSES, RING, SHARD):
        name = group_name(axis, sizes)
        if sizes[axis] > 1 and not _known(name):
            stand_ins[name] = dist.ProcessGroup(position[axis], sizes[axis])  # type: ignore[call-arg]
            _register_process_group(name, stand_ins[name])  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in stand_ins:
            _unregister_process_group(name)  # type: ignore[arg-type]


def _known(name: str) -> bool:
    try:
        torch._C._distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
    except RuntimeError:
        return False
    return True
