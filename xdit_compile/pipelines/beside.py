"""What a pipeline keeps on a device beside the model that runs at each step, and what it calls its encoders for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from xdit_compile.frontend.offload_hooks import is_brought
from xdit_compile.ir.beside import Beside, EncoderBytes
from xdit_compile.ir.call_arguments import Call, named_leaves
from xdit_compile.ir.parameter_groups import groups_of, is_block
from xdit_compile.pipelines.components import Role, role_of
from xdit_compile.pipelines.memory import nbytes_of


class EncoderCalls:
    """Calls of encoders that are made while they are watched.

    Attributes:
        count: by the identity of the encoder.
        reached: encoders of which a part was called by others than the encoder, or of which that is not known. What
            ranks share out is only there while the encoder runs.
    """

    def __init__(self) -> None:
        self.count: Counter[int] = Counter()
        self.reached: set[int] = set()

    @contextmanager
    def watched(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Within, calls of those among ``modules`` that are encoders are counted."""
        handles: list[Any] = []
        try:
            for module in {id(m): m for m in modules}.values():
                if role_of(module) is Role.ENCODER:
                    self._watch(module, handles)
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self, encoder: nn.Module, handles: list[Any]) -> None:
        key, running = id(encoder), 0
        if "_orig_mod" in encoder._modules or getattr(encoder, "_compiled_call_impl", None) is not None:
            self.reached.add(key)  # compiled with hooks it would be another
            return

        def begins(*_: Any) -> None:
            nonlocal running
            running += 1
            self.count[key] += 1

        def ends(*_: Any) -> None:
            nonlocal running
            running -= 1

        def part(*_: Any) -> None:
            if not running:
                self.reached.add(key)

        handles += [encoder.register_forward_pre_hook(begins, prepend=True),
                    encoder.register_forward_hook(ends, always_call=True)]
        handles += [m.register_forward_pre_hook(part) for m in encoder.modules() if m is not encoder]


def beside(pipe: Any, call: Call, calls: EncoderCalls) -> Beside:
    """What ``pipe`` keeps on the device of ``call``, which it makes of its denoiser; but for what hooks of offloading
    bring there only while it runs."""
    named, _ = named_leaves(call.bound())
    place = next((t.device for t in named.values() if t.device.type != "cpu"), torch.device("cpu"))
    denoisers, encoders, others = 0, list[EncoderBytes](), 0
    for module in {id(m): m for m in pipe.components.values() if isinstance(m, nn.Module)}.values():
        held = [t for t in (*module.parameters(), *module.buffers()) if t.device == place or t.is_meta]
        if module is call.module or not held or is_brought(module):
            continue
        role = role_of(module)
        if role is Role.DENOISER:
            denoisers += nbytes_of(held)
        elif role is Role.ENCODER:
            encoders.append(_encoder(module, nbytes_of(held), calls))
        else:
            others += nbytes_of(held)
    return Beside(denoisers, tuple(encoders), others)


def _encoder(module: nn.Module, nbytes: int, calls: EncoderCalls) -> EncoderBytes:
    """One that is never called is never shared out (`shard_encoders.EncoderShares`)."""
    count = calls.count[id(module)]
    if not count or id(module) in calls.reached:
        return EncoderBytes(nbytes)
    groups = groups_of(module.named_parameters(remove_duplicate=False))
    blocks = [g.length * g.dtype.itemsize for g in groups if is_block(g.path)]
    outside = sum(g.length * g.dtype.itemsize for g in groups if not is_block(g.path))
    cut = sum(m.size * g.dtype.itemsize for g in groups for m in g.members)
    return EncoderBytes(nbytes, cut, outside + sum(sorted(blocks)[-2:]), len(groups) * count, count)
