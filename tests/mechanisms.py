"""Ways in which others change what a call does, each tried on a model as it is and on a parallel one.

Each is a row of ``docs/mechanisms.md``, by its name. A honoured one ends with the answer of plain PyTorch, a refused
one with an error of this package that names it, one without effect with a warning and the answer of plain PyTorch.
"""

from __future__ import annotations

import copy
import pickle
import tempfile
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import quantized
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from emulation import difference
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import xdit_compile

Model = Any
Changes = Callable[[Model], Any]


class Block(nn.Module):
    """Attention with a residual, and a layer whose weight may be changed."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Tiny(nn.Module):
    """Two blocks, in which a part is computed in float32 whatever the caller's autocast says."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.blocks, self.drop, self.head = nn.ModuleList([Block(), Block()]), nn.Dropout(drop), nn.Linear(16, 16)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = x + timestep[:, None, None]
        for block in self.blocks:
            x = block(x)
        places = torch.linspace(0, 1, x.shape[1])[:, None]
        with torch.autocast("cpu", enabled=False):
            return self.head(self.drop(x).to(self.head.weight.dtype) + places.to(self.head.weight.dtype))


def tiny(**options: Any) -> Tiny:
    torch.manual_seed(0)
    return Tiny(**options).eval().requires_grad_(False)


def call() -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(1)
    return {"x": torch.randn(1, 12, 16, generator=made), "timestep": torch.rand(1, generator=made)}


def flux() -> Model:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
                                  num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8,
                                  axes_dims_rope=(2, 2, 4)).eval().requires_grad_(False)


def flux_call() -> dict[str, Any]:
    made = torch.Generator().manual_seed(1)
    return {"hidden_states": torch.randn(1, 12, 4, generator=made), "pooled_projections": torch.ones(1, 8),
            "encoder_hidden_states": torch.randn(1, 3, 8, generator=made), "timestep": torch.tensor([0.5]),
            "img_ids": torch.zeros(12, 3), "txt_ids": torch.zeros(3, 3), "return_dict": False}


def parallel(model: Model) -> Model:
    return xdit_compile.parallelize(model, "ulysses=1")


def answer(model: Model) -> Tensor:
    """Of a call of a tiny model, or of one of diffusers."""
    with torch.no_grad():
        return model(**call()) if isinstance(model, Tiny) else model(**flux_call())[0]


@dataclass(frozen=True)
class Row:
    """A mechanism: the word for what becomes of it, how it is tried, and what an error or a warning says."""

    word: str
    act: Callable[[], Any]
    says: str = ""


ROWS: dict[str, Row] = {}


