"""What ranks do with adapters: two pipelines (or models) from one folder, one as it is and one parallel, are taken
through the same steps and run after each.

A step is a tuple: the name of one of ``STEPS`` and its arguments. Weights are random, made from a seed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pipelines
import torch
import zoo
from cases import made
from emulation import difference
from torch import Tensor, nn

import xdit_compile
from xdit_compile.frontend import program_cache as cache

Step = tuple[Any, ...]

LAYERS = ("attn.to_q", "attn.to_out.0", "ff.net.2", "q_proj")
"""Where adapters go: ends of the names of linear layers, of denoisers and text encoders."""


@dataclass
class Subject:
    """A pipeline or a model that steps are done to, and with what it is called."""

    target: Any
    root: Path
    parts: tuple[str, ...] = ("transformer",)
    call: dict[str, Any] = field(default_factory=dict)

    @property
    def is_model(self) -> bool:
        return isinstance(self.target, nn.Module)

    def part(self, name: str) -> nn.Module:
        return self.target if self.is_model else getattr(self.target, name)


@dataclass(frozen=True)
class Seen:
    """After a step: the difference to one process, how far that went from the step before, both over the largest
    value, and how many captures it took."""

    step: Step
    error: float
    moved: float
    captures: int


def weights(subject: Subject, seed: int, rank: int = 2) -> dict[str, Tensor]:
    """Low-rank weights for each part, large enough that each is seen in the result."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for part in subject.parts:
        for name, module in subject.part(part).named_modules():
            name = name.removesuffix(".base_layer")
            if hasattr(module, "in_features") and not hasattr(module, "base_layer") and name.endswith(LAYERS):
                down, up = (rank, module.in_features), (module.out_features, rank)
                found[f"{part}.{name}.lora_A.weight"] = 0.3 * torch.randn(down, generator=generator)
                found[f"{part}.{name}.lora_B.weight"] = 0.3 * torch.randn(up, generator=generator)
    return found


def _load(subject: Subject, name: str, seed: int, rank: int = 2, **how: Any) -> None:
    """Swapping in place may put the old weights where the new ones were: these are the subject's own."""
    made = weights(subject, seed, rank)
    if how.get("hotswap"):  # of a text encoder it is not supported
        made = {key: value for key, value in made.items() if not key.startswith("text_encoder")}
    if subject.is_model:
        subject.target.load_lora_adapter(made, prefix="transformer", adapter_name=name, **how)
    else:
        subject.target.load_lora_weights(made, adapter_name=name, **how)


def _load_from_file(subject: Subject, name: str, seed: int) -> None:
    """As published ones come: a folder with one file."""
    from safetensors.torch import save_file

    folder = subject.root / f"adapter-{torch.distributed.get_rank()}-{seed}"
    folder.mkdir(exist_ok=True)
    save_file(weights(subject, seed), folder / "pytorch_lora_weights.safetensors")
    subject.target.load_lora_weights(folder, adapter_name=name)


def _set(subject: Subject, names: Sequence[str], scales: Sequence[float] | None = None) -> None:
    subject.target.set_adapters(list(names), None if scales is None else list(scales))


def _fuse(subject: Subject, scale: float) -> None:
    parts = {} if subject.is_model else {"components": list(subject.parts)}
    subject.target.fuse_lora(lora_scale=scale, **parts)


def _unfuse(subject: Subject) -> None:
    subject.target.unfuse_lora(**({} if subject.is_model else {"components": list(subject.parts)}))


def _unload(subject: Subject) -> None:
    subject.target.unload_lora() if subject.is_model else subject.target.unload_lora_weights()


def _edit(subject: Subject, name: str) -> None:
    """Weights of an adapter, changed in place."""
    with torch.no_grad():
        for key, parameter in subject.part(subject.parts[0]).named_parameters():
            if f"lora_B.{name}" in key:
                parameter.mul_(-1.5)


def _scale_in_place(subject: Subject, name: str, scale: float) -> None:
    """After ``prepare``, scales are tensors."""
    for module in subject.part(subject.parts[0]).modules():
        if hasattr(module, "scaling"):
            module.scaling[name].fill_(scale)


def _call(subject: Subject, **arguments: Any) -> None:
    subject.call |= arguments


