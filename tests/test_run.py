"""The command that runs pipelines: what its flags ask for, what it refuses, and what it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pipelines
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

from xdit_compile.cli import run_flags as flags
from xdit_compile.cli.main import main
from xdit_compile.cli.run import Request
from xdit_compile.errors import XditError
from xdit_compile.pipelines.loading import PipelineSource
from xdit_compile.pipelines.output_files import save
from xdit_compile.spec import ShardingSpec

REPOSITORY = Path(__file__).parents[1]
SHAPES = REPOSITORY / "examples" / "shapes" / "model"
PLAIN = ["--model", str(SHAPES), "--arg", "class_labels=[1]"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipelines")


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No launcher's rank; results go nowhere but to the test's folder; libraries keep to themselves what they think."""
    diffusers.utils.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def asked(*arguments: str) -> Request:
    """The request that a command line makes."""
    parser = ArgumentParser(allow_abbrev=False)
    flags.add_arguments(parser)
    return flags.request(parser.parse_args(flags.spelled(["--model", "somewhere", *arguments])))


def latents(name: str, root: Path, **call: Any) -> torch.Tensor:
    """What the plain pipeline answers in this process, with noise as the command draws it."""
    pipe = pipelines.load(pipelines.folder(name, root))
    torch.manual_seed(3)
    return pipe(**call, output_type="latent", generator=torch.Generator().manual_seed(3))[0]


@pytest.mark.parametrize(("arguments", "spec"), [
    ("", "ulysses=1"),
    ("--spec cfg=2,ulysses=2", "cfg=2,ulysses=2"),
    ("--use_cfg_parallel --ulysses_degree 2 --ring_degree 3", "cfg=2,ulysses=2,ring=3"),
    ("--use-cfg-parallel --ulysses-degree=2 --data-parallel-degree 2", "data=2,cfg=2,ulysses=2"),
    ("--fully_shard_degree 2 --ulysses_degree 4", "ulysses=4,shard=2"),
    ("--use_torch_compile --ulysses_degree 1", "backend=inductor"),
    ("--use_onediff", "backend=onediff"),
    ("--use_teacache --wan-teacache-thresh 0.3 --ulysses_degree 2", "ulysses=2,cache=teacache,threshold=0.3"),
    ("--use_fbcache --ulysses_degree 2", "cache=first_block,ulysses=2"),
    ("--use_teacache", "cache=teacache"),
    ("--spec cfg=2,attention_kernel=torch --ulysses_degree 2", "cfg=2,ulysses=2,kernel=torch"),
    ("--spec ulysses_degree=2 --ulysses_degree 2", "ulysses=2"),
    ("--use_parallel_vae --use_cfg_parallel --ring_degree 2", "cfg=2,ring=2,vae=4"),
    ("--use_parallel_vae --spec ulysses=4,vae=2", "ulysses=4,vae=2"),
    ("--pipefusion_parallel_degree 1 --tensor-parallel-degree 1 --warmup_steps 1 --num_pipeline_patch 1 "
     "--attn_layer_num_for_pp --split_scheme row --ring_degree 2", "ring=2"),
    ("--pipefusion_parallel_degree 2 --num_pipeline_patch 4 --warmup_steps 3 --attn_layer_num_for_pp 10 9 "
     "--use_cfg_parallel", "cfg=2,pipefusion=2,patches=4,warmup=3,stage_blocks=10+9"),
])  # fmt: skip
def test_the_spec_that_flags_stand_for(arguments: str, spec: str) -> None:
    assert asked(*arguments.split()).spec == ShardingSpec.parse(spec)


def test_the_call_that_flags_ask_for() -> None:
    made = asked("--prompt", "a", "b", "--negative-prompt", "c", "--height", "64", "--guidance_scale", "3.5", "--arg",
                 "class_labels=[1, 2]", "true_cfg_scale=4.0", "system_prompt=as it is", "--no_use_resolution_binning")
    assert made.arguments == {"prompt": ["a", "b"], "negative_prompt": "c", "height": 64, "guidance_scale": 3.5,
                              "class_labels": [1, 2], "true_cfg_scale": 4.0, "system_prompt": "as it is"}
    assert made.habits == {"output_type": "pil", "use_resolution_binning": False}
    assert made.seed == 42
    explicit = asked("--output_type", "latent")
    assert explicit.arguments == {"output_type": "latent"} and not explicit.habits


