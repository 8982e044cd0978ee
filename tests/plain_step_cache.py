"""Step caches on one device, by hand: the blocks of a plain model are called or not. Nothing of the package is used.

As ParaAttention and diffusers have it (``FirstBlockCache``): what the first block adds to the sample's tokens is
compared with what it added in the last step that computed all blocks. If it has changed little, no other block is
called, and what they added then is added now.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Blocks:
    """The blocks of a model, and where they have the tokens of the sample.

    Args:
        lists: the attributes that hold blocks, in the order in which they run.
        sample, text: which of the results of a block are the sample's tokens, and the text's; None for a block that
            returns one tensor.
        arguments: the names of both among a block's arguments, in the order in which they may be given.
    """

    lists: tuple[str, ...]
    sample: int | None = None
    text: int | None = None
    arguments: tuple[str, str] = ("hidden_states", "encoder_hidden_states")

    def of(self, model: nn.Module) -> list[nn.Module]:
        return [block for name in self.lists for block in model.get_submodule(name)]

    def given(self, which: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        name = self.arguments[which]
        return kwargs[name] if name in kwargs else args[which]

    def picked(self, results: Any) -> Tensor:
        return results if self.sample is None else results[self.sample]

    def put(self, results: Any, tokens: Tensor) -> Any:
        if self.sample is None:
            return tokens
        made = list(results)
        made[self.sample] = tokens
        return tuple(made)


@dataclass
class FirstBlockCache:
    """What a loop keeps, and how it went: ``changes``, relative, of each step but the first."""

    blocks: Blocks
    threshold: float
    warmup: int = 1
    probe: Tensor | None = None
    first: Tensor | None = None
    added: Tensor | None = None
    skipped: list[bool] = field(default_factory=list)
    changes: list[float] = field(default_factory=list)

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Within: calls of the model are steps of this loop."""
        blocks = self.blocks.of(model)
        for i, block in enumerate(blocks):
            block.forward = self._wrapped(block.forward, i == 0, i == len(blocks) - 1)
        try:
            yield
        finally:
            for block in blocks:
                del block.forward

    def _wrapped(self, forward: Callable[..., Any], is_first: bool, is_last: bool) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            sample = self.blocks.given(0, args, kwargs)
            if is_first:
                results = forward(*args, **kwargs)
                self._decide(self.blocks.picked(results) - sample)
                self.first = self.blocks.picked(results)
                return results
            if not self.skipped[-1]:
                results = forward(*args, **kwargs)
                if is_last:
                    self.added = self.blocks.picked(results) - self.first
                return results
            sample = sample + self.added if is_last else sample
            if self.blocks.sample is None:
                return sample
            results = [sample, sample]
            results[self.blocks.text] = self.blocks.given(1, args, kwargs)
            return self.blocks.put(results, sample)

        return call

    def _decide(self, probe: Tensor) -> None:
        skips = False
        if self.probe is not None:
            self.changes.append(((probe - self.probe).abs().mean() / self.probe.abs().mean()).item())
            skips = len(self.skipped) >= self.warmup and self.changes[-1] <= self.threshold
        self.skipped.append(skips)
        if not skips:
            self.probe = probe


_TRANSFORMER = ("transformer_blocks",)
BLOCKS: dict[str, Blocks] = {
    "dit": Blocks(_TRANSFORMER),
    "pixart_alpha": Blocks(_TRANSFORMER),
    "sd3": Blocks(_TRANSFORMER, 1, 0),
    "flux": Blocks((*_TRANSFORMER, "single_transformer_blocks"), 1, 0),
    "hunyuan_dit": Blocks(("blocks",)),
    "sana": Blocks(_TRANSFORMER),
    "qwen_image": Blocks(_TRANSFORMER, 1, 0),
    "wan": Blocks(("blocks",)),
    "cogvideox": Blocks(_TRANSFORMER, 0, 1),
    "hunyuan_video": Blocks((*_TRANSFORMER, "single_transformer_blocks"), 0, 1),
    "ltx": Blocks(_TRANSFORMER),
}
"""By the name of a case."""