def row(name: str, word: str, says: str = "") -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Enter a function as the test of a row. A honoured one returns a difference, which must be nothing."""
    def enter(act: Callable[[], Any]) -> Callable[[], Any]:
        assert name not in ROWS
        ROWS[name] = Row(word, act, says)
        return act
    return enter


def before(change: Changes, make: Callable[[], Model] = tiny, differs: bool = True) -> float:
    """The change is there when the model becomes parallel."""
    plain, changed, made = make(), make(), make()
    change(changed)
    change(made)
    assert not differs or difference(answer(changed), answer(plain)) > 1e-3
    return difference(answer(parallel(made)), answer(changed))


def after(change: Changes, make: Callable[[], Model] = tiny, differs: bool = True, called: bool = True) -> float:
    """The change is made to the parallel model, which was called before."""
    changed, made = make(), parallel(make())
    first = answer(changed)
    if called:
        assert difference(answer(made), first) < 1e-5
    change(changed)
    change(made)
    assert not differs or difference(answer(changed), first) > 1e-3
    return difference(answer(made), answer(changed))


def both(change: Changes, make: Callable[[], Model] = tiny, differs: bool = True) -> float:
    return max(before(change, make, differs), after(change, make, differs))


# The call itself


def doubled(model: Model) -> None:
    was = model.forward
    model.forward = lambda *args, **kwargs: 2 * was(*args, **kwargs)


@row("`forward` on the object, before", "honoured")
def own_forward() -> float:
    class Chosen(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.forward = self.forward_twice  # type: ignore[method-assign]

        def forward_twice(self, x: Tensor, timestep: Tensor) -> Tensor:
            return 2 * Tiny.forward(self, x, timestep)

    def chosen() -> Model:
        torch.manual_seed(0)
        return Chosen().eval().requires_grad_(False)

    return max(before(doubled), before(lambda m: None, chosen, differs=False))


@row("`forward` put around the parallel one", "honoured")
def around() -> float:
    model, made = tiny(), parallel(tiny())
    for one in (model, made):
        doubled(one)
        doubled(one)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        error = difference(answer(made), answer(model))
    reached = made.runners["forward"].group.counts["calls"]
    del made.forward
    assert reached == 1 and difference(answer(made), answer(tiny())) < 1e-5
    return error


@row("`forward` put in place of the parallel one", "has no effect", "does not call the one that was there")
def in_place() -> float:
    def put(model: Model) -> None:
        model.forward = types.MethodType(lambda self, x, timestep: 3 * Tiny.forward(self, x, timestep), model)
    return after(put)


@row("`forward` set on the parallel model's class", "honoured")
def class_forward() -> float:
    class Other(Tiny):
        pass

    def other() -> Model:
        torch.manual_seed(0)
        return Other().eval().requires_grad_(False)

    model, made = other(), parallel(other())
    original = type(made).forward
    type(made).forward = lambda self, x, timestep: 2 * original(self, x, timestep)
    assert Other.forward is type(made).forward and made.runners["forward"].programs == {}
    return max(difference(answer(made), answer(model)), difference(answer(made) / 2, answer(tiny())))


@row("`forward` on an inner module's object", "honoured")
def inner_forward() -> float:
    return both(lambda m: doubled(m.blocks[0]))


@row("`__call__`, `_call_impl` on an object", "refused", "was replaced on the object")
def own_call() -> None:
    model = tiny()
    model.blocks[1]._call_impl = lambda *args: args[0]
    parallel(model)


@row("forward hooks on the model", "honoured")
def hooks_on_the_model() -> float:
    seen: list[Tensor] = []

    def hook(model: Model) -> None:
        model.register_forward_pre_hook(lambda m, args, kw: (args, kw | {"x": kw["x"] + 1}), with_kwargs=True)
        model.register_forward_hook(lambda m, args, out: seen.append(out.clone()))
        model.register_forward_hook(lambda m, args, out: 2 * out)

    error = both(hook)
    assert all(type(t) is Tensor for t in seen)
    return max(error, *(difference(a, seen[0]) for a in seen))


@row("hooks on inner modules that change values", "honoured")
def hooks_that_change() -> float:
    def hook(model: Model) -> None:
        model.blocks[0].register_forward_hook(lambda m, args, out: out * 2)
        model.blocks[1].register_forward_pre_hook(lambda m, args: (args[0] + 1,))
        model.blocks[1].out.register_forward_hook(written)
    return both(hook)


def written(module: nn.Module, args: Any, out: Tensor) -> None:
    out.mul_(3)


@row("hooks on inner modules that only watch", "refused", "watched of mechanisms on blocks.1.out")
def hooks_that_watch() -> None:
    model = parallel(tiny())
    answer(model)
    model.blocks[1].out.register_forward_hook(watched)
    try:
        answer(model)
    finally:
        assert KEPT == [] or not any(type(t) is Tensor for t in KEPT)
        KEPT.clear()


KEPT: list[Any] = []


def watched(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    KEPT.append(out)
    return out


@row("hooks on inner modules that keep what they are given", "refused", "keeps state from call to call")
def hooks_that_keep() -> None:
    kept: list[Any] = []
    for hook in (lambda m, args, out: setattr(m, "last", out), lambda m, args: setattr(m, "last", args[0]),
                 lambda m, args, out: print(out.sum().item())):
        model = tiny()
        register = model.blocks[0].register_forward_pre_hook if hook.__code__.co_argcount == 2 else (
            model.blocks[0].register_forward_hook)
        register(hook)
        try:
            answer(parallel(model))
        except xdit_compile.CaptureError as error:
            assert "hooks_that_keep" in str(error) and "blocks.0" in str(error)
        else:
            raise AssertionError("not refused")
    model = tiny()
    model.blocks[1].register_forward_hook(lambda m, args, out: (kept.append(out), 2 * out)[1])
    answer(parallel(model))


@row("hooks on all modules", "refused", "a hook on all modules")
def global_hooks() -> None:
    model = parallel(tiny())
    handle = nn.modules.module.register_module_forward_hook(watched)
    try:
        answer(model)
    finally:
        handle.remove()
        KEPT.clear()


@row("backward hooks", "honoured")
def backward_hooks() -> float:
    return both(lambda m: m.blocks[0].register_full_backward_hook(lambda *_: None), differs=False)


# Compilers


@row("`compile()` of the model, before", "has no effect", "backend=inductor")
def compile_before() -> float:
    return before(lambda m: m.compile(backend="eager"), differs=False)


@row("`compile()` of the parallel model", "has no effect", "backend=inductor")
def compile_after() -> float:
    made = parallel(tiny())
    made.compile(backend="eager")
    return difference(answer(made), answer(tiny()))


@row("`parallelize(torch.compile(model))`", "has no effect", "backend=inductor")
def wrapper_before() -> float:
    made = parallel(torch.compile(tiny(), backend="eager"))
    assert isinstance(made, Tiny)
    return difference(answer(made), answer(tiny()))


@row("`torch.compile(parallel)`", "has no effect", "backend=inductor")
def wrapper_after() -> float:
    made = torch.compile(parallel(tiny()), backend="eager")
    with torch.no_grad():
        return difference(made(**call()), answer(tiny()))


@row("`compile()` or `torch.compile` on inner modules", "has no effect", "backend=inductor")
def compiled_inside() -> float:
    def change(model: Model) -> None:
        model.blocks[0].compile(backend="eager")
        model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    made = tiny()
    change(made)
    made = parallel(made)
    first = difference(answer(made), answer(tiny()))
    answer(made)
    assert len(made.runners["forward"].programs) == 1
    return first


@row("functions of the model under `torch.compile`", "honoured")
def compiled_function() -> float:
    @torch.compile(backend="eager")
    def scaled(x: Tensor) -> Tensor:
        return x * 2
    return before(lambda m: m.blocks[0].register_forward_hook(lambda m, args, out: scaled(out)))


@row("`torch.jit.script`", "refused", "a module of torch.jit")
def scripted() -> None:
    model = tiny()
    model.head = torch.jit.script(model.head)
    parallel(model)


@row("`torch.jit.trace` around the parallel model", "refused", "torch.jit.trace")
def traced() -> None:
    torch.jit.trace(parallel(tiny()), example_kwarg_inputs=call())


# Wrappers and weights


@row("`DataParallel`, `DistributedDataParallel`", "refused", "give parallelize the model inside")
def wrapped() -> None:
    parallel(nn.DataParallel(tiny()))


@row("parametrizations, `weight_norm`, `spectral_norm`, `prune`", "honoured")
def parametrized() -> float:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    def change(model: Model) -> None:
        nn.utils.parametrize.register_parametrization(model.blocks[0].qkv, "weight", Twice())
        nn.utils.parametrizations.weight_norm(model.blocks[0].out)
        nn.utils.weight_norm(model.blocks[1].qkv)
        torch.manual_seed(3)
        nn.utils.spectral_norm(model.blocks[1].out)
        nn.utils.prune.l1_unstructured(model.head, "weight", 0.5)
        model.eval().requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return before(change)


@row("`parametrize.cached()`", "honoured")
def parametrize_cached() -> float:
    def change(model: Model) -> None:
        nn.utils.parametrizations.weight_norm(model.blocks[0].out)
        model.blocks[0].out.parametrizations.weight.original0.data *= 2
    model, made = tiny(), tiny()
    change(model)
    change(made)
    with nn.utils.parametrize.cached():
        answer(parallel(made))
        return difference(answer(made), answer(model))


def pair_of_tensors(model: Model) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    out = model.blocks[0].out
    out.weight = nn.Parameter(TwoTensor(out.weight.clone(), out.weight.clone()), requires_grad=False)


@row("weights of torchao", "honoured")
def packed_weights() -> float:
    def int8(model: Model) -> None:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model, Int8WeightOnlyConfig())

    return max(both(int8), before(int8, flux))


@row("bitsandbytes in 4 bits", "honoured")
def four_bits() -> float:
    def change(model: Model) -> None:
        quantized.bitsandbytes("nf4")(model)
        answer(model)  # some CPUs' kernels have their weights packed anew at the first call

    return before(change, wide)


def wide() -> Model:
    """With a layer of a width that kernels of bitsandbytes take."""
    model = tiny()
    torch.manual_seed(1)
    model.drop = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 64), nn.Linear(64, 16)).requires_grad_(False)
    return model


@row("GGUF weights, as diffusers loads them", "honoured")
def gguf_weights() -> float:
    return both(quantized.gguf("Q4_0"), flux)


@row("weights whose results are of their type too", "refused",
     "Tiny returns a torch.testing._internal.two_tensor.TwoTensor")
def tensor_subclasses() -> None:
    model = tiny()
    made = parallel(model)
    answer(made)
    pair_of_tensors(model)
    answer(made)


@row("weights of a type that does not say what it consists of", "refused",
     "blocks.0.out.weight is a mechanisms.opaque_weight.<locals>.Opaque")
def opaque_weight() -> None:
    class Opaque(Tensor):
        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    model = tiny()
    out = model.blocks[0].out
    out._parameters["weight"] = Tensor._make_wrapper_subclass(Opaque, out.weight.shape)  # type: ignore[assignment]
    parallel(model)


@row("bitsandbytes in 8 bits", "refused", "bitsandbytes.nn.modules.Int8Params")
def eight_bits() -> None:
    model = wide()
    quantized.bitsandbytes("int8")(model)
    answer(parallel(model))


@row("parameters of lazy modules", "refused", "blocks.0.out.weight is a torch.nn.parameter.UninitializedParameter")
def lazy() -> None:
    model = tiny()
    model.blocks[0].out = nn.LazyLinear(16)
    parallel(model)


@row("arguments of other tensor types", "refused", "takes plain tensors, not a torch.testing._internal.two_tensor")
def other_arguments() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    made, given = parallel(tiny()), call()
    with torch.no_grad():
        made(**given | {"x": TwoTensor(given["x"], given["x"])})


@row("`load_state_dict`", "honoured")
def loaded_state() -> float:
    torch.manual_seed(5)
    other = Tiny().state_dict()
    return after(lambda m: m.load_state_dict(other))


@row("`torch.utils.swap_tensors`", "refused", "Cannot swap")
def swapped() -> None:
    """By PyTorch itself, of what is watched for changes."""
    made = parallel(tiny())
    answer(made)
    torch.utils.swap_tensors(made.head.weight, nn.Parameter(torch.ones(16, 16), requires_grad=False))


@row("`torch.func.functional_call`", "honoured")
def functional_call() -> float:
    torch.manual_seed(5)
    other = dict(Tiny().named_parameters())
    made = parallel(tiny())
    answer(made)
    with torch.no_grad():
        return difference(torch.func.functional_call(made, other, (), call()),
                          torch.func.functional_call(tiny(), other, (), call()))


@row("`.to()`, `.half()`", "honoured")
def cast() -> float:
    model, made = tiny(), parallel(tiny())
    answer(made)
    given = {n: t.double() for n, t in call().items()}
    with torch.no_grad():
        first = difference(made.double()(**given).float(), model(**call()))
    made.half().to(torch.float32)
    return max(first, difference(answer(made), answer(tiny().half().float())))


@row("`.train()`", "refused", "draws random numbers")
def trained() -> None:
    made = parallel(tiny(drop=0.5))
    assert difference(answer(made), answer(tiny())) < 1e-5
    made.train()
    answer(made)


# Classes and copies


@row("`__class__` of the original", "honoured")
def swapped_class() -> float:
    class Thrice(Tiny):
        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return 3 * super().forward(x, timestep)

    model, changed = tiny(), tiny()
    made = parallel(model)
    answer(made)
    model.__class__ = changed.__class__ = Thrice
    return difference(answer(made), answer(changed))


@row("`__class__` of the parallel model", "refused", "cannot be exchanged")
def swapped_parallel_class() -> None:
    class Thrice(Tiny):
        pass

    parallel(tiny()).__class__ = Thrice


@row("a new instance, `from_config`", "honoured")
def new_instance() -> float:
    made = parallel(tiny())
    answer(made)
    torch.manual_seed(7)
    new = type(made)().eval()
    torch.manual_seed(7)
    own = difference(answer(new), answer(Tiny().eval()))
    first = parallel(flux())
    torch.manual_seed(7)
    other = type(first).from_config(first.config).eval()
    plain = flux()
    torch.manual_seed(7)
    expected = type(plain).from_config(plain.config).eval()
    assert type(new) is Tiny and not hasattr(other, "runners") and hash(type(first)) == hash(type(other))
    return max(own, difference(answer(other), answer(expected)))


@row("`copy.copy`, `copy.deepcopy`, `pickle`", "honoured")
def copied() -> float:
    made = parallel(tiny())
    answer(made)
    copies = [copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made)), copy.deepcopy([made])[0]]
    assert [type(c) for c in copies] == [Tiny] * 4
    for one in copies[1:]:
        one.head.weight.mul_(2)
    expected = tiny()
    same = difference(answer(copies[0]), answer(expected))
    expected.head.weight.mul_(2)
    return max(same, difference(answer(made), answer(tiny())),
               *(difference(answer(c), answer(expected)) for c in copies[1:]))


@row("`state_dict`, `save_pretrained`", "honoured")
def saved() -> float:
    made, other = parallel(flux()), flux()
    with tempfile.TemporaryDirectory() as folder:
        made.save_pretrained(folder)
        other = type(other).from_pretrained(folder).eval()
    assert list(made.state_dict()) == list(other.state_dict())
    return difference(answer(other), answer(made))


# What surrounds a call


@row("`torch.autocast`", "honoured")
def autocast() -> float:
    model, made = tiny(), parallel(tiny())
    exact = answer(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = answer(model)
        error = difference(answer(made), expected)
    assert difference(expected, exact) > 1e-4
    return max(error, difference(answer(made), exact))


@row("autocast inside of forward, around blocks", "honoured")
def autocast_inside() -> float:
    class Regions(Tiny):
        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                first = super().forward(x, timestep)
            with torch.autocast("cpu", enabled=False):
                return first + super().forward(x, timestep)

    def made() -> Model:
        torch.manual_seed(0)
        return Regions().eval().requires_grad_(False)

    model, changed = made(), parallel(made())
    plain = difference(answer(changed), answer(model))
    with torch.autocast("cpu", torch.bfloat16):
        assert difference(answer(model), 2 * answer(tiny())) > 1e-4
        return max(plain, difference(answer(changed), answer(model)))


@row("`inference_mode`, `no_grad`", "honoured")
def inference() -> float:
    made = parallel(tiny())
    with torch.inference_mode():
        first = difference(made(**call()), tiny()(**call()))
    return max(first, difference(answer(made), answer(tiny())))


@row("inputs that require gradients", "refused", "computes no gradients")
def gradients() -> None:
    given = call()
    parallel(tiny())(**given | {"x": given["x"].requires_grad_()})


@row("default dtype and device", "honoured")
def defaults() -> float:
    model, made = tiny().double(), parallel(tiny().double())
    given = {n: t.double() for n, t in call().items()}

    class Table(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.full((16,), 1 / 3).double()

    for one in (model, made):
        one.blocks[0].out = Table()
    with torch.no_grad():
        made(**given)
        torch.set_default_dtype(torch.float64)
        try:
            error = (made(**given) - model(**given)).abs().max().item()
        finally:
            torch.set_default_dtype(torch.float32)
        with torch.device("cpu"):
            return max(error * 1e6, difference(made(**given), model(**given)))


@row("dispatch modes that watch operators (`FlopCounterMode`)", "honoured")
def dispatch_modes() -> float:
    from torch.utils.flop_counter import FlopCounterMode

    model, made = tiny(), parallel(tiny())
    counted = []
    for one in (model, made, made):
        with FlopCounterMode(display=False) as mode:
            answer(one)
        counted.append(mode.get_total_flops())
    assert counted[0] == counted[1] == counted[2] > 0, counted
    return difference(answer(made), answer(model))


@row("function modes", "refused", "mechanisms.function_modes.<locals>.Doubling")
def function_modes() -> None:
    class Doubling(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    made = parallel(tiny())
    with Doubling():
        answer(made)


@row("`torch.export`, `make_fx`, `FakeTensorMode` around the parallel model", "refused", "takes plain tensors")
def exported() -> None:
    torch.export.export(parallel(tiny()), (), call(), strict=False)


@row("`vmap`, `grad`, `jvp` of `torch.func`", "refused", "a transform of torch.func")
def vmapped() -> None:
    made, given = parallel(tiny()), call()
    torch.func.vmap(lambda x: made(x, given["timestep"]))(given["x"][None])


@row("forward-mode differentiation", "refused", "forward-mode differentiation")
def dual() -> None:
    from torch.autograd import forward_ad

    given = call()
    with forward_ad.dual_level():
        x = forward_ad.make_dual(given["x"], torch.ones_like(given["x"]))
        parallel(tiny())(x, given["timestep"])


# accelerate


@row("device hooks of accelerate around the original", "refused", "moves or casts weights")
def accelerate_before() -> None:
    from accelerate import cpu_offload_with_hook

    model = tiny()
    cpu_offload_with_hook(model, "cpu")
    parallel(model)


@row("device hooks of accelerate on inner modules", "refused", "moves or casts weights")
def accelerate_inside() -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    made = parallel(tiny())
    answer(made)
    add_hook_to_module(made.blocks[0], AlignDevicesHook("cpu"))
    answer(made)


@row("sequential offloading", "honoured")
def sequential() -> float:
    from accelerate import cpu_offload

    return max(offloaded(lambda m: cpu_offload(m, torch.device("cpu")), make) for make in (tiny, flux))


@row("offloading the parallel model as a whole", "honoured")
def accelerate_after() -> float:
    from accelerate import cpu_offload_with_hook
    from accelerate.hooks import remove_hook_from_module

    model = tiny()
    made = parallel(model)
    _, hook = cpu_offload_with_hook(made, "cpu")
    first = difference(answer(made), answer(tiny()))
    hook.offload()
    remove_hook_from_module(made)
    assert made.runners["forward"].group.counts["calls"] == 1
    answer(model)
    assert made.runners["forward"].group.counts["calls"] == 1, "the original is as it was"
    return max(first, difference(answer(made), answer(tiny())))


# diffusers and peft


@row("`enable_cache`", "refused", "keeps values from step to step")
def enable_cache() -> None:
    from diffusers import FirstBlockCacheConfig

    made = parallel(flux())
    answer(made)
    made.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with made.cache_context("cond"):
        answer(made)


@row("`cache_context`", "honoured")
def cache_context() -> float:
    made = parallel(flux())
    with made.cache_context("cond"):
        return difference(answer(made), answer(flux()))


@row("hooks of diffusers that replace a forward (skipped layers)", "honoured")
def layer_skip() -> float:
    from diffusers.hooks import HookRegistry, ModelHook

    class Skip(ModelHook):
        def new_forward(self, module: nn.Module, x: Tensor) -> Tensor:
            return x

    return both(lambda m: HookRegistry.check_if_exists_or_initialize(m.blocks[0]).register_hook(Skip(), "skip"))


@row("`enable_layerwise_casting`", "honoured")
def layerwise_casting() -> float:
    def change(model: Model) -> None:
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)

    return both(change, flux)


@row("layerwise casting that loses numbers at each call", "refused", "writes into")
def lossy_casting() -> None:
    from diffusers.hooks import apply_layerwise_casting

    model = flux()
    apply_layerwise_casting(model, torch.float32, torch.bfloat16, skip_modules_pattern=("norm",))
    answer(parallel(model))


def in_groups(level: str, **options: Any) -> Changes:
    def change(model: Model) -> None:
        blocks = {"num_blocks_per_group": 1} if level == "block_level" else {}
        model.enable_group_offload(onload_device=torch.device("cpu"), offload_device=torch.device("cpu"),
                                   offload_type=level, **blocks, **options)

    return change


def offloaded(change: Changes, make: Callable[[], Model] = flux) -> float:
    """Before it is parallel, before its first call, and after: programs then do it."""
    plain, errors = make(), []
    for when in range(3):
        model = make()
        if when == 0:
            change(model)
        made = parallel(model)
        if when == 2:
            answer(made)
        if when > 0:
            change(made)
        errors += [difference(answer(made), answer(plain)) for _ in range(2)]
        store = made.runners["forward"].store
        assert store is not None and store.offload and any(p.is_meta for p in model.parameters())
        assert len(made.runners["forward"].programs) == 1
    return max(errors)


@row("`enable_group_offload`", "honoured")
def group_offload() -> float:
    return max(offloaded(in_groups(level)) for level in ("leaf_level", "block_level"))


@row("`enable_group_offload` with weights on a disk", "refused", "on a disk")
def group_offload_to_disk() -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = parallel(flux())
        in_groups("leaf_level", offload_to_disk_path=folder)(made)
        answer(made)


@row("`enable_gradient_checkpointing`", "honoured")
def checkpointing() -> float:
    return both(lambda m: m.enable_gradient_checkpointing(), flux, differs=False)


@row("forward chunking", "honoured")
def chunking() -> float:
    from diffusers.models.attention import BasicTransformerBlock

    class Chunked(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.blocks.append(BasicTransformerBlock(16, 2, 8))

    def make() -> Model:
        torch.manual_seed(0)
        return Chunked().eval().requires_grad_(False)

    return both(lambda m: m.blocks[2].set_chunk_feed_forward(6, 1), make, differs=False)


@row("`fuse_qkv_projections`", "honoured")
def fused() -> float:
    return both(lambda m: m.fuse_qkv_projections(), flux, differs=False)


@row("`set_attention_backend` of another package", "honoured")
def attention_backend() -> float:
    return both(lambda m: m.set_attention_backend("flex"), flux, differs=False)


@row("`set_attention_backend` of one of PyTorch's kernels", "refused", "chooses the kernels of attention itself")
def pytorchs_kernel() -> None:
    model = flux()
    with sdpa_kernel(SDPBackend.MATH):  # the caller's
        assert difference(answer(parallel(model)), answer(flux())) <= 1e-5
    refused = []
    for name in ("_native_flash", "_native_efficient", "_native_math"):
        model.set_attention_backend(name)
        try:
            answer(parallel(model))
        except xdit_compile.XditError as error:
            refused.append(error)
    assert len(refused) == 3
    raise refused[0]


@row("adapters of peft", "honoured")
def adapters() -> float:
    from peft import LoraConfig

    def change(model: Model) -> None:
        torch.manual_seed(3)
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
        model.set_adapters("default", 2.0)
        model.requires_grad_(False)
    return both(change, flux)


@row("`from_pipe`", "honoured")
def from_pipe() -> float:
    import pipelines_images
    from diffusers import StableDiffusion3Img2ImgPipeline

    case = pipelines_images.CASES["sd3"]
    plain = case.build()
    made = StableDiffusion3Img2ImgPipeline.from_pipe(parallel(copy.deepcopy(plain)))
    assert type(made) is StableDiffusion3Img2ImgPipeline and made.transformer.runners["forward"].programs == {}
    alone = StableDiffusion3Img2ImgPipeline.from_pipe(plain)
    given = {"image": torch.rand(1, 3, 64, 64), "prompt": "a cat", "strength": 0.5, "num_inference_steps": 4,
             "output_type": "latent", "return_dict": False}
    images = [p(**given, generator=torch.Generator().manual_seed(0))[0] for p in (made, alone)]
    assert len(made.transformer.runners["forward"].programs) == 1
    return difference(*images)


@row("a loaded artifact in a pipeline", "honoured")
def artifact() -> float:
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.xdit"
        doubled_model = tiny()
        doubled(doubled_model)
        xdit_compile.export(doubled_model, "ulysses=1", call(), path, weights="included")
        made = xdit_compile.load(path)
        with made.cache_context("cond"), torch.no_grad():
            return difference(made(**call()), answer(doubled_model))
