"""Attention kernels against the definition of attention in float64."""

from __future__ import annotations

import dataclasses
import inspect
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from xdit_compile.errors import SpecError, XditError
from xdit_compile.kernels import KERNELS, KernelUnavailable, attention, attention_lse, merge, resolve
from xdit_compile.kernels import torch_kernel as native
from xdit_compile.kernels.base import ampere_or_newer

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))
DEVICES = ["cpu", CUDA]
B, H, SQ, SK, D = 2, 4, 9, 13, 16
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T scale + mask) v and its log-sum-exp, head by head in float64."""
    group = q.shape[1] // max(k.shape[1], 1)
    q, k, v = q.double(), k.double(), v.double()
    heads = []
    scores = q.new_zeros(*q.shape[:3], k.shape[2])
    for head in range(q.shape[1]):
        scores[:, head] = q[:, head] @ k[:, head // group].mT * (scale or q.shape[-1] ** -0.5)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    weights = scores.exp()
    total = weights.sum(-1)
    for head in range(q.shape[1]):
        heads.append(weights[:, head] @ v[:, head // group] / total[:, head, :, None].clamp_min(1e-300))
    out = torch.stack(heads, 1) if heads else q.new_zeros(*q.shape[:3], v.shape[3])
    return out, total.log()


def make(
    sq: int = SQ, sk: int = SK, *, batch: int = B, heads: int = H, kv_heads: int | None = None, dim: int = D,
    value_dim: int | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    kv_heads = heads if kv_heads is None else kv_heads
    shapes = (batch, heads, sq, dim), (batch, kv_heads, sk, dim), (batch, kv_heads, sk, value_dim or dim)
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    return q, k, v


def boolean(*shape: int, device: str = "cpu") -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.6).to(device)


def additive(mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random finite terms where `mask` attends, -inf elsewhere."""
    terms = torch.randn(mask.shape, generator=torch.Generator().manual_seed(2)).to(mask.device, dtype)
    return terms.masked_fill(~mask, -math.inf)


def check(
    inputs: tuple[Tensor, Tensor, Tensor], mask: Tensor | None = None, scale: float | None = None
) -> None:
    """Both operators agree with the definition, in dtype, shape and value, and with their fake kernels."""
    q, _, v = inputs
    out, lse = attention_lse(*inputs, mask, scale, "torch")
    expected, expected_lse = reference(*inputs, mask, scale)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    assert out.shape == (*q.shape[:3], v.shape[3]) and lse.shape == q.shape[:3]
    tolerance = TOLERANCE[q.dtype]
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(attention(*inputs, mask, scale, "torch"), out, rtol=0, atol=0)
    with FakeTensorMode() as mode:
        given = [None if tensor is None else mode.from_tensor(tensor) for tensor in (*inputs, mask)]
        fakes = attention_lse(*given, scale, "torch")
    for fake, real in zip(fakes, (out, lse), strict=True):
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


MASKS = {
    "full": (B, H, SQ, SK), "heads": (B, 1, SQ, SK), "batch": (1, H, SQ, SK), "keys": (B, 1, 1, SK),
    "rows": (B, 1, SQ, 1), "matrix": (SQ, SK), "vector": (SK,), "one": (1, 1, 1, 1), "scalar": (),
}  # fmt: skip


