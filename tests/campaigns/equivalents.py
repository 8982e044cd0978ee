"""Changes that change nothing, and why: no test can tell them, so ``mutants.py`` does not try them.

By file, the lines before and after, without indentation: they stay known while other lines come and go.
"""

from __future__ import annotations

EQUIVALENTS: dict[tuple[str, str, str], str] = {
    ("frontend/reads.py", "on = False", "on = 0"): "it is asked for its truth alone",
    ("frontend/reads.py",
     '_SHIFT = {_OPS["LOAD_GLOBAL"]: sys.version_info >= (3, 11), _OPS["LOAD_ATTR"]: sys.version_info >= (3, 12)}',
     '_SHIFT = {_OPS["LOAD_GLOBAL"]: sys.version_info >= (3, 11), _OPS["LOAD_ATTR"]: sys.version_info >= (3, 13)}'):
        "the same on Python 3.11, where mutants are tried, and on 3.13, where tests have run too",
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
    ("passes/rules/resize.py",
     "pads[at : at + 2] = before * (place == 0), after * (place == s.sizes[segment.axis] - 1)",
     "pads[at : at + 2] = before * (place == 0), after * (place >= s.sizes[segment.axis] - 1)"):
        "no place is beyond the last",
    ("passes/spelling.py",
     "if not own or mean is not None or variance is not None:",
     "if not own or mean is not None and variance is not None:"):
        "an operator is given both moments or none",
    ("frontend/reads.py",
     "_seen: dict[int, CodeType] = field(default_factory=dict, repr=False)",
     "_seen: dict[int, CodeType] = field(default_factory=dict, repr=True)"):
        "what a dataclass shows of itself, which nobody reads",
    ("frontend/reads.py",
     "made: list[weakref.ref[Tensor]] = field(default_factory=list, repr=False)",
     "made: list[weakref.ref[Tensor]] = field(default_factory=list, repr=True)"):
        "what a dataclass shows of itself, which nobody reads",
    ("frontend/reads.py",
     "written: list[tuple[Tensor, str]] = field(default_factory=list, repr=False)",
     "written: list[tuple[Tensor, str]] = field(default_factory=list, repr=True)"):
        "what a dataclass shows of itself, which nobody reads",
    ("passes/canonicalize.py",
     "source = node.args[0]",
     "source = node.args[ -1]"):
        "whatever is asked has one argument",
    ("passes/attention_collectives.py",
     "batch = _val(tensors[0]).shape[0]",
     "batch = _val(tensors[ -1]).shape[0]"):
        "all of these tensors are of one batch",
    ("passes/attention_collectives.py",
     "if counts[self.r] < most:",
     "if counts[self.r] != most:"):
        "none is above the largest",
    ("passes/attention_collectives.py",
     "zip(parts, widths[0], strict=True)]",
     "zip(parts, widths[ 1], strict=True)]"):
        "heads are cut evenly here: of each rank there are as many",
    ("passes/expand_einsum.py",
     'free = [c for c in string.printable if c.isalnum() is False and c not in ".,->" and not c.isspace()]',
     'free = [c for c in string.printable if c.isalnum() is False and c not in ".,->" or not c.isspace()]'):
        "any signs will do that are no letters: they never reach PyTorch",
    ("passes/expand_einsum.py",
     'out = sides[1] if len(sides) > 1 else "..." * bool(dotted) + "".join(sorted(c for c, n in counts.items() '
     "if n == 1))",
     'out = sides[1] if len(sides) > 1 else "..." * bool(dotted) + "".join(sorted(c for c, n in counts.items() '
     "if n <= 1))"):
        "what was counted was there",
    ("passes/expand_einsum.py",
     'free = [c for c in string.printable if c.isalnum() is False and c not in ".,->" and not c.isspace()]',
     'free = [c for c in string.printable if c.isalnum() == False and c not in ".,->" and not c.isspace()]'):
        "isalnum answers True or False",
    ("frontend/state_watch.py",
     "return get if len(names) > 1 else lambda d: (get(d),)",
     "return get if len(names) != 1 else lambda d: (get(d),)"):
        "none is empty, for which itemgetter would raise before",
    ("frontend/operator_log.py",
     "if func in _WHAT_IT_IS and self._of_block(args[0]):",
     "if func in _WHAT_IT_IS and self._of_block(args[ -1]):"):
        "the getter of an attribute is given the tensor alone",
    ("frontend/operator_log.py",
     "held = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]",
     "held = [*module.named_parameters(remove_duplicate=True), *module.named_buffers(remove_duplicate=False)]"):
        "where one tensor has several names, the first of them is kept either way",
    ("frontend/state_watch.py",
     "return looks, bytes(raw) if flat.nbytes <= 64 else hashlib.sha1(raw, usedforsecurity=False).digest()",
     "return looks, bytes(raw) if not flat.nbytes <= 64 else hashlib.sha1(raw, usedforsecurity=False).digest()"):
        "small values are told apart by their bytes or by their digest",
    ("passes/interpreter.py",
     "outputs = [env[n] for n in node.args[0]]  # type: ignore[misc]",
     "outputs = [env[n] for n in node.args[ -1]]  # type: ignore[misc]"):
        "an output has one argument",
    ("passes/overlap_communication.py",
     "late = self._late(n for n in needed if n is not goal)",
     "late = self._late(n for n in needed if n != goal)"):
        "nodes are equal where they are the same",
    ("artifact/files.py",
     '(self.folder / MANIFEST).write_text(json.dumps(whole, indent=1, allow_nan=False) + "\\n")',
     '(self.folder / MANIFEST).write_text(json.dumps(whole, indent= 2, allow_nan=False) + "\\n")'):
        "JSON means the same, however it is indented",
    ("passes/rules/convolution.py",
     "x, space, padding, finish = _slid(s, s.filled(x, (0, 1)), kernel, stride, padding)",
     "x, space, padding, finish = _slid(s, s.filled(x, ( 1, 1)), kernel, stride, padding)"):
        "PyTorch pools a batch of none",
    ("passes/batch_axis.py",
     "flops, best = min(((estimate(o).flops, i) for i, o in enumerate(options)), default=(0, -1))",
     "flops, best = min(((estimate(o).flops, i) for i, o in enumerate(options)), default=( -1, -1))"):
        "where there is no option, nobody asks what it costs",
    ("runtime/execution/loop_invariant_cache.py",
     "flat = tensor[torch.unravel_index(torch.arange(0, count, count // PROBE), tensor.shape)]",
     "flat = tensor[torch.unravel_index(torch.arange( 1, count, count // PROBE), tensor.shape)]"):
        "another sample of the elements is as good",
    ("passes/interpreter.py",
     'if self.sizes[TENSOR] > 1 and "parted" not in self.interpreter.program.facts and id(value) not in self._inputs:',
     'if self.sizes[TENSOR] > 0 and "parted" not in self.interpreter.program.facts and id(value) not in self._inputs:'):
        "a single tensor rank cuts nothing",
    ("passes/spelling.py",
     "n == 1 or a == b for n, a, b in zip(size, stride, dense.stride(), strict=True)):",
     "n <= 1 or a == b for n, a, b in zip(size, stride, dense.stride(), strict=True)):"):
        "of a tensor with an empty dimension nothing is looked up",
    ("frontend/operator_log.py",
     "if len(self.entries) > number and back is not None and not self.recorded:",
     "if len(self.entries) > number and back is not None or not self.recorded:"):
        "under a number stands what its last call says, which is the one that is entered",
    ("passes/rules/reduction.py",
     "within = total([part(rank, 1) for rank in range(ranks)], [1.0 / max(left, 1)] * ranks)",
     "within = total([part(rank, 1) for rank in range(ranks)], [1.0 / max(left, 0)] * ranks)"):
        "no group of a group norm is empty",
    ("passes/rules/convolution.py",
     "if _of_tensor_ranks(s, inside) and groups == 1:",
     "if _of_tensor_ranks(s, inside) and groups <= 1:"):
        "there is at least one group",
    ("passes/rules/contraction.py",
     "weight = s.whole(weight, 0) if weight.dims[0].sharded else weight",
     "weight = s.whole(weight, 0) if weight.dims[ 1].sharded else weight"):
        "what is whole stays so, and where a sum is pending the other dimension is cut",
    ("passes/attention_collectives.py",
     "same = len({_val(t).shape[3] for t in tensors}) == 1",
     "same = len({_val(t).shape[3] for t in tensors}) <= 1"):
        "there is at least one tensor",
    ("frontend/reads.py",
     "self.written.append((args[0], line_of(sys._getframe(1))))",
     "self.written.append((args[0], line_of(sys._getframe( 0))))"):
        "frames of our own are passed over",
    ("frontend/results.py",
     "return node.args[1] if isinstance(node.args[1], fx.Node) else None",
     "return node.args[1] if isinstance(node.args[ 0], fx.Node) else None"):
        "what is copied from is a tensor, as what is copied to",
    ("frontend/reads.py",
     "looks: Looks = field(default_factory=Looks, repr=False)",
     "looks: Looks = field(default_factory=Looks, repr=True)"):
        "what a dataclass shows of itself, which nobody reads",
    ("passes/rules/convolution.py",
     "if x.ndim != n + 2:",
     "if x.ndim < n + 2:"):
        "PyTorch takes no more dimensions",
    ("passes/fuse_attention.py",
     'elif scores.kwargs.get("beta", 1) != 0:',
     'elif scores.kwargs.get("beta", 2) != 0:'):
        "where it is not given it is not zero",
    ("passes/interpreter.py",
     "holder = None",
     "holder = 0"):
        "where no program is made nobody looks at its nodes",
}
