"""The sharding spec: a value that parses, prints and refuses."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xdit_compile import ShardingSpec, SpecError
from xdit_compile.spec import EXCHANGE, MODES

values = st.booleans() | st.integers() | st.text('ab,{}"=', max_size=5)
options = st.dictionaries(st.text('ab,{}"=', max_size=5), values | st.lists(values, max_size=2), max_size=2)

specs = st.builds(
    ShardingSpec,
    ulysses_degree=st.integers(1, 128),
    ring_degree=st.integers(2, 128),
    exchange=st.sampled_from(EXCHANGE),
    cfg_degree=st.integers(1, 2),
    data_degree=st.integers(1, 4),
    pipefusion_degree=st.just(1),
    keep=st.sampled_from(["on", "off"]),
    attention_kernel=st.sampled_from(["auto", "torch", "flash_attn", "yunchang"]),
) | st.builds(
    ShardingSpec,
    ring_degree=st.integers(1, 2),
    backend=st.just("inductor"),
    compile_mode=st.sampled_from(MODES),
    compile_options=options,
    attention_kernel=st.sampled_from(["auto", "torch"]),
) | st.builds(
    ShardingSpec,
    backend=st.just("onediff"),
    onediff_backend=st.sampled_from(["", "nexfort", "oneflow", "my-own_1.0"]),
    compile_options=options,
) | st.builds(
    ShardingSpec,
    ulysses_degree=st.integers(1, 8),
    cfg_degree=st.integers(1, 2),
    pipefusion_degree=st.integers(2, 8),
    num_patches=st.integers(0, 16),
    warmup_steps=st.integers(1, 9) | st.just("all"),
) | st.builds(
    lambda n, shard, offload: ShardingSpec(ulysses_degree=n * shard, shard_degree=shard, offload=offload),
    st.integers(1, 8), st.integers(1, 8), st.sampled_from(["none", "block"]),
)


@settings(deadline=None)
@given(specs)
def test_what_is_printed_parses_to_the_same(spec: ShardingSpec) -> None:
    assert ShardingSpec.parse(str(spec)) == spec
    assert str(ShardingSpec.parse(str(spec))) == str(spec)


@settings(deadline=None)
@given(specs)
def test_mapping_of_fields_parses_to_the_same(spec: ShardingSpec) -> None:
    words = {f.name: getattr(spec, f.name) for f in fields(spec)}
    assert ShardingSpec.parse(words) == spec
    assert ShardingSpec.parse({k.removesuffix("_degree"): v for k, v in words.items()}) == spec
    assert ShardingSpec.parse({k: str(v) for k, v in words.items()}) == spec
    assert ShardingSpec.parse(spec) is spec


@settings(deadline=None)
@given(specs)
def test_equal_specs_are_one_key_and_never_change(spec: ShardingSpec) -> None:
    again = ShardingSpec(**{f.name: getattr(spec, f.name) for f in fields(spec)})
    assert {spec: 1}[again] == 1
    with pytest.raises(FrozenInstanceError):
        spec.ulysses_degree = 3  # type: ignore[misc]


@settings(deadline=None)
@given(specs)
def test_world_is_the_product(spec: ShardingSpec) -> None:
    degrees = (spec.data_degree, spec.cfg_degree, spec.pipefusion_degree, spec.ulysses_degree, spec.ring_degree)
    assert spec.world_size == math.prod(degrees)
    spec.check_world(spec.world_size)
    with pytest.raises(SpecError):
        spec.check_world(spec.world_size + 1)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("ulysses=2", ShardingSpec(ulysses_degree=2)),
        ("ulysses=2,ring=3", ShardingSpec(ulysses_degree=2, ring_degree=3)),
        (" ring = 3 , ulysses=2, ", ShardingSpec(ulysses_degree=2, ring_degree=3)),
        ("ulysses_degree=2,ring_degree=3", ShardingSpec(ulysses_degree=2, ring_degree=3)),
        ("ring=2,backend=inductor", ShardingSpec(ring_degree=2, backend="inductor")),
        ("ulysses=2,kernel=torch", ShardingSpec(ulysses_degree=2, attention_kernel="torch")),
        ("ulysses=2,attention_kernel=torch", ShardingSpec(ulysses_degree=2, attention_kernel="torch")),
        ("cfg=2,data=3,ulysses=2", ShardingSpec(ulysses_degree=2, cfg_degree=2, data_degree=3)),
        ("ulysses=4,shard=2", ShardingSpec(ulysses_degree=4, shard_degree=2)),
        ("offload=block", ShardingSpec(offload="block")),
        ("", ShardingSpec()),
        ("ulysses=1", ShardingSpec()),
    ],
)
def test_words_of_the_field(text: str, spec: ShardingSpec) -> None:
    assert ShardingSpec.parse(text) == spec


def test_printed_short_and_without_what_is_usual() -> None:
    assert str(ShardingSpec(ulysses_degree=2, ring_degree=4)) == "ulysses=2,ring=4"
    assert str(ShardingSpec(ring_degree=4, backend="inductor")) == "ring=4,backend=inductor"
    assert str(ShardingSpec()) == "ulysses=1"


def test_pipefusion_words() -> None:
    spec = ShardingSpec.parse("cfg=2,pipefusion=4,patches=8,warmup=2,stage_blocks=3+4+4+4")
    assert (spec.pipefusion_degree, spec.num_patches, spec.warmup_steps) == (4, 8, 2)
    assert str(spec) == "cfg=2,pipefusion=4,patches=8,warmup=2,stage_blocks=3+4+4+4"
    assert spec.patches == 8 and spec.world_size == 8 and spec.model_degree == 4
    assert ShardingSpec.parse("pipefusion=3").patches == 3
    assert ShardingSpec.parse("pipefusion=3,patches=6,warmup=all").patches == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("patches=4", "num_patches belong to pipefusion"),
        ("ulysses=2,warmup=3", "warmup_steps belong to pipefusion"),
        ("stage_blocks=1+1", "stage_blocks belong to pipefusion"),
        ("pipefusion=2,ring=2", "do not go together.*use ulysses"),
        ("pipefusion=2,warmup=0", "at least 1, or all, got 0"),
        ("pipefusion=2,warmup=some", "must be a whole number"),
        ("pipefusion=2,patches=-1", "num_patches must be a whole number"),
        ("pipefusion=2,stage_blocks=3", r"blocks of each of 2 stages, as in 7\+7"),
        ("pipefusion=2,stage_blocks=3+0", "stage_blocks"),
    ],
)
def test_pipefusion_words_that_do_not_go_together(text: str, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        ShardingSpec.parse(text)


def test_unknown_words_are_refused_with_the_known_ones() -> None:
    for spec in ("ulises=2", {"ulises": 2}, "ring=2,ulises=2", {1: 2}):
        with pytest.raises(SpecError, match=r"unknown word '(ulises|1)'.*ulysses.*ring"):
            ShardingSpec.parse(spec)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", ["two", "2.0", "", "2x", "-", "0x2"])
def test_what_is_no_number_is_refused(bad: str) -> None:
    with pytest.raises(SpecError, match="ulysses"):
        ShardingSpec.parse(f"ulysses={bad}")


@pytest.mark.parametrize("bad", [0, -1, 2.0, 2.5, True, None, "2", [2]])
def test_degree_is_a_positive_whole_number(bad: Any) -> None:
    for name in ("ulysses_degree", "ring_degree", "cfg_degree", "data_degree"):
        with pytest.raises(SpecError, match=f"{name} must be a whole number of at least 1"):
            ShardingSpec(**{name: bad})


@pytest.mark.parametrize(
    "text", ["ulysses", "ulysses=", "=2", "2", "ulysses:2", "ulysses=2;ring=2", "ulysses==2"]
)
def test_what_is_no_pair_is_refused(text: str) -> None:
    with pytest.raises(SpecError):
        ShardingSpec.parse(text)


@pytest.mark.parametrize(
    "twice",
    [
        "ulysses=2,ulysses=2",
        "ulysses=2,ulysses_degree=2",
        {"ring": 2, "ring_degree": 2},
        "kernel=torch,attention_kernel=auto",
    ],
)
def test_repeated_words_are_refused(twice: Any) -> None:
    with pytest.raises(SpecError, match="twice"):
        ShardingSpec.parse(twice)


def test_backend_and_kernel_are_named_with_their_choices() -> None:
    with pytest.raises(SpecError, match=r"backend must be one of eager, inductor, onediff, got 'fast'"):
        ShardingSpec.parse("ulysses=2,backend=fast")
    with pytest.raises(SpecError, match=r"attention_kernel must be one of .*flash_attn.*, got 'fast'"):
        ShardingSpec.parse("ulysses=2,kernel=fast")


@pytest.mark.parametrize("bad", [None, 2, 2.0, ["ulysses=2"], ("ulysses", 2)])
def test_what_is_neither_text_nor_mapping_is_refused(bad: Any) -> None:
    with pytest.raises(SpecError):
        ShardingSpec.parse(bad)


def test_spec_error_is_a_value_error() -> None:
    assert issubclass(SpecError, ValueError)


def test_world_that_does_not_fit_is_told_with_degrees_that_do() -> None:
    with pytest.raises(SpecError) as raised:
        ShardingSpec(ulysses_degree=3, ring_degree=2).check_world(4)
    text = str(raised.value)
    assert "3 x 2 = 6" in text and "4 are running" in text
    for fits in ("ulysses=1,ring=4", "ulysses=2,ring=2", "ulysses=4,ring=1"):
        assert fits in text
        ShardingSpec.parse(fits).check_world(4)
    assert "ulysses=3" not in text.split("degrees that fit")[1]
    with pytest.raises(SpecError, match="1 is running"):
        ShardingSpec(ulysses_degree=2).check_world(1)


def test_words_of_compilers() -> None:
    spec = ShardingSpec.parse('ulysses=2,compile_options={"b": "x,}y", "a": {"c": [1, 2]}} , backend=onediff,'
                              "onediff_backend=nexfort")
    assert spec.options == {"a": {"c": [1, 2]}, "b": "x,}y"}
    assert spec == ShardingSpec(ulysses_degree=2, backend="onediff", onediff_backend="nexfort",
                                compile_options={"a": {"c": [1, 2]}, "b": "x,}y"})
    assert str(spec) == (
        'ulysses=2,backend=onediff,onediff_backend=nexfort,compile_options={"a": {"c": [1, 2]}, "b": "x,}y"}')
    modes = [ShardingSpec.parse(f"backend=inductor,{word}=max-autotune") for word in ("mode", "compile_mode")]
    assert modes[0] == modes[1] and str(modes[0]) == "backend=inductor,mode=max-autotune"
    spec.options["a"]["c"].append(3)
    assert spec.options["a"] == {"c": [1, 2]}, "what a spec says never changes"
    assert ShardingSpec(backend="inductor", compile_options={}) == ShardingSpec(backend="inductor")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("mode=max-autotune", "compile_mode has no effect with backend=eager.*say backend=inductor"),
        ("backend=onediff,mode=max-autotune", "compile_mode has no effect with backend=onediff"),
        ("onediff_backend=nexfort", "onediff_backend has no effect with backend=eager.*say backend=onediff"),
        ("backend=inductor,onediff_backend=nexfort", "onediff_backend has no effect with backend=inductor"),
        ('compile_options={"a": 1}', "compile_options has no effect.*backend=inductor or backend=onediff"),
        ("backend=inductor,mode=fastest", "compile_mode must be one of default, .*max-autotune, got 'fastest'"),
        ("backend=onediff,onediff_backend=a b", "onediff_backend is the name of one of"),
        ("backend=inductor,compile_options={a: 1}", "compile_options is no JSON"),
        ('backend=inductor,compile_options={"a": 1', "compile_options is no JSON"),
        ('backend=inductor,compile_options={"a": 1}x', "comes a comma or nothing"),
        ("backend=inductor,compile_options=[1]", "a mapping that JSON can hold"),
        ('backend=inductor,compile_options={"a": NaN}', "a mapping that JSON can hold"),
        ({"backend": "inductor", "compile_options": {"a": print}}, "a mapping that JSON can hold"),
        ({"backend": "inductor", "compile_options": {1: 2}}, "no mapping from names"),
        ({"backend": "inductor", "compile_options": [1]}, "no mapping from names"),
    ],
)
def test_words_of_compilers_that_say_nothing(text: Any, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        ShardingSpec.parse(text)


def test_modes_are_those_of_torch() -> None:
    from torch._inductor import list_mode_options

    assert set(MODES) <= set(list_mode_options())