class TestAttention:
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    def test_dtypes(self, dtype: torch.dtype, device: str) -> None:
        inputs = make(dtype=dtype, device=device)
        check(inputs)
        check(inputs, boolean(B, 1, 1, SK, device=device))
        check(inputs, additive(boolean(B, 1, SQ, SK, device=device), dtype))
        check(inputs, additive(boolean(B, 1, SQ, SK, device=device)))

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("value_dim", [D, 12])
    @pytest.mark.parametrize("shape", MASKS.values(), ids=MASKS)
    def test_masks_broadcast(self, shape: tuple[int, ...], value_dim: int, device: str) -> None:
        mask = boolean(*shape, device=device)
        inputs = make(value_dim=value_dim, kv_heads=2, device=device)
        check(inputs, mask)
        check(inputs, additive(mask))

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("value_dim", [D, 12])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_rows_without_keys_are_zero(self, dtype: torch.dtype, value_dim: int, device: str) -> None:
        inputs = make(value_dim=value_dim, dtype=dtype, device=device)
        mask = boolean(1, 1, SQ, SK, device=device)
        mask[..., 3, :] = False
        for form in (mask, additive(mask, dtype), torch.zeros_like(mask)):
            check(inputs, form)
            out, lse = attention_lse(*inputs, form, None, "torch")
            assert out[:, :, 3].eq(0).all() and lse[:, :, 3].eq(-math.inf).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_single_device_attention_agrees_on_rows_without_keys(self, dtype: torch.dtype) -> None:
        """What the parallel program must equal: PyTorch, too, gives 0 there rather than NaN."""
        q, k, v = make(dtype=dtype)
        nothing = torch.zeros(SQ, SK, dtype=torch.bool)
        for mask in (nothing, additive(nothing, dtype)):
            assert torch.nn.functional.scaled_dot_product_attention(q, k, v, mask).eq(0).all()
        assert torch.nn.functional.scaled_dot_product_attention(q, k[:, :, :0], v[:, :, :0]).eq(0).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_lowest_finite_mask_is_not_minus_infinity(self, dtype: torch.dtype) -> None:
        mask = torch.full((B, 1, 1, SK), torch.finfo(torch.float32).min)
        q, k, v = make(dtype=dtype)
        out, lse = attention_lse(q, k, v, mask, None, "torch")
        average = v.float().mean(2, keepdim=True).expand_as(out)
        torch.testing.assert_close(out.float(), average, atol=2e-2, rtol=2e-2)
        assert lse.isfinite().all()

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize(
        "sizes",
        [
            {"kv_heads": 1, "dim": 16},
            {"kv_heads": 2, "dim": 16},
            {"kv_heads": 2, "dim": 16, "value_dim": 8},
            {"kv_heads": 4, "dim": 5, "value_dim": 7},
        ],
        ids=str,
    )
    def test_grouped_queries_and_head_sizes(self, sizes: dict[str, int], device: str) -> None:
        inputs = make(**sizes, device=device)
        check(inputs, scale=0.3)
        check(inputs, boolean(B, H, SQ, SK, device=device), scale=0.3)

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize(
        "sizes",
        [{"sq": 0}, {"sk": 0}, {"batch": 0}, {"heads": 0}, {"sq": 0, "sk": 0}, {"sk": 0, "kv_heads": 2}],
        ids=str,
    )
    def test_empty(self, sizes: dict[str, int], device: str) -> None:
        inputs = make(**sizes, device=device)
        check(inputs)
        check(inputs, torch.ones(inputs[0].shape[2], inputs[1].shape[2], dtype=torch.bool, device=device))

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("value_dim", [D, 12])
    def test_strides(self, value_dim: int, device: str) -> None:
        mask = boolean(B, 1, SQ, SK, device=device)
        transposed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in make(value_dim=value_dim)]
        sliced = [torch.cat([x, x], -1)[..., : x.shape[-1]] for x in make(value_dim=value_dim)]
        strange = [x.mT.contiguous().mT for x in make(value_dim=value_dim)]  # last dimension not contiguous
        q, k, v = make(batch=1, value_dim=value_dim)
        expanded = [q.expand(B, -1, -1, -1), k.expand(B, -1, -1, -1), v.expand(B, -1, -1, -1)]
        for inputs in (transposed, sliced, strange, expanded):
            on_device = tuple(x.to(device) for x in inputs)
            check(on_device)
            check(on_device, mask)
            check(on_device, additive(mask).mT.contiguous().mT)

    def test_long_rows_whose_first_blocks_are_masked(self) -> None:
        mask = torch.ones(1, 1, 1, 1500, dtype=torch.bool)
        mask[..., :1300] = False
        check(make(600, 1500, batch=1, heads=1), mask)

    def test_refuses_what_does_not_fit(self) -> None:
        q, k, v = make()
        with pytest.raises(ValueError, match="do not fit"):
            attention_lse(q, k[:, :3], v[:, :3], None, None, "torch")
        with pytest.raises(ValueError, match="do not fit"):
            attention_lse(q, k[..., :8], v, None, None, "torch")
        with pytest.raises(ValueError, match="no attention kernel"):
            attention(q, k, v, None, None, "nonesuch")
        with pytest.raises(KernelUnavailable, match="CUDA devices only"):
            attention(q, k, v, None, None, "flash_attn")