def test_pictures_adapters_and_where_things_are() -> None:
    made = asked("--image", "a.png", "mask_image=b=c.png", "--img_file_paths", "https://x/y?raw=true", "--lora", "one",
                 "two:0.5", "hub/three:x", "--download-dir", "there", "--trust-remote-code", "--enable_tiling",
                 "--output_directory", "here", "--scheduler", "S", "--pipeline", "P")
    assert made.pictures == {"image": ("a.png", "https://x/y?raw=true"), "mask_image": ("b=c.png",)}
    assert made.source == PipelineSource("somewhere", "P", "S", (("one", 1.0), ("two", 0.5), ("hub/three:x", 1.0)),
                                 ("enable_tiling",), {"cache_dir": "there", "trust_remote_code": True})
    assert made.output == Path("here")


@pytest.mark.parametrize(("arguments", "complaint"), [
    ("--attn_layer_num_for_pp 10 9", "stage_blocks belong to pipefusion"),
    ("--warmup-steps 4", "--warmup_steps 4 belongs to PipeFusion; add --pipefusion_parallel_degree N"),
    ("--num_pipeline_patch 4", "--num_pipeline_patch 4 belongs to PipeFusion"),
    ("--split_scheme column", "found by trying"),
    ("--shard_dit", "with --fully_shard_degree N"),
    ("--use_teacache --use-fbcache", "name two caches"),
    ("--cache_method Fb", "--cache_method Fb: caches have other names here"),
    ("--use_onediff --use_torch_compile", "name two compilers"),
    ("--use_fp8_t5_encoder", "choose it with --dtype"),
    ("--enable_sequential_cpu_offload", "use --enable_model_cpu_offload"),
    ("--task i2v", "name another with --pipeline"),
    ("--spec ulysses=2 --ulysses_degree 4", "flags for ulysses=4 contradict each other"),
    ("--spec ulises=2", "unknown word 'ulises'"),
    ("--arg height", "cannot read --arg height"),
    ("--arg height=1 --height 2", "height is given twice"),
    ("--arg image=1 --image a.png", "image is given twice"),
    ("--arg generator=1", "use --seed"),
    ("--lora x:inf", "cannot read --lora x:inf"),
    ("--num_inference_steps 0", "--num_inference_steps must be at least 1"),
    ("--fps 8 --output_type latent", "--output_type latent writes tensors"),
])  # fmt: skip
def test_what_is_not_there_is_refused_by_name(arguments: str, complaint: str) -> None:
    with pytest.raises(XditError) as refused:
        asked(*arguments.split())
    assert complaint in str(refused.value)


@pytest.mark.parametrize(("arguments", "complaint"), [
    ([*PLAIN, "--prompt", "a cat"], "DiTPipeline takes no prompt; it takes class_labels, guidance_scale"),
    ([*PLAIN, "--image", "a.png"], "DiTPipeline takes no image; it takes"),
    (["--model", str(SHAPES)], "DiTPipeline needs class_labels; give --arg class_labels=VALUE"),
    (["--model", str(SHAPES.parent)], "cannot load a pipeline from"),
    ([*PLAIN, "--pipeline", "UNet2DModel"], "no class UNet2DModel derived from DiffusionPipeline"),
    ([*PLAIN, "--scheduler", "Nothing"], "no class Nothing derived from SchedulerMixin"),
    ([*PLAIN, "--lora", "somewhere"], "DiTPipeline takes no adapters"),
    ([*PLAIN, "--enable_model_cpu_offload", "--device", "cpu"], "the pipeline runs on the CPU; leave it out"),
    ([*PLAIN, "--output", str(SHAPES / "model_index.json")], "cannot write to"),
    ([*PLAIN, "--pipefusion_parallel_degree", "2", "--ring_degree", "2"], "do not go together"),
])  # fmt: skip
def test_a_user_s_mistake_is_told_before_anything_runs(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["run", *arguments]) == 2
    told = capsys.readouterr()
    assert complaint in told.err and "Traceback" not in told.err and not told.out


def test_what_the_pipeline_says_of_its_arguments_is_the_user_s_mistake(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pipelines.folder("sd3", root)
    assert main(["run", "--model", str(folder), "--prompt", "a", "--height", "143"]) == 2
    told = capsys.readouterr().err
    assert "refuses its arguments: `height` and `width`" in told and "Traceback" not in told


def test_without_diffusers_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert main(["run", *PLAIN]) == 2
    assert "pip install 'xdit-compile[pipelines]'" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--use_cfg", "--no_such_flag"])
def test_a_flag_that_is_unknown_or_cut_short_is_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["run", *PLAIN, flag])
    assert stop.value.code == 2 and f"unrecognized arguments: {flag}" in capsys.readouterr().err


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["run", "--help"])
    told = capsys.readouterr().out
    assert stop.value.code == 0 and "examples:\n  xdit-compile run --model" in told and "--use_cfg_parallel" in told


