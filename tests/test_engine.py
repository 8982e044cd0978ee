"""A handle in an ordinary process on ranks in others: the same answers, and an end to every call."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import engine_makers
import numpy as np
import pipelines
import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

import xdit_compile
from xdit_compile.cli.main import main
from xdit_compile.engine.channel import Channel, ChannelClosed
from xdit_compile.engine.recipe import named
from xdit_compile.engine.values import written
from xdit_compile.errors import ArgumentError, LaunchError, RankFailure, SpecError, XditError
from xdit_compile.pipelines.call_signature import CallSignature, fits

REPOSITORY = Path(__file__).parents[1]
SHAPES = REPOSITORY / "examples" / "shapes" / "model"
TOY = f"{Path(engine_makers.__file__)}:toy"


@pytest.fixture(scope="module", autouse=True)
def no_launcher() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="module")
def toy() -> Iterator[xdit_compile.Engine]:
    with xdit_compile.start(engine_makers.toy, "ulysses=2", device="cpu", arguments={"factor": 0.5}) as engine:
        yield engine


def x() -> torch.Tensor:
    return torch.tensor([1.0, 2.0])


def there_and_back(value: Any) -> Any:
    """What the other end of a channel gets."""
    ours, theirs = map(Channel, socket.socketpair())
    sender = threading.Thread(target=ours.send, args=(value,))
    sender.start()
    found = theirs.receive()
    sender.join()
    ours.close()
    with pytest.raises(ChannelClosed):
        theirs.receive()
    theirs.close()
    return found


def test_what_travels_comes_as_it_was() -> None:
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    palette, generator = picture.convert("P"), torch.Generator().manual_seed(7)
    torch.rand(3, generator=generator)
    back = there_and_back({
        "tensors": [torch.randn(3, 5).t(), torch.zeros(0, 4), torch.tensor(True), torch.ones(2, dtype=torch.bfloat16)],
        "array": np.arange(6.0)[::-1], "number": np.float32(2.5), "text": "ä" * 100_000,
        "pictures": [picture, palette, picture.convert("1")], "generator": generator})
    assert torch.equal(back["generator"].get_state(), generator.get_state())
    assert back["number"] == 2.5 and back["text"] == "ä" * 100_000
    assert np.array_equal(back["array"], np.arange(6.0)[::-1])
    assert [t.dtype for t in back["tensors"]] == [torch.float32, torch.float32, torch.bool, torch.bfloat16]
    assert back["tensors"][0].shape == (5, 3) and back["tensors"][1].shape == (0, 4)
    for one, other in zip(back["pictures"], (picture, palette.convert("RGBA"), picture.convert("1")), strict=True):
        assert one.mode == other.mode and np.array_equal(np.asarray(one), np.asarray(other))
    with pytest.raises(XditError, match=r"function cannot be sent.*pictures, numpy arrays and generators"):
        written({"callback": lambda: None})


def test_a_call_is_made_on_all_ranks_and_answered(toy: xdit_compile.Engine) -> None:
    generator, steps = torch.Generator().manual_seed(1), list[tuple[int, int]]()
    given = x()
    answer = toy(given, steps=2, generator=generator, on_step=lambda done, total: steps.append((done, total)))
    assert torch.equal(answer["x"], 4 * 0.5 * x()) and torch.equal(given, x())
    assert steps == [(1, 2), (2, 2)] and answer["spec"] == "ulysses=2"
    again = torch.Generator().manual_seed(1)
    assert torch.equal(answer["drawn"], torch.rand(2, generator=again))
    assert torch.equal(torch.rand(1, generator=generator), torch.rand(1, generator=again))  # it goes on from there
    torch.manual_seed(5)
    first = toy(x())["drawn"]
    assert not torch.equal(first, toy(x())["drawn"])
    torch.manual_seed(5)
    assert torch.equal(first, toy(x())["drawn"])


def test_an_error_of_all_ranks_ends_the_call_alone(toy: xdit_compile.Engine) -> None:
    pids = toy.invoke("pids", answers=True)
    with pytest.raises(ArgumentError, match="Toy takes no colour; it takes x, steps"):
        toy(x=x(), colour=1)
    with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
        toy(x(), steps="two")
    with pytest.raises(XditError, match="cannot be sent"):
        toy(lambda: None)
    with pytest.raises(OSError, match="there is no missing"):
        toy.load_lora("missing")
    with pytest.raises(XditError, match="Toy has no method '_private'"):
        toy.invoke("_private")
    assert toy.invoke("pids", answers=True) == pids


def test_calls_are_cancelled_before_and_while_they_run(toy: xdit_compile.Engine) -> None:
    pids = toy.invoke("pids", answers=True)
    running, waiting = (toy.submit(x(), steps=10_000, pause=0.01) for _ in range(2))
    while running.steps < 2:
        time.sleep(0.01)
    assert waiting.cancel() and running.cancel()
    with pytest.raises(CancelledError):
        running.result(30)
    assert waiting.cancelled() and running.steps < 10_000 and not running.cancel()
    with pytest.raises(TimeoutError, match=r"took longer than 0\.2 s"):
        toy(x(), steps=10_000, pause=0.01, time_limit=0.2)

    def impatient(done: int, total: int) -> None:
        raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        toy(x(), steps=10_000, pause=0.01, on_step=impatient)
    assert toy.invoke("pids", answers=True) == pids


def test_a_rank_that_dies_ends_its_call_and_no_other(toy: xdit_compile.Engine) -> None:
    toy.load_lora("somewhere", name="style")
    pids = toy.invoke("pids", answers=True)
    call = toy.submit(x(), steps=10_000, pause=0.01)
    while call.steps < 2:
        time.sleep(0.01)
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(RankFailure, match=r"rank 1 was killed by signal SIGKILL during a call.*starts the engine anew"):
        call.result(60)
    answer = toy(x(), steps=2)
    assert torch.equal(answer["x"], 4 * 0.5 * x()) and answer["adapters"] == ["", "style"]
    again = toy.invoke("pids", answers=True)
    assert not set(again) & set(pids) and not any(psutil.pid_exists(pid) for pid in pids)
    os.kill(again[0], signal.SIGKILL)  # while nobody asks anything of it
    killed = psutil.Process(again[0])
    while killed.status() != psutil.STATUS_ZOMBIE or killed.num_threads() > 1:  # the first thread ends first
        time.sleep(0.01)
    answer = toy(x())
    assert answer["pid"] not in again and answer["adapters"] == ["", "style"]
    with pytest.raises(KeyError, match="rank 1"):  # on one rank alone
        toy(x(), fail_on=1)
    assert toy._dispatcher._ranks is None


def test_an_own_model_is_parallelized(tmp_path: Path) -> None:
    inputs = {"tokens": torch.randn(2, 6, 16), "timestep": torch.tensor([0.5])}
    model = engine_makers.block()
    expected = model(**inputs)
    with xdit_compile.start(engine_makers.block, "ulysses=2", device="cpu") as engine:
        assert torch.allclose(engine(**inputs), expected, atol=1e-6)
        assert engine.signature.name == "Block" and not engine.is_pipeline
    with pytest.raises(XditError, match="this engine is closed"):
        engine(**inputs)
    xdit_compile.export(model, "ulysses=2", inputs, tmp_path / "block.xdit", weights="included")
    with xdit_compile.start(tmp_path / "block.xdit", device="cpu") as engine:
        assert torch.allclose(engine(**inputs), expected, atol=1e-6)


def adapted(pipe: Any, folder: Path) -> Path:
    """The folder of an adapter that ``pipe`` has at half its strength from now on."""
    pipe.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q"]))
    pipe.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
    pipe.transformer.set_adapters(["default"], [0.5])
    return folder


def test_a_pipeline_answers_as_in_one_process(tmp_path: Path) -> None:
    folder = pipelines.folder("sd3", tmp_path)
    call = pipelines.PIPELINES["sd3"].call() | {"output_type": "np"}
    plain = pipelines.load(folder)
    plain.scheduler = type(plain.scheduler).from_config(plain.scheduler.config)
    expected = plain(**call, generator=torch.Generator().manual_seed(0)).images
    steps: list[tuple[int, int]] = []
    previews: dict[int, torch.Tensor] = {}
    with xdit_compile.start(folder, "cfg=2", device="cpu") as engine:
        assert engine.is_pipeline
        found = engine(**call, seed=0, on_step=lambda done, total: steps.append((done, total)))
        assert np.abs(found.images - expected).max() < 1e-5 and found[0] is found.images
        count = steps[-1][1]
        assert steps == [(i + 1, count) for i in range(count)]
        long = engine.submit(**call | {"num_inference_steps": 900})
        while long.steps < 2:
            time.sleep(0.01)
        long.cancel()
        with pytest.raises(CancelledError):
            long.result(60)
        again = engine(**call, seed=0, on_preview=lambda done, latents: previews.update({done: latents}))
        assert np.array_equal(found.images, again.images)
        latents = engine(**call | {"output_type": "latent"}, seed=0).images
        assert sorted(previews) == list(range(1, count + 1)) and torch.equal(previews[count], latents)
        with pytest.raises(ArgumentError, match=r"refuses its arguments: .height. and .width. have to be divisible"):
            engine(**call | {"height": 15, "width": 16})
        style = adapted(plain, tmp_path / "style")
        expected = plain(**call, generator=torch.Generator().manual_seed(0)).images
        engine.load_lora(style, name="style", scale=0.5)
        assert np.abs(engine(**call, seed=0).images - expected).max() < 1e-5
        assert np.abs(expected - found.images).max() > 1e-3
        engine.unload_lora()
        assert np.array_equal(engine(**call, seed=0).images, again.images)
        # Within the model: its groups break, and are made anew while the processes stay.
        pids = {p.pid for p in psutil.Process().children()}
        with pytest.raises((XditError, RuntimeError)):
            engine(**call | {"latents": torch.zeros(1, 3, 8, 8)}, seed=0)
        assert np.array_equal(engine(**call, seed=0).images, again.images)
        assert {p.pid for p in psutil.Process().children()} == pids


@pytest.mark.whole
def test_a_pipeline_takes_its_model_from_an_artifact(tmp_path: Path) -> None:
    from diffusers import DiTPipeline

    path, call = tmp_path / "model.xdit", {"class_labels": [1], "num_inference_steps": 3, "output_type": "np"}
    assert main(["export", "--model", str(SHAPES), "--spec", "cfg=2", "--arg", "class_labels=[1]", "-o",
                 str(path)]) == 0
    plain = DiTPipeline.from_pretrained(SHAPES)
    plain.set_progress_bar_config(disable=True)
    expected = plain(**call, generator=torch.Generator().manual_seed(0)).images
    with xdit_compile.start(SHAPES, artifact=path, device="cpu") as engine:
        assert np.abs(engine(**call, seed=0).images - expected).max() < 1e-5
    with pytest.raises(XditError, match="an artifact has its own spec"):
        xdit_compile.start(SHAPES, "cfg=2", artifact=path)


SCRIPT = f"""
import os, signal, torch, xdit_compile
engine = xdit_compile.start({TOY!r}, "ulysses=2", device="cpu")
print(engine(torch.ones(2), steps=1)["x"].tolist(), *engine.invoke("pids", answers=True), flush=True)
engine.submit(torch.ones(2), steps=100000, pause=0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_from_standard_input_and_workers_end_with_their_parent() -> None:
    ran = subprocess.run([sys.executable, "-"], input=SCRIPT, capture_output=True, text=True, timeout=120)
    *answer, one, other = ran.stdout.split()
    assert ran.returncode == -signal.SIGKILL and answer == ["[2.0,", "2.0]"], ran.stderr
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(int(pid)) for pid in (one, other)):
        assert time.monotonic() < deadline, "workers outlived their parent"
        time.sleep(0.05)