class TestTracing:
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("value_dim", [D, 12])
    def test_opcheck(self, masked: bool, value_dim: int) -> None:
        inputs = make(value_dim=value_dim, kv_heads=2)
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs)
        mask = boolean(B, 1, 1, SK) if masked else None
        torch.library.opcheck(attention_lse, (q, k, v, mask, None, "torch"))
        torch.library.opcheck(attention, (q, k, v, mask, 0.5, "torch"))

    def test_compile_equals_eager(self) -> None:
        def ring(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            q = q * 2
            first = attention_lse(q, k[:, :, :5], v[:, :, :5], mask[..., :5], None, "torch")
            second = attention_lse(q, k[:, :, 5:], v[:, :, 5:], mask[..., 5:], None, "torch")
            return merge(*first, *second)[0].transpose(1, 2).flatten(2)

        inputs = (*make(), boolean(B, 1, 1, SK))
        compiled = torch.compile(ring, fullgraph=True)(*inputs)
        torch.testing.assert_close(compiled, ring(*inputs), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            compiled.view(B, SQ, H, D).transpose(1, 2).double(),
            reference(inputs[0] * 2, *inputs[1:])[0],
            atol=1e-5,
            rtol=1e-5,
        )

    def test_export_keeps_the_operator(self) -> None:
        class Model(torch.nn.Module):
            def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return attention(q, k, v, None, None, "torch")

        inputs = make()
        length = {2: torch.export.Dim("length", min=2, max=512)}
        program = torch.export.export(Model(), inputs, dynamic_shapes=({}, length, length))
        assert attention in [node.target for node in program.graph.nodes]
        longer = make(SQ, 40)
        torch.testing.assert_close(program.module()(*longer), Model()(*longer))

    def test_flop_count(self) -> None:
        inputs = make(kv_heads=2, value_dim=12)
        for op in (attention, attention_lse):
            with FlopCounterMode(display=False) as counter:
                op(*inputs, boolean(SQ, SK), None, "torch")
            assert counter.get_total_flops() == 2 * B * H * SQ * SK * (D + 12)


class TestMerge:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("sizes", [(13,), (6, 7), (1, 9, 3), (0, 12, 0, 1), (5, 0, 0, 8)], ids=str)
    @pytest.mark.parametrize("masked", [False, True])
    def test_chunks_equal_the_whole(self, sizes: tuple[int, ...], dtype: torch.dtype, masked: bool) -> None:
        q, k, v = make(dtype=dtype, kv_heads=2)
        mask = boolean(B, 1, SQ, SK)
        mask[:, :, 2, :6] = False  # no key in the first chunks
        mask[:, :, 4] = False  # no key at all
        out, lse = None, None
        for at, size in zip(torch.tensor([0, *sizes]).cumsum(0).tolist(), sizes, strict=False):
            chunk = slice(at, at + size)
            part = attention_lse(
                q, k[:, :, chunk], v[:, :, chunk], mask[..., chunk] if masked else None, None, "torch"
            )
            out, lse = part if out is None else merge(out, lse, *part)
        expected, expected_lse = reference(q, k, v, mask if masked else None)
        torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        # Processors that multiply in bfloat16 add up otherwise than those that convert.
        close = 1e-5 if dtype.itemsize > 2 else 1e-4
        torch.testing.assert_close(lse.double(), expected_lse, atol=close, rtol=close)

    def test_accumulates_in_float32(self) -> None:
        q, k, v = make(dtype=torch.bfloat16)
        part = attention_lse(q, k, v, None, None, "torch")
        out, lse = merge(*part, *part)
        assert out.dtype == lse.dtype == torch.float32
        torch.testing.assert_close(out, part[0].float())
        torch.testing.assert_close(lse, part[1] + math.log(2))

    def test_nothing_is_neutral(self) -> None:
        out, lse = attention_lse(*make(), None, None, "torch")
        nothing = torch.zeros_like(out), torch.full_like(lse, -math.inf)
        for merged in (merge(out, lse, *nothing), merge(*nothing, out, lse)):
            assert torch.equal(merged[0], out) and torch.equal(merged[1], lse)
        neither = merge(*nothing, *nothing)
        assert torch.equal(neither[0], nothing[0]) and torch.equal(neither[1], nothing[1])

    def test_weights_of_any_size(self) -> None:
        one, two = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 2.0)
        for lse_a, lse_b, expected in ((500.0, -500.0, 1.0), (-500.0, 500.0, 2.0), (700.0, 700.0, 1.5)):
            out, lse = merge(one, torch.full((1, 1, 1), lse_a), two, torch.full((1, 1, 1), lse_b))
            assert out.item() == pytest.approx(expected)
            assert lse.item() == pytest.approx(max(lse_a, lse_b), abs=1)