def test_files_by_what_was_made(tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 8))
    result = {"images": [picture] * 11, "frames": [[picture, Image.new("RGB", (8, 8), "red")]] * 2,
              "audio": np.ones(3), "layers": None, "nsfw_content_detected": [True]}
    files, others = save(result, tmp_path, 4)
    assert [f.name for f in files] == [*(f"image-{i:02}.png" for i in range(11)), *(
        f.name for f in sorted(tmp_path.glob("video-*"))), "audio.safetensors"]
    assert len(list(tmp_path.glob("video-[01].*"))) == 2
    assert others == ["nsfw_content_detected: [True]"]
    assert sorted(tmp_path.iterdir()) == sorted(files), "nothing half written stays"
    assert load_file(tmp_path / "audio.safetensors")["audio"].tolist() == [1, 1, 1]
    assert [f.name for f in save({"images": [[picture], [picture]]}, tmp_path, 4)[0]] == ["image-0.png", "image-1.png"]


@pytest.mark.whole
def test_two_processes_that_the_command_starts(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Latents as one process makes them; the summary as JSON."""
    folder = pipelines.folder("qwen_image", root)
    assert main(["run", "--model", str(folder), "--spec", "cfg=2", "--prompt", "snow", "--negative_prompt", "rain",
                 "--height", "144", "--width=112", "--num-inference-steps", "2", "--arg", "true_cfg_scale=3.0",
                 "--seed", "3", "--output_type", "latent", "--device", "cpu", "--output", "made/here", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["spec"], said["processes"], said["steps"], said["notes"]) == ("cfg=2", 2, 2, [])
    assert said["files"] == ["made/here/images.safetensors"] and said["seconds_per_step"] > 0
    expected = latents("qwen_image", root, prompt="snow", negative_prompt="rain", height=144, width=112,
                       num_inference_steps=2, true_cfg_scale=3.0)
    torch.testing.assert_close(load_file(said["files"][0])["images"], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.whole  # as the script in `test_from_xdit.py`
def test_a_command_line_of_xdit_under_torchrun(root: Path, tmp_path: Path) -> None:
    folder = pipelines.folder("sd3", root)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "xdit_compile.cli", "run",
               "--model", folder, "--pipefusion_parallel_degree", "1", "--use_cfg_parallel", "--height", "144",
               "--width", "112", "--no_use_resolution_binning", "--guidance_scale", "3.5", "--output_type", "latent",
               "--num_inference_steps", "2", "--warmup_steps", "1", "--max_sequence_length", "14", "--prompt", "snow",
               "--seed", "3", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], cwd=tmp_path, env=environment, capture_output=True, text=True,
                          timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("under cfg=2 on 2 processes (cpu, float32)") == 1, "rank 0 alone speaks"
    expected = latents("sd3", root, prompt="snow", height=144, width=112, guidance_scale=3.5, num_inference_steps=2,
                       max_sequence_length=14)
    made = load_file(tmp_path / "results" / "images.safetensors")["images"]
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)


def test_the_shipped_example_makes_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--model", str(SHAPES), "--arg", "class_labels=[0,7]", "--num_inference_steps", "3", "--output",
                 "here", "--warmup_calls", "1", "--fps", "4", "--scheduler", "DDIMScheduler"]) == 0
    told = capsys.readouterr().out
    assert "DiTPipeline under ulysses=1 on 1 process" in told and "for each of 3 steps; loaded in" in told
    assert "here/image-0.png\nhere/image-1.png\n" in told and "--fps had no effect" in told
    with Image.open("here/image-1.png") as picture:
        assert picture.size == (64, 64) and np.asarray(picture).std() > 10


def test_an_artifact_in_the_place_of_a_component(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its ranks are those that the command starts, each of which reads its share of the weights."""
    out = tmp_path / "model.xdit"
    call = [*PLAIN, "--num_inference_steps", "2"]
    assert main(["export", *call, "--spec", "ulysses=2,shard=2", "--weights", "included", "-o",
                 str(out)]) == 0
    assert main(["export", *call, "--artifact", str(out), "-o", str(out)]) == 2
    made = {}
    for name, words in (("plain", []), ("artifact", ["--artifact", f"transformer={out}"])):
        capsys.readouterr()
        assert main(["run", *call, *words, "--output_type", "np", "--output", name, "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        (file,) = said["files"]
        made[name] = next(iter(load_file(file).values()))
    assert said["spec"] == "ulysses=2,shard=2" and said["processes"] == 2
    assert torch.allclose(made["artifact"].float(), made["plain"].float(), atol=1e-5)
    for words, complaint in ((["--spec", "ulysses=4"], "was exported for ulysses=2,shard=2"),
                             (["--lora", "x"], "leave --enable_model_cpu_offload and --lora out")):
        assert main(["run", *call, "--artifact", str(out), *words]) == 2
        assert complaint in capsys.readouterr().err
    assert main(["run", *call, "--artifact", f"vision={out}"]) == 2
    assert "has no component vision" in capsys.readouterr().err
