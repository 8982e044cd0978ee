"""A whole forward as one CUDA graph, its collectives included, for ``mode=reduce-overhead`` and ``max-autotune``.

Graphs of regions, as PyTorch's compiler would make them, give their results in memory that the next replay of the same
region overwrites: blocks that share a function would overwrite each other's. Here one graph holds the whole program,
what it is given is copied to where the graph reads it, and results are copied out: the caller owns them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from xdit_compile.errors import XditError
from xdit_compile.runtime.compilation.graph_segments import Function

WARM_UP = 2
"""Calls that run as they are before a graph is made: functions are compiled, communicators made and kernels chosen."""


class Recording(Protocol):
    """Work that was recorded, and the tensors in which each replay leaves its results."""

    @property
    def results(self) -> Sequence[torch.Tensor]: ...

    def replay(self) -> None: ...


class CudaRecording:
    """What a function does on this device's current stream, recorded while it runs.

    Raises:
        XditError: something it does cannot be part of a CUDA graph.
    """

    def __init__(self, function: Function, tensors: Sequence[torch.Tensor]) -> None:
        self._graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        try:
            # Other threads, such as those that watch collectives, may go on to use the device.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self.results = tuple(function(*tensors))
        except RuntimeError as error:
            raise XditError(f"this forward cannot be a CUDA graph: {error}. Say mode=max-autotune-no-cudagraphs, or "
                            "leave mode out") from error

    def replay(self) -> None:
        self._graph.replay()


class GraphedFunction:
    """A function that is replayed once it was called a few times.

    Args:
        fixed: of each input, whether it stays where it is from call to call, as weights do: it is read there, and
            where it has moved, all is recorded again. All others are copied.
        record: how to record.
    """

    def __init__(self, function: Function, fixed: Sequence[bool],
                 record: Callable[[Function, Sequence[torch.Tensor]], Recording] = CudaRecording) -> None:
        self._function, self._record = function, record
        self._fixed = [i for i, stays in enumerate(fixed) if stays]
        self._copied = [i for i, stays in enumerate(fixed) if not stays]
        self._calls = 0
        self._places: list[int] = []
        self._inputs: list[torch.Tensor] = []
        self._recording: Recording | None = None

    def __call__(self, *tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        if self._calls < WARM_UP:
            self._calls += 1
            return self._function(*tensors)
        places = [tensors[i].data_ptr() for i in self._fixed]
        if self._recording is None or places != self._places:
            # Strides are part of what was compiled.
            self._inputs = [t if i in self._fixed else torch.empty_strided(
                t.shape, t.stride(), dtype=t.dtype, device=t.device) for i, t in enumerate(tensors)]
            self._fill(tensors)
            self._recording, self._places = self._record(self._function, self._inputs), places
        self._fill(tensors)
        self._recording.replay()
        return tuple(t.clone() for t in self._recording.results)

    def _fill(self, tensors: Sequence[torch.Tensor]) -> None:
        for i in self._copied:
            self._inputs[i].copy_(tensors[i])


def check_groups(groups: Sequence[dist.ProcessGroup]) -> None:
    """Refuse groups whose collectives run on the host.

    Raises:
        XditError: naming the backend.
    """
    for group in groups:
        if (backend := dist.get_backend(group)) != "nccl":
            raise XditError(f"a CUDA graph cannot hold collectives of {backend}, which run on the host: use nccl with "
                            "a GPU for each rank, or mode=max-autotune-no-cudagraphs")