class TestCudaOperatorContracts:
    """How PyTorch's CUDA operators are called, checked without a GPU by stand-ins with their conventions."""

    @pytest.mark.parametrize("shape", [None, *MASKS.values()], ids=str)
    @pytest.mark.parametrize("form", ["boolean", "additive", "offset slice"])
    def test_efficient(
        self, shape: tuple[int, ...] | None, form: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def efficient(
            q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, with_lse: bool, *, scale: float | None
        ) -> tuple[Tensor, ...]:
            assert q.shape[1] == k.shape[1] == v.shape[1] and with_lse
            if bias is not None:
                assert bias.shape == (*q.shape[:3], k.shape[2]) and bias.dtype == q.dtype
                *outer, last = bias.stride()
                assert last == 1 and not any(start % 8 for start in (*outer, bias.storage_offset()))
            out, lse = reference(q, k, v, bias, scale)
            lse = lse.masked_fill(lse == -math.inf, 0.0)
            padded = torch.nn.functional.pad(lse, (0, -q.shape[2] % 32), value=math.inf)
            return out.to(q.dtype), padded.float(), torch.empty(0), torch.empty(0)

        monkeypatch.setattr(native, "_cuda_efficient", efficient)
        inputs = make(kv_heads=2, value_dim=8)
        mask = None if shape is None else boolean(*shape)
        if mask is not None and form != "boolean":
            mask = additive(mask)
        if mask is not None and form == "offset slice":
            mask = torch.nn.functional.pad(mask[None], (3, 0))[0][..., 3:] if mask.ndim else mask
        out, lse = native._efficient(*inputs, mask, 0.3)
        expected, expected_lse = reference(*inputs, mask, 0.3)
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)

    def test_efficient_takes_an_aligned_bias_without_copying(self) -> None:
        bias = torch.zeros(B, 1, SQ, 16)
        aligned = native._align(bias, (B, H, SQ, 16))
        assert aligned.data_ptr() == bias.data_ptr()

    def test_efficient_agrees_with_pytorchs_own_shape_function(self) -> None:
        q, k, v = (x.to("meta") for x in make(kv_heads=2, dtype=torch.bfloat16))
        out, lse = native._efficient(q, k, v, torch.empty(SQ, SK, dtype=torch.bool, device="meta"), None)
        assert out.shape == q.shape and lse.shape == q.shape[:3]

    def test_choice_of_operator(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(native, "_flash_is_built", lambda: True)
        monkeypatch.setattr(native, "ampere_or_newer", lambda: True)
        half, single, double = torch.bfloat16, torch.float32, torch.float64
        mask = boolean(SQ, SK)
        for dtype, dim, value_dim, given, flash, efficient in (
            (half, 64, 64, None, True, True),
            (half, 64, 64, mask, False, True),
            (half, 64, 64, additive(mask), False, False),  # float32 beside bfloat16
            (half, 68, 68, None, False, False),
            (half, 320, 320, None, False, True),
            (half, 64, 32, None, False, True),
            (single, 68, 68, mask, False, True),
            (single, 5, 5, None, False, False),
            (double, 64, 64, None, False, False),
        ):
            q, _, v = make(dim=dim, value_dim=value_dim, dtype=dtype)
            assert native._fits_cuda_flash(q, v, given) == flash
            assert native._fits_cuda_efficient(q, v, given) == efficient


FLASH_ATTN = """
import torch
__version__ = "2.8.3"
CALLS = []

def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
                    softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False):
    CALLS.append(dict(shape=tuple(q.shape), dropout_p=dropout_p, causal=causal, probs=return_attn_probs))
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    width = q.shape[-1]
    q, k, v = (torch.nn.functional.pad(x, (0, -width % 8)) if width % 8 else x for x in (q, k, v))
    rows = torch.empty_like(q if q.stride(-1) == 1 else q.contiguous())
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * scale
    out = rows.copy_((scores.softmax(-1) @ v).transpose(1, 2))[..., :width]
    return (out, scores.float().logsumexp(-1), None) if return_attn_probs else out
"""

YUNCHANG_KERNELS = """
from enum import Enum
import flash_attn
CALLS = []

class AttnType(Enum):
    FA = "fa"
    FA3 = "fa3"

def select_flash_attn_impl(impl_type, stage="fwd-bwd", attn_processor=None):
    assert stage == "fwd-only"
    def attend(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=None,
               alibi_slopes=None, return_softmax=False):
        assert softmax_scale is not None and softcap is not None
        CALLS.append(dict(type=impl_type.value, shape=tuple(q.shape), causal=causal, window=window_size))
        return flash_attn.flash_attn_func(q, k, v, dropout_p, softmax_scale, return_attn_probs=True)[:2]
    return attend
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that puts a stand-in package, given as {file: source}, first on the import path.

    Without a call there is neither flash_attn nor yunchang, even on a machine that has them.
    """
    roots = ("flash_attn", "yunchang")
    for name in [name for name in sys.modules if name.split(".")[0] in roots]:
        monkeypatch.delitem(sys.modules, name)
    for root in roots:
        monkeypatch.setitem(sys.modules, root, None)
    monkeypatch.syspath_prepend(tmp_path)

    def put(package: str, files: dict[str, str]) -> None:
        (tmp_path / package).mkdir()
        for file, source in files.items():
            (tmp_path / package / file).write_text(source)
        monkeypatch.delitem(sys.modules, package)

    yield put
    for name in [name for name in sys.modules if name.split(".")[0] in roots]:
        del sys.modules[name]  # before monkeypatch restores the real ones


def install_yunchang(install, has_fa3: bool = False) -> None:
    install(
        "yunchang",
        {
            "__init__.py": "from .globals import set_seq_parallel_pg",
            "globals.py": f"HAS_FLASH_ATTN_HOPPER = {has_fa3}\ndef set_seq_parallel_pg(): ...",
            "kernels.py": YUNCHANG_KERNELS,
        },
    )


def ask(requested: str, device: str = "cuda", **changes: object) -> str:
    request: dict = {"dtype": torch.bfloat16, "head_dim": 64, "value_dim": 64, "masked": False}
    return resolve(requested, device=torch.device(device), **{**request, **changes})


@pytest.mark.skipif(not ampere_or_newer(), reason="this GPU is too old for FlashAttention")
class TestResolve:
    def test_torch_does_everything(self, install) -> None:
        for device in ("cpu", "cuda", "mps"):
            for requested in ("auto", "torch"):
                assert ask(requested, device, dtype=torch.float64, value_dim=3, masked=True) == "torch"
        assert ask("auto") == "torch"

    def test_unknown_name(self) -> None:
        with pytest.raises(SpecError, match=r"'flash'.*'auto', 'torch', 'flash_attn', .*'yunchang'"):
            ask("flash")

    @pytest.mark.parametrize(("kernel", "extra"), [("flash_attn", "flash-attn"), ("yunchang", "yunchang")])
    def test_missing_package_names_its_extra(self, kernel: str, extra: str, install) -> None:
        with pytest.raises(KernelUnavailable) as error:
            ask(kernel)
        for part in (repr(kernel), "not installed", f"xdit-compile[{extra}]", "'auto' or 'torch'"):
            assert part in str(error.value)
        assert isinstance(error.value, XditError)

    @pytest.mark.parametrize("kernel", ["flash_attn", "yunchang"])
    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"device": "cpu"}, "not on 'cpu'"),
            ({"dtype": torch.float32}, "not in torch.float32"),
            ({"masked": True}, "no attention mask"),
            ({"value_dim": 32}, "not 32 beside 64"),
            ({"head_dim": 512, "value_dim": 512}, "up to 256, not 512"),
        ],
        ids=str,
    )
    def test_inability_names_its_reason(self, kernel: str, changes: dict, reason: str, install) -> None:
        install("flash_attn", {"__init__.py": FLASH_ATTN})
        install_yunchang(install)
        with pytest.raises(KernelUnavailable, match=reason):
            ask(kernel, **changes)
        assert ask("auto", **changes) == "torch"

    def test_installed_and_able(self, install) -> None:
        install("flash_attn", {"__init__.py": FLASH_ATTN})
        install_yunchang(install)
        assert [ask(name) for name in ("auto", "flash_attn", "yunchang")] == ["flash_attn"] * 2 + ["yunchang"]
        assert ask("flash_attn", head_dim=60, value_dim=60) == "flash_attn"
        with pytest.raises(KernelUnavailable, match="multiple of 8, not 60"):
            ask("yunchang", head_dim=60, value_dim=60)

    def test_broken_package_shows_its_own_error(self, install) -> None:
        install("flash_attn", {"__init__.py": "raise ImportError('undefined symbol: _ZN3c10')"})
        with pytest.raises(KernelUnavailable, match=r"fails to import: undefined symbol: _ZN3c10"):
            ask("flash_attn")
        with pytest.warns(RuntimeWarning, match="undefined symbol: _ZN3c10"):
            assert ask("auto") == "torch"

    def test_faults_other_than_import_errors_are_not_hidden(self, install) -> None:
        install("flash_attn", {"__init__.py": "raise ZeroDivisionError('theirs')"})
        with pytest.raises(ZeroDivisionError, match="theirs"):
            ask("auto")

    def test_another_project_of_the_same_name(self, install) -> None:
        install("flash_attn", {"__init__.py": ""})
        with pytest.raises(KernelUnavailable, match="no 'flash_attn_func'"):
            ask("flash_attn")

    def test_yunchang_without_flash_attention(self, install) -> None:
        install_yunchang(install)
        with pytest.raises(KernelUnavailable, match=r"calls FlashAttention, but .*\[flash-attn\]"):
            ask("yunchang")


