"""Weights as libraries pack them, put into test models: each kind is a function that changes a model in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

Change = Callable[[nn.Module], Any]


def linears(model: nn.Module, multiple: int) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Each linear layer whose rows can be packed in groups of so many, with its parent and name."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and layer.in_features % multiple == 0:
                yield parent, name, layer


def torchao(config: str, **options: Any) -> Change:
    def change(model: nn.Module) -> None:
        from torchao import quantization

        quantization.quantize_(model, getattr(quantization, config)(**options))

    return change


def gguf(kind: str) -> Change:
    """As diffusers reads them from a file."""
    def change(model: nn.Module) -> None:
        from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import quantize

        packed = GGMLQuantizationType[kind]
        size, nbytes = GGML_QUANT_SIZES[packed]
        for parent, name, layer in linears(model, size):
            made = GGUFLinear(layer.in_features, layer.out_features, layer.bias is not None, torch.float32)
            try:
                raw = torch.from_numpy(quantize(layer.weight.detach().numpy(), packed))
            except NotImplementedError:  # by that library; bytes of which half precision numbers are small
                raw = torch.randint(32, (layer.out_features, layer.in_features // size * nbytes), dtype=torch.uint8,
                                    generator=torch.Generator().manual_seed(0))
            made.weight = GGUFParameter(raw, quant_type=packed)
            made.bias = layer.bias
            setattr(parent, name, made.eval().requires_grad_(False))

    return change


def bitsandbytes(kind: str) -> Change:
    """``Linear8bitLt`` or ``Linear4bit``."""
    def change(model: nn.Module) -> None:
        import bitsandbytes

        for parent, name, layer in linears(model, 64):
            if layer.out_features % 32:  # some CPUs' kernels want
                continue
            if kind == "int8":
                made = bitsandbytes.nn.Linear8bitLt(layer.in_features, layer.out_features, layer.bias is not None,
                                                    has_fp16_weights=False)
                made.weight = bitsandbytes.nn.Int8Params(layer.weight.data, requires_grad=False)
            else:
                made = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None,
                                                  compute_dtype=torch.float32, quant_type=kind)
                made.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type=kind)
            made.bias = layer.bias
            setattr(parent, name, made.to("cpu").eval().requires_grad_(False))

    return change


def layerwise(storage: torch.dtype = torch.float8_e4m3fn, compute: torch.dtype = torch.float32) -> Change:
    def change(model: nn.Module) -> None:
        model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=compute)  # type: ignore[operator]

    return change


KINDS: dict[str, Change] = {
    "int8": torchao("Int8WeightOnlyConfig"),
    "int8_dynamic": torchao("Int8DynamicActivationInt8WeightConfig"),
    "fp8": torchao("Float8WeightOnlyConfig"),
    "intx": torchao("IntxWeightOnlyConfig"),
    "int8_intx_dynamic": torchao("Int8DynamicActivationIntxWeightConfig"),
    "nf4": bitsandbytes("nf4"),
    "fp4": bitsandbytes("fp4"),
    "q8_0": gguf("Q8_0"),
    "q4_0": gguf("Q4_0"),
    "q4_1": gguf("Q4_1"),
    "q5_0": gguf("Q5_0"),
    "q5_1": gguf("Q5_1"),
    "q2_k": gguf("Q2_K"),
    "q3_k": gguf("Q3_K"),
    "q4_k": gguf("Q4_K"),
    "q5_k": gguf("Q5_K"),
    "q6_k": gguf("Q6_K"),
    "iq4_nl": gguf("IQ4_NL"),
    "bf16": gguf("BF16"),
    "layerwise": layerwise(),
}
