"""What a part is given: where it runs, how much time is left, and where its figures go as soon as they are there."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Figures = dict[str, Any]


@dataclass
class Run:
    """One part of the campaign.

    Attributes:
        device: "cuda" or "cpu"; tiny: whether this is a rehearsal; own: whether diffusers is left alone.
        deadline: by ``time.time()``; what will not be done by then is left out.
        tell: called with the name and value of each figure.
        begin: called with what is done next.
    """

    device: str
    tiny: bool
    own: bool
    deadline: float
    tell: Callable[[str, Any], None] = lambda name, value: None
    begin: Callable[[str], None] = lambda text: None
    figures: Figures = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """That of what is timed: what people run on a GPU, and what a CPU is good at."""
        return torch.bfloat16 if self.on_gpu else torch.float32

    @property
    def backend(self) -> str:
        """Of what is timed. A rehearsal has no time to compile everything."""
        return "eager" if self.tiny else "inductor"

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.time()

    def put(self, name: str, value: Any) -> None:
        """A figure of this part. What was put is kept though the part may fail later, or its process end."""
        self.figures[name] = value
        self.tell(name, value)

    def attempt(self, name: str, work: Callable[[], Any], seconds: float = 0.0) -> Any:
        """Put what ``work`` returns, or its error; None then, and where there are no such ``seconds`` left."""
        if self.left < seconds:
            self.put(name, {"skipped": f"about {seconds:.0f} s are needed, {max(self.left, 0):.0f} s are left"})
            return None
        self.begin(name)
        try:
            value = work()
        except Exception as error:
            self.put(name, failure(error))
            self.synchronize()  # raises where the device cannot be used again
            return None
        self.put(name, value)
        return value

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def free(self) -> None:
        """Give back what no tensor needs."""
        import gc

        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()


def failure(error: BaseException) -> Figures:
    """An error for the report: its kind and text, and the end of the traceback."""
    lines = traceback.format_exception(error)
    return {"error": f"{type(error).__name__}: {error}"[:2000], "traceback": "".join(lines)[-3000:]}


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over largest value; infinite where something is no number."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} in the place of {tuple(expected.shape)}"
    a, b = actual.detach().double().cpu(), expected.detach().double().cpu()
    found = ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()
    return found if found == found else float("inf")
