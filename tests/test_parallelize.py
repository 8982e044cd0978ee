"""A parallel model stands where the model stood: same call, type and numbers, whatever its owner does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import calls
import pytest
import torch
import torch.distributed as dist
import zoo
from cases import made
from emulation import difference as differs
from marks import whole
from pool import Pool
from torch import nn

import xdit_compile
from xdit_compile.errors import XditError
from xdit_compile.pipelines.spread_encoders import spread

TWO = range(2)
EXACT = 1e-5  # of the output's scale, in float32


def act(pool: Pool, scene: Callable[..., Any], *args: Any) -> list[Any]:
    """What two ranks saw of a scene."""
    return pool.run(scene, *args, ranks=TWO, timeout=150)


def assert_close(errors: dict[str, float]) -> None:
    assert {name: e for name, e in errors.items() if not e <= EXACT} == {}


def assert_counts(seen: dict[str, tuple[float, int]], captures: dict[str, int]) -> None:
    """Every step of a scene is exact and took as many captures as said."""
    assert_close({name: e for name, (e, _) in seen.items()})
    assert {name: n for name, (_, n) in seen.items()} == captures


def test_model_of_diffusers_keeps_class_config_state_call_and_output(pool: Pool) -> None:
    for seen in act(pool, calls.diffusers_stand_in, "flux"):
        captures = {k: seen.pop(k) for k in list(seen) if k.endswith("captures")}
        assert_close({k: seen.pop(k) for k in list(seen) if k.endswith("error")})
        assert {k for k, ok in seen.items() if not ok} == set()
        assert captures == {
            "dict captures": 1,
            "again captures": 0,
            "forward captures": 0,
            "tuple captures": 1,
            "positional captures": 0,
        }


def test_positional_and_keyword_calls_share_one_capture(pool: Pool) -> None:
    for seen in act(pool, calls.shared_by_keyword_and_position):
        assert max(seen["errors"]) <= EXACT
        assert seen["captures"] == 1


def test_python_arguments_are_part_of_a_program(pool: Pool) -> None:
    expected = {"scale 1": 1, "scale 2": 1, "scale 1 again": 0, "label": 1, "shift": 1, "tuple": 1}
    for seen in act(pool, calls.python_arguments):
        assert_counts(seen, expected)


def test_output_dataclass_unknown_to_pytree_keeps_its_type(pool: Pool) -> None:
    for seen in act(pool, calls.output_of_views):
        assert seen.pop("error") <= EXACT
        assert all(seen.values())


def test_cast_acts_on_the_next_call(pool: Pool) -> None:
    for seen in act(pool, calls.casts):
        assert seen["torch.float32"][0] <= EXACT
        assert seen["torch.float64"][0] <= 1e-13
        error, rounding, _ = seen["torch.bfloat16"]
        assert rounding > 1e-4, "bfloat16 must make a difference, or this says nothing"
        assert error <= 2 * rounding
        assert all(same for _, _, same in seen.values())


def test_weights_act_at_the_next_call_without_a_new_capture(pool: Pool) -> None:
    steps = (
        "first",
        "in place",
        "load_state_dict",
        "assign",
        "assign on the model",
        "new parameter",
        "data",
    )
    for seen in act(pool, calls.weights):
        assert_counts(seen, {name: int(name == "first") for name in steps})


def test_tied_weights_may_part(pool: Pool) -> None:
    for seen in act(pool, calls.tied):
        assert_close(seen)


def test_layers_of_one_shape_may_follow_each_other(pool: Pool) -> None:
    """A freed layer's address may be the next one's: identity alone does not tell them apart."""
    for seen in act(pool, calls.exchanged_modules):
        assert max(seen) <= EXACT, seen


def test_layer_of_another_kind_is_captured(pool: Pool) -> None:
    for error, captures in act(pool, calls.other_layer):
        assert error <= EXACT
        assert captures == 1


@pytest.mark.parametrize("kind", ["tripled", "written out"])
def test_attention_processor_acts_at_the_next_call(pool: Pool, kind: str) -> None:
    for seen in act(pool, calls.processors, kind):
        assert_counts(seen, {"as built": 1, "exchanged": 1})


def test_plain_objects_that_a_forward_consults_may_change(pool: Pool) -> None:
    for seen in act(pool, calls.own_processors):
        assert_close(seen)


@pytest.mark.parametrize("where", ["model", "parallel", "block"])
def test_attribute_acts_at_the_next_call(pool: Pool, where: str) -> None:
    for seen in act(pool, calls.attributes, where):
        assert_close(seen)


@pytest.mark.parametrize("where", ["layer", "output", "input"])
def test_hooks_run_once_whenever_they_are_registered(pool: Pool, where: str) -> None:
    for seen in act(pool, calls.hooks, where):
        assert_close(seen)


@pytest.mark.parametrize(
    "modes",
    [("plain", "autocast", "plain"), ("autocast", "plain", "autocast"), ("inference", "plain", "no grad")],
    ids=", ".join,
)
def test_modes_act_on_their_call_only(pool: Pool, modes: tuple[str, ...]) -> None:
    for seen in act(pool, calls.modes, *modes):
        for mode, (error, same_dtype) in zip(modes, seen, strict=True):
            assert same_dtype, (mode, seen)
            assert error <= (0.02 if mode == "autocast" else EXACT), (mode, seen)


def test_memory_format_of_inputs_does_not_matter(pool: Pool) -> None:
    for seen in act(pool, calls.strides):
        assert_close(seen)


def test_each_shape_is_captured_once_for_all_specs(pool: Pool) -> None:
    expected = {
        "7 tokens": 1,
        "12 tokens": 1,
        "7 again": 0,
        "batch of 3": 1,
        "12 again": 0,
        "another spec": 0,
    }
    for seen in act(pool, calls.shapes):
        assert_counts(seen, expected)


@pytest.mark.parametrize("name", [whole("qwen_image"), "wan"])
def test_model_itself_goes_on_as_before(pool: Pool, name: str) -> None:
    for seen in act(pool, calls.between, name):
        assert_close(seen)


def test_no_gradients(pool: Pool) -> None:
    for seen in act(pool, calls.gradients):
        assert not seen["under no_grad"] and not seen["under grad"]
        assert seen["allowed"] == ("", "")
        assert seen["refused"][0] == "XditError" and "gradient" in seen["refused"][1]
        assert seen["after"] <= EXACT


def test_unknown_and_missing_arguments_raise_as_the_model_does(pool: Pool) -> None:
    for seen in act(pool, calls.unknown_keyword):
        assert seen["parallel"][0] == seen["model"][0] == "TypeError"
        assert "colour" in seen["parallel"][1]
        assert seen["missing"][0] == "TypeError" and "step" in seen["missing"][1]
        assert seen["after"] <= EXACT


@pytest.mark.parametrize("way", ["to_empty", "assign", "meta inputs"])
def test_capture_ahead_on_meta_serves_the_loaded_model(pool: Pool, way: str) -> None:
    for seen in act(pool, calls.captured_ahead, way):
        assert seen["ahead"] == 1
        assert seen["error"] <= EXACT
        assert seen["then"] == 0
        assert seen["positional"] == ("", "")
        assert seen["positional captures"] == 0


def test_masks_that_are_read_get_their_own_programs(pool: Pool) -> None:
    for seen in act(pool, calls.masks):
        assert_counts(seen, {"first": 1, "fewer": 1, "moved": 1, "first again": 0})


def test_rank_of_two_groups_of_one_shape(pool: Pool) -> None:
    seen = pool.run(calls.overlapping, ranks=range(3), timeout=150)
    assert [len(errors) for errors in seen] == [4, 2, 2]
    assert max(e for errors in seen for e in errors) <= EXACT


def test_dump_is_called_with_each_pass(pool: Pool) -> None:
    for names in act(pool, calls.dumped):
        assert len(names) >= 3 and len(set(names)) == len(names)


def test_one_process_needs_no_group() -> None:
    assert not dist.is_initialized()
    model, call = calls.made(), calls.inputs()
    for spec in ("ulysses=1", "", {}, xdit_compile.ShardingSpec()):
        p = xdit_compile.parallelize(model, spec)
        assert isinstance(p, calls.Tiny)
        assert calls.differs(p, model, **call) <= EXACT
    assert not dist.is_initialized()


def test_more_processes_need_a_launcher() -> None:
    assert not dist.is_initialized()
    with pytest.raises(xdit_compile.XditError, match="torchrun"):
        xdit_compile.parallelize(calls.made(), "ulysses=2")


def test_hidden_state_is_not_needed_to_print_copy_and_save(tmp_path: Any) -> None:
    model = calls.made()
    p = xdit_compile.parallelize(model, "ulysses=1")
    assert repr(p) == repr(model)
    torch.save(p.state_dict(), tmp_path / "weights")
    again = calls.made(seed=1)
    again.load_state_dict(torch.load(tmp_path / "weights"))
    assert calls.differs(again, model, **calls.inputs()) == 0


class Twice:
    """A pipeline two components of which are one model."""

    def __init__(self, model: nn.Module) -> None:
        self.transformer = self.transformer_2 = model

    @property
    def components(self) -> dict[str, nn.Module]:
        return {"transformer": self.transformer, "transformer_2": self.transformer_2}

    def __call__(self) -> None: ...


def test_components_that_are_one_stay_one() -> None:
    """What one parallel model gives up, a second would not find."""
    pipe = xdit_compile.parallelize(Twice(made(zoo.CASES["dit"])), "ulysses=1")
    assert pipe.transformer is pipe.transformer_2


@pytest.mark.parametrize("rank", [0, 1])
def test_an_encoder_lives_on_one_rank_for_one_pipeline(rank: int) -> None:
    """Whoever has its weights and whoever has none: all refuse alike."""
    encoder, group = nn.Linear(2, 2), cast(Any, SimpleNamespace(rank=rank))
    spread(encoder, group, 0)
    with pytest.raises(XditError, match="lives on one rank already"):
        spread(encoder, group, 1)


def test_a_model_whose_weights_another_has_given_up_is_told() -> None:
    model, inputs = made(zoo.CASES["dit"]), zoo.CASES["dit"].inputs(1, False)
    first, second = (xdit_compile.parallelize(model, spec) for spec in ("ulysses=1", "offload=block"))
    with torch.no_grad():
        first(**inputs)
        second(**inputs)
        for parallel in (first, xdit_compile.parallelize(model, "ulysses=1")):
            with pytest.raises(XditError, match=r"were given up, .* by another parallel model"):
                parallel(**inputs)
        second(**inputs)


BEFORE: dict[str, Callable[[Any], Any]] = {
    "apply": lambda m: m.apply(lambda module: torch.nn.init.constant_(module.weight, 0.01) if isinstance(
        module, nn.Linear) else None),
    "adapter": lambda m: m.load_lora_adapter({
        f"transformer.{n}.{key}.weight": torch.full(shape, 0.1) for n, layer in m.named_modules() if n.endswith("to_q")
        for key, shape in (("lora_A", (2, layer.in_features)), ("lora_B", (layer.out_features, 2)))},
        prefix="transformer"),
    "cast": lambda m: m.to(torch.float64).to(torch.float32),
    "weights": lambda m: m.load_state_dict({n: 0.5 * t for n, t in m.state_dict().items()}),
    "hook": lambda m: m.register_forward_hook(lambda module, args, out: (2 * out[0],)),
}


@torch.no_grad()
def test_edits_before_the_spec_is_chosen() -> None:
    """Under auto it is at the first call; all that is done to the model before is in the answer."""
    case = zoo.CASES["sd3"]
    plain, inputs = made(case), case.inputs(1, False) | {"return_dict": False}
    model = xdit_compile.parallelize(copy.deepcopy(plain), "auto,machine=1xh100")
    for edit in BEFORE.values():
        edit(model)
        edit(plain)
    assert differs(model(**inputs)[0], plain(**inputs)[0]) <= EXACT