def test_what_cannot_be_started_is_explained(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"workers import it by name.*no lambda"):
        xdit_compile.start(lambda: None)
    with pytest.raises(SpecError, match=r"auto,world=4 needs 4 processes"):
        xdit_compile.start(SHAPES, "auto,world=4", world_size=2)
    with pytest.raises(SpecError):
        xdit_compile.start(SHAPES, "ulysses=2", world_size=3)
    with pytest.raises(XditError, match=r"there is no folder .*nowhere\.xdit"):
        xdit_compile.start(tmp_path / "nowhere.xdit")
    with pytest.raises(XditError, match="no executor 'threads'"):
        xdit_compile.start(SHAPES, executor="threads")  # type: ignore[arg-type]
    with pytest.raises(XditError, match="must return a pipeline, a model or something that can be called"):
        xdit_compile.start(engine_makers.nothing, device="cpu")
    assert named("pkg.mod:f") == ("function", "pkg.mod:f") and named("someone/model") == ("pipeline", "someone/model")
    assert named(SHAPES) == ("pipeline", str(SHAPES)) and named(TOY) == ("function", TOY)
    ran = subprocess.run([sys.executable, "-"], input="import xdit_compile\ndef f(): pass\nxdit_compile.start(f)",
                         capture_output=True, text=True)
    assert "lives in __main__ of a notebook or an interactive session" in ran.stderr


def example(prompt: str | list[str], size: int = 3, sigmas: list[float] | None = None, scale: float = 1.0,
            picture: Image.Image | None = None, **more: Any) -> None: ...


def test_values_of_json_are_compared_with_annotations() -> None:
    signature = CallSignature.of("example", example)
    assert signature.needed == ("prompt",) and signature.anything and signature.defaults == {"size": 3}
    for good in ({"prompt": "a"}, {"prompt": ["a", "b"], "sigmas": [1, 0.5]}, {"sigmas": None, "scale": 2},
                 {"picture": {"any": "thing"}, "unknown": 1}):
        signature.check_values(good)
    for bad in ({"prompt": 3}, {"prompt": ["a", 1]}, {"size": 1.5}, {"size": True}, {"sigmas": ["x"]}, {"scale": "2"},
                {"prompt": None}, {"sigmas": {}}):
        with pytest.raises(ArgumentError, match=f"{next(iter(bad))} of example must be"):
            signature.check_values(bad)
    assert not fits([1], ("int",)) and fits([[1]], (("list", (("list", ("int",)),)),))