class TestPackages:
    """How flash-attn (2.8.3) and yunchang (0.6.4) are called, by stand-ins with their signatures."""

    @pytest.mark.parametrize("scale", [None, 0.3])
    def test_flash_attn_call(self, scale: float | None, install) -> None:
        install("flash_attn", {"__init__.py": FLASH_ATTN})
        self.compare("flash_attn", scale)
        assert sys.modules["flash_attn"].CALLS == [
            {"shape": (B, SQ, H, D), "dropout_p": 0.0, "causal": False, "probs": True}
        ]

    @pytest.mark.parametrize("scale", [None, 0.3])
    def test_yunchang_call(self, scale: float | None, install) -> None:
        install("flash_attn", {"__init__.py": FLASH_ATTN})
        install_yunchang(install)
        self.compare("yunchang", scale)
        assert sys.modules["yunchang.kernels"].CALLS == [
            {"type": "fa", "shape": (B, SQ, H, D), "causal": False, "window": (-1, -1)}
        ]

    def test_yunchang_takes_fa3_on_hopper(self, install, monkeypatch: pytest.MonkeyPatch) -> None:
        install("flash_attn", {"__init__.py": FLASH_ATTN})
        install_yunchang(install, has_fa3=True)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        for capability, chosen in (((9, 0), "fa3"), ((8, 0), "fa")):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
            self.compare("yunchang", None)
            assert sys.modules["yunchang.kernels"].CALLS[-1]["type"] == chosen

    @pytest.mark.parametrize("kernel", ["flash_attn", "yunchang"])
    @pytest.mark.parametrize("layout", ["heads", "rows", "sliced", "strange"])
    @pytest.mark.parametrize("dim", [16, 12])
    def test_compiled_graphs_call_them(
        self, kernel: str, layout: str, dim: int, install, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On a CPU that is taken for able: results, and the strides that compiled code was told of."""
        install("flash_attn", {"__init__.py": FLASH_ATTN})
        install_yunchang(install)
        able = dataclasses.replace(KERNELS[kernel], supports=lambda *a: None)
        monkeypatch.setitem(KERNELS, kernel, able)
        lay = {
            "heads": lambda x: x,
            "rows": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
            "sliced": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
            "strange": lambda x: x.mT.contiguous().mT,
        }[layout]
        q, k, v = map(lay, make(kv_heads=2, dim=dim))
        torch.library.opcheck(attention_lse, (q, k, v, None, None, kernel), test_utils="test_faketensor")

        def block(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            out, lse = attention_lse(q, k, v, None, 0.3, kernel)
            return attention(q, k, v, None, 0.3, kernel).as_strided(out.shape, out.stride()), lse

        torch._dynamo.reset()
        out, lse = torch.compile(block, fullgraph=True, backend="aot_eager")(q, k, v)
        expected, expected_lse = reference(q, k, v, None, 0.3)
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)
        assert sys.modules["flash_attn"].CALLS

    @pytest.mark.skipif(not ampere_or_newer(), reason="this GPU is too old for FlashAttention")
    @pytest.mark.parametrize("kernel", ["flash_attn", "yunchang"])
    def test_programs_for_them_need_neither_package_nor_device(self, kernel: str, install) -> None:
        with FakeTensorMode() as mode:
            q, k, v = (
                FakeTensor(mode, torch.empty(shape, dtype=torch.bfloat16, device="meta"), torch.device("cuda:0"))
                for shape in [(B, H, SQ, 64), (B, 2, SK, 64), (B, 2, SK, 64)]
            )

            def block(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
                return (*attention_lse(q, k, v, None, None, kernel), attention(q * 2, k, v, None, None, kernel))

            graph = make_fx(block)(q, k, v).graph
        (results,) = (n.args[0] for n in graph.nodes if n.op == "output")
        out, lse, other = (n.meta["val"] for n in results)
        assert out.shape == other.shape == (B, H, SQ, 64) and out.dtype == other.dtype == torch.bfloat16
        assert lse.shape == (B, H, SQ) and lse.dtype == torch.float32
        assert {x.device for x in (out, lse, other)} == {torch.device("cuda:0")}
        assert [n.target for n in graph.nodes if "attention" in str(n.target)] == [attention_lse, attention]
        with pytest.raises(KernelUnavailable, match="not installed"):
            ask(kernel)

    def compare(self, kernel: str, scale: float | None) -> None:
        """The kernel's function itself: the operators rightly refuse it on a CPU."""
        inputs = make(kv_heads=2)
        out, lse = KERNELS[kernel].forward(*inputs, None, scale)
        expected, expected_lse = reference(*inputs, None, scale)
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)

    def test_installed_flash_attn_has_the_signature(self) -> None:
        package = pytest.importorskip("flash_attn")
        inspect.signature(package.flash_attn_func).bind(0, 0, 0, softmax_scale=None, return_attn_probs=True)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
    @pytest.mark.parametrize("kernel", ["flash_attn", "yunchang"])
    def test_installed_kernels_compute_attention(self, kernel: str) -> None:
        if KERNELS[kernel].available() is not None:
            pytest.skip(f"{kernel} is not installed")
        inputs = make(dim=64, kv_heads=2, dtype=torch.bfloat16, device="cuda")
        out, lse = attention_lse(*inputs, None, None, kernel)
        expected, expected_lse = reference(*inputs)
        torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(lse.double(), expected_lse, atol=2e-2, rtol=2e-2)


def test_importing_imports_no_optional_package() -> None:
    code = ("import sys, torch.utils.flop_counter; before = {*sys.modules}; import xdit_compile.kernels; "
            "print({'flash_attn', 'yunchang', 'triton', 'xformers', 'sageattention'} & {*sys.modules} - before)")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