def _invert(subject: Subject, token: str, seed: int) -> None:
    """A word of its own, as textual inversion makes it, in the first text encoder."""
    width = subject.part("text_encoder").config.hidden_size
    vector = 2 * torch.randn(width, generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    subject.target.load_textual_inversion({token: vector[None]}, token=token)


def _show(subject: Subject, seed: int) -> None:
    """A picture as a prompt: an adapter with attention of its own to what is made of the picture's embedding."""
    unet, width = subject.target.unet, 6
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    cross = unet.config.cross_attention_dim
    layers = [m for n, m in unet.named_modules() if n.endswith("attn2")]
    attention = {f"{2 * i + 1}.{name}_ip.weight": 0.3 * randn(*getattr(layer, name).weight.shape)
                 for i, layer in enumerate(_in_order(unet, layers)) for name in ("to_k", "to_v")}
    projection = {"proj.weight": randn(4 * cross, width), "proj.bias": randn(4 * cross),
                  "norm.weight": randn(cross), "norm.bias": randn(cross)}
    subject.target.load_ip_adapter({"image_proj": projection, "ip_adapter": attention}, subfolder="", weight_name="",
                                   image_encoder_folder=None)
    subject.call |= {"ip_adapter_image_embeds": [randn(2, 1, width)]}


def _in_order(unet: nn.Module, layers: list[nn.Module]) -> list[nn.Module]:
    """Adapters number layers as the processors are listed."""
    paths = {id(m): n for n, m in unet.named_modules()}
    listed = [n.removesuffix(".processor") for n in unet.attn_processors]
    return sorted(layers, key=lambda m: listed.index(paths[id(m)]))


def _hide(subject: Subject) -> None:
    subject.target.unload_ip_adapter()
    del subject.call["ip_adapter_image_embeds"]


STEPS: Mapping[str, Callable[..., Any]] = {
    "start": lambda s: None,
    "load": _load,
    "file": _load_from_file,
    "hotswap": lambda s, name, seed, rank=2: _load(s, name, seed, rank, hotswap=True),
    "prepare": lambda s, rank: s.target.enable_lora_hotswap(target_rank=rank),
    "set": _set,
    "delete": lambda s, name: s.target.delete_adapters(name),
    "disable": lambda s: s.target.disable_lora(),
    "enable": lambda s: s.target.enable_lora(),
    "fuse": _fuse,
    "unfuse": _unfuse,
    "unload": _unload,
    "edit": _edit,
    "scale": _scale_in_place,
    "call": _call,
    "with": lambda s, arguments: _call(s, **arguments),
    "invert": _invert,
    "uninvert": lambda s, token: s.target.unload_textual_inversion(token),
    "show": _show,
    "picture": lambda s, scale: s.target.set_ip_adapter_scale(scale),
    "hide": _hide,
}


@contextmanager
def _counting(blind: bool) -> Iterator[list[int]]:
    """Within, captures are counted; ``blind``: and what a model has changed is not seen."""
    counts = [0]
    capture, same = cache.recorded, cache._Captured.same_state

    def counted(*args: Any) -> Any:
        counts[0] += 1
        return capture(*args)

    with patch.object(cache, "recorded", counted), patch.object(
            cache._Captured, "same_state", (lambda self, model, call, fresh: (True, False)) if blind else same):
        yield counts


def drive(name: str, root: str, spec: str, steps: Sequence[Step], *, before: int = 0, blind: bool = False,
          parts: Sequence[str] = ("transformer",)) -> list[Seen]:
    """Take a pipeline through the steps: the first ``before`` of them before it is made parallel."""
    case, path = pipelines.PIPELINES[name], pipelines.folder(name, Path(root))
    alone, other = (Subject(pipelines.load(path), Path(root), tuple(parts)) for _ in range(2))

    def run(subject: Subject) -> Tensor:
        return pipelines.run(subject.target, case, **({"num_inference_steps": 2} | subject.call))

    return _driven(alone, other, spec, steps, before, blind, run)


def drive_model(name: str, root: str, spec: str, steps: Sequence[Step], *, before: int = 0,
                blind: bool = False) -> list[Seen]:
    """Take a model of the zoo through the steps."""
    case = zoo.CASES[name]
    alone, other = (Subject(made(case), Path(root)) for _ in range(2))

    @torch.no_grad()
    def run(subject: Subject) -> Tensor:
        return subject.target(**(case.inputs(1, True) | subject.call), return_dict=False)[0]

    return _driven(alone, other, spec, steps, before, blind, run)


def _driven(alone: Subject, other: Subject, spec: str, steps: Sequence[Step], before: int, blind: bool,
            run: Callable[[Subject], Tensor]) -> list[Seen]:
    seen: list[Seen] = []
    last: Tensor | None = None

    def do(step: Step) -> None:
        for subject in (alone, other):
            STEPS[step[0]](subject, *step[1:])

    with warnings.catch_warnings(), _counting(blind) as counts:
        warnings.simplefilter("ignore")
        for step in steps[:before]:
            do(step)
        other.target = xdit_compile.parallelize(other.target, spec, ranks=range(2), timeout=100)
        for step in steps[before:]:
            do(step)
            counts[0] = 0
            expected = run(alone)
            error = difference(run(other), expected)
            seen.append(Seen(step, error, 0.0 if last is None else difference(last, expected), counts[0]))
            last = expected
    return seen
