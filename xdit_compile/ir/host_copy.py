"""Copies from the host's memory that go on while other work is done: an operator that starts one, and one that waits.

`xdit_compile::fetch(host, device) -> Tensor` returns memory on ``device`` at once, which is filled meanwhile: on a GPU
by a stream of its own, on the CPU (where a device's memory is the host's too) by a thread.
`xdit_compile::fetched(tensor)` returns the same memory once all of it has come; nobody may look into it before.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import torch
from torch import Tensor, fx

_waiting: dict[int, Callable[[], object]] = {}
"""By the address of the memory: what waits for its copy."""
_lock = threading.Lock()


@cache
def _thread() -> ThreadPoolExecutor:
    # One: copies arrive in the order in which they were asked for.
    return ThreadPoolExecutor(1, "xdit_compile.fetch")


os.register_at_fork(after_in_child=_thread.cache_clear)  # a child has none of its parent's threads


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _fetch(host: Tensor, device: torch.device) -> Tensor:
    made = torch.empty_like(host, device=device)
    if made.is_cuda:
        stream = _stream(made.device)
        # The memory may have been another value's, which work that is under way still reads.
        stream.wait_stream(torch.cuda.current_stream(made.device))
        with torch.cuda.stream(stream):
            made.copy_(host, non_blocking=True)
            event = stream.record_event()
        wait: Callable[[], object] = partial(_wait_on_stream, made.device, event)
    else:
        wait = _thread().submit(_copied, made, host).result
    with _lock:
        _waiting[made.data_ptr()] = wait
    return made


def _wait_on_stream(device: torch.device, event: torch.cuda.Event) -> None:
    torch.cuda.current_stream(device).wait_event(event)


def _copied(made: Tensor, host: Tensor) -> None:
    with torch.no_grad():
        made.copy_(host)


def _fetched(tensor: Tensor) -> Tensor:
    with _lock:
        wait = _waiting.pop(tensor.data_ptr(), None)
    if wait is not None:
        wait()
    return tensor


def _fake_fetch(host: Tensor, device: torch.device) -> Tensor:
    return torch.empty_like(host, device=device)


_library = torch.library.Library("xdit_compile", "FRAGMENT")
_library.define("fetch(Tensor host, Device device) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define("fetched(Tensor(a) tensor) -> Tensor(a)", tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("fetch", _fetch, "CompositeExplicitAutograd")
_library.impl("fetched", _fetched, "CompositeExplicitAutograd")
torch.library.register_fake("xdit_compile::fetch", _fake_fetch, lib=_library)
torch.library.register_fake("xdit_compile::fetched", lambda tensor: tensor.view(tensor.shape), lib=_library)

fetch = torch.ops.xdit_compile.fetch.default
fetched = torch.ops.xdit_compile.fetched.default


def is_fetch(node: fx.Node) -> bool:
    """Whether a node starts such a copy."""
    return node.target is fetch
