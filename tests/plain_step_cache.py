"""Step caches on one device, by hand: the blocks of a plain model are called or not. Nothing of the package is used."""

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
        projection: of the first block, the first that is given the sample's tokens.
    """

    lists: tuple[str, ...]
    sample: int | None = None
    text: int | None = None
    arguments: tuple[str, str] = ("hidden_states", "encoder_hidden_states")
    projection: str = "attn1.to_q"

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
class PlainCache:
    """What a loop keeps, and how it went: ``changes``, as compared with the threshold, of each step but the first.

    Steps that leave blocks out add to the sample's tokens what these have added before.
    """

    blocks: Blocks
    threshold: float = 0.0
    warmup: int = 1
    probe: Tensor | None = None
    entered: Tensor | None = None
    added: Tensor | None = None
    skipped: list[bool] = field(default_factory=list)
    changes: list[float] = field(default_factory=list)

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Within: calls of the model are steps of this loop."""
        blocks = self.blocks.of(model)
        for i, block in enumerate(blocks):
            block.forward = self._wrapped(block, block.forward, i == 0, i == len(blocks) - 1)
        try:
            yield
        finally:
            for block in blocks:
                del block.forward

    def _wrapped(self, block: nn.Module, forward: Callable[..., Any], is_first: bool, is_last: bool
                 ) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            sample = self.blocks.given(0, args, kwargs)
            if is_first and (results := self._begin(block, sample, lambda: forward(*args, **kwargs))) is not None:
                return results
            if not self.skipped[-1]:
                results = forward(*args, **kwargs)
                if is_last:
                    self._keep(self.blocks.picked(results) - self.entered)
                return results
            sample = sample + self._again() if is_last else sample
            if self.blocks.sample is None:
                return sample
            results = [sample, sample]
            results[self.blocks.text] = self.blocks.given(1, args, kwargs)
            return self.blocks.put(results, sample)

        return call

    def parts_the_steps(self, steps: int) -> bool:
        """Whether of so many steps some left blocks out but not all that might, and no decision was close."""
        return 0 < sum(self.skipped) < steps - 1 and all(abs(c / self.threshold - 1) > 1e-3 for c in self.changes)

    def _begin(self, block: nn.Module, sample: Tensor, forward: Callable[[], Any]) -> Any:
        """Decide whether this step leaves blocks out; the results of the first, if that is computed at each step."""
        raise NotImplementedError

    def _keep(self, added: Tensor) -> None:
        self.added = added

    def _again(self) -> Tensor:
        assert self.added is not None
        return self.added

    def _may_skip(self) -> bool:
        return len(self.skipped) >= self.warmup

    def _change(self, probe: Tensor) -> float:
        return ((probe - self.probe).abs().mean() / self.probe.abs().mean()).item()


class FirstBlockCache(PlainCache):
    """As ParaAttention and diffusers have it: what the first block adds is compared with what it added in the last step
    that computed all blocks."""

    def _begin(self, block: nn.Module, sample: Tensor, forward: Callable[[], Any]) -> Any:
        results = forward()
        self.entered = self.blocks.picked(results)
        probe = self.entered - sample
        if self.probe is not None:
            self.changes.append(self._change(probe))
        self.skipped.append(self._may_skip() and self.changes[-1] <= self.threshold)
        if not self.skipped[-1]:
            self.probe = probe
        return results


class _Found(Exception):
    """What a projection was given."""


class TeaCache(PlainCache):
    """As in arXiv 2411.19108, section 3: what the first block makes of its input and the time before its first
    projection is compared with that of the step before. Relative changes, of which a polynomial may be taken, add up
    over the steps that leave blocks out; when they are beyond the threshold, blocks are computed and the sum begins
    anew."""

    polynomial: tuple[float, ...] = (1.0, 0.0)
    moved = 0.0

    def _begin(self, block: nn.Module, sample: Tensor, forward: Callable[[], Any]) -> Any:
        self.entered, probe = sample, self._modulated(block, forward)
        if self.probe is not None:
            change, powers = self._change(probe), range(len(self.polynomial))[::-1]
            self.moved += sum(c * change**n for c, n in zip(self.polynomial, powers, strict=True))
            self.changes.append(self.moved)
        self.skipped.append(self._may_skip() and self.moved <= self.threshold)
        self.moved *= self.skipped[-1]
        self.probe = probe

    def _modulated(self, block: nn.Module, forward: Callable[[], Any]) -> Tensor:
        def found(_: nn.Module, args: tuple[Any, ...]) -> None:
            raise _Found(args[0])

        with block.get_submodule(self.blocks.projection).register_forward_pre_hook(found):
            try:
                forward()
            except _Found as it:
                return it.args[0]
        raise AssertionError("the block has another first projection")


@dataclass
class Taylor(PlainCache):
    """As in arXiv 2503.06923, of order one: a step that is a multiple of ``every`` computes all blocks, and those
    between go on along the line through what blocks added at the last two: F + k (F - F') / N, k steps later."""

    every: int = 2
    order: int = 1
    earlier: Tensor | None = None

    def _begin(self, block: nn.Module, sample: Tensor, forward: Callable[[], Any]) -> Any:
        self.entered = sample
        self.skipped.append(len(self.skipped) % self.every != 0)

    def _keep(self, added: Tensor) -> None:
        self.earlier, self.added = self.added, added

    def _again(self) -> Tensor:
        assert self.added is not None
        if self.order == 0 or self.earlier is None:
            return self.added
        return self.added + (len(self.skipped) - 1) % self.every * (self.added - self.earlier) / self.every


@dataclass
class Interval(Taylor):
    """The same of order zero."""

    order: int = 0


def thresholds(changes: list[float]) -> list[float]:
    """Some that might part steps of these changes."""
    low, *_, high = sorted(changes)
    return [low + (high - low) * part for part in (0.5, 0.7, 0.3, 0.85, 0.15, 1.2, 1.5, 2.5, 4.0)]


_TRANSFORMER = ("transformer_blocks",)
BLOCKS: dict[str, Blocks] = {
    "dit": Blocks(_TRANSFORMER),
    "pixart_alpha": Blocks(_TRANSFORMER),
    "sd3": Blocks(_TRANSFORMER, 1, 0),
    "flux": Blocks((*_TRANSFORMER, "single_transformer_blocks"), 1, 0, projection="attn.to_q"),
    "hunyuan_dit": Blocks(("blocks",)),
    "sana": Blocks(_TRANSFORMER),
    "qwen_image": Blocks(_TRANSFORMER, 1, 0),
    "wan": Blocks(("blocks",)),
    "cogvideox": Blocks(_TRANSFORMER, 0, 1),
    "hunyuan_video": Blocks((*_TRANSFORMER, "single_transformer_blocks"), 0, 1),
    "ltx": Blocks(_TRANSFORMER),
}
"""By the name of a case."""
