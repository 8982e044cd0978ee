"""The flags of the command ``run``, those of xDiT among them, and the request they make."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xdit_compile.cli.artifact_components import exported_spec
from xdit_compile.cli.run import DTYPES, Request
from xdit_compile.errors import SpecError, XditError
from xdit_compile.pipelines.loading import PipelineSource
from xdit_compile.planner.auto import Auto, spec_of
from xdit_compile.spec import ShardingSpec, pairs_of

HELP = """\
Run any pipeline of diffusers on many devices and write what it makes.

Starts one process for each rank, or takes part in the job that torchrun started it for. Command lines for xDiT work
as they are: what it does and this package does not is refused by name, never ignored. Dashes and underscores in
names of flags mean the same.

examples:
  xdit-compile run --model DIR_OR_ID --spec cfg=2,ulysses=2 --prompt "a red circle" --output images/
  xdit-compile run --model DIR --spec ulysses=4 --prompt "a cat" "a dog" --seed 7 --output_type latent --json
  xdit-compile run --model DIR --spec cfg=2 --arg class_labels=[1,2] --num_inference_steps 20
  xdit-compile run --model DIR --artifact model-u4.xdit --prompt "a cat"
  xdit-compile run --model DIR --pipeline NAME --image photo.png --image mask_image=mask.png --arg strength=0.6
  torchrun --nproc-per-node 8 -m xdit_compile.cli run --model DIR --use_cfg_parallel --ulysses_degree 4 --prompt "a cat"

exit status: 0 if the files are written, 2 if not.
"""

_SCHEME = "how weights are cut is found by trying; leave it out"
_ENCODERS = "encoders' work is not cut, but their parameters can be: use --shard_t5_encoder (--spec encoders=shard)"
_EXACT = "attention is whole at each step; for faster steps use --use_fbcache, or more devices, as in --ulysses_degree"
_CACHES = "caches have other names here; use --use_fbcache, or --spec cache=first_block, teacache or taylor"
_PRECISION = "weights and traffic keep the model's type; choose it with --dtype, or load a folder quantized before"
_TOGETHER = "all processes take part in everything; leave it out"
_KERNEL = "kernels have other names here; use --spec attention_kernel=torch, flash_attn or yunchang"
_TILES = "tiles keep the autoencoder's own size; use --enable_tiling alone"
_RAY = ("processes are started by torchrun, or by this command itself; on a Ray cluster by serve --executor ray, or "
        "xdit_compile.start(..., executor='ray')")
_REPEAT = "one call is timed and kept; calls before it are asked for with --warmup_calls"
_OFFLOAD = "parallel models read their weights themselves; use --enable_model_cpu_offload, or --spec offload=block"
_SPARSE = "attention is exact here: no kernel leaves out blocks; leave it out"
_SCHEDULE = "every step runs in the same precision and with the same kernel; leave it out"
_PROFILE = "see a run's own times with XDIT_COMPILE_LOG=INFO, or put torch.profiler around a script of your own"
_DISTILLED = "give --model a folder whose transformer is that one"
_SHARD = "say over how many ranks parameters are cut with --fully_shard_degree N"

VALUES: dict[str, tuple[tuple[str, ...], str]] = {
    "text_encoder_tp_degree": (("1",), _ENCODERS),
    "split_scheme": (("row",), _SCHEME),
    "dit_parallel_size": (("0",), _TOGETHER),
    "vae_parallel_size": (("0",), f"{_TOGETHER}, and use --use_parallel_vae"),
    "ray_world_size": (("1",), _RAY),
    "cache_method": ((), _CACHES),
    "cache_config": ((), _CACHES),
    "attention_backend": ((), _KERNEL),
    "cross_attention_backend": ((), _KERNEL),
    "gemm_quantization": (("none",), _PRECISION),
    "gemm_config": ((), _PRECISION),
    "vae_tile_size_height": ((), _TILES),
    "vae_tile_size_width": ((), _TILES),
    "vae_tile_overlap_height": ((), _TILES),
    "vae_tile_overlap_width": ((), _TILES),
    "num_iterations": (("1",), _REPEAT),
    "determinism_check": (("0",), "to compare with one device, use xdit-compile verify on the model"),
    "task": ((), "the class of the pipeline decides what it does; name another with --pipeline"),
    "batch_size": (("1",), "give several prompts, or --arg num_images_per_prompt=N"),
    "dataset_path": ((), "give the prompts with --prompt"),
    **{name: ((default,), _EXACT) for name, default in (
        ("n_calib", "8"), ("threshold", "0.5"), ("window_size", "64"))},
    "coco_path": ((), _EXACT),
    **{name: ((default,), _SPARSE) for name, default in (
        ("spargeattn_simthreshold", "0.3"), ("spargeattn_cdfthreshold", "0.92"), ("vsa_block_size", "128"),
        ("vsa_top_k", "1"), ("vsa_top_k_ratio", "0.0"), ("vsa_calls_per_step", "2"), ("vsa_prob_threshold", "0.9"))},
    "vsa_drop_rates": ((), _SPARSE),
    **dict.fromkeys(("hybrid_attn_low_precision_backend", "hybrid_attn_high_precision_backend",
                     "num_hybrid_attn_high_precision_steps", "hybrid_attn_schedule",
                     "num_hybrid_gemm_high_precision_steps"), ((), _SCHEDULE)),
    **dict.fromkeys(("fp8_precision_override_prefix_patterns", "fp8_precision_override_suffix_patterns"),
                    ((), _PRECISION)),
    **{name: ((default,), _PROFILE) for name, default in (
        ("profile_wait", "2"), ("profile_warmup", "2"), ("profile_active", "1"))},
    **dict.fromkeys(("distilled_transformer_path", "distilled_transformer_2_path"), ((), _DISTILLED)),
    "flow_shift": ((), "set it in the scheduler's configuration in the model's folder"),
}
"""Flags of xDiT with values that ask for something else than this package does: the values that do not, and why."""

SWITCHES: dict[str, str] = {
    **dict.fromkeys(("use_fast_attn", "use_hybrid_attn_schedule"), _EXACT),
    **dict.fromkeys(("use_fp8_t5_encoder", "use_fp8_text_encoder", "use_fp8_gemms", "use_fp4_gemms", "use_int8_gemms",
                     "use_fp8_comms", "use_hybrid_gemm_schedule"), _PRECISION),
    **dict.fromkeys(("shard_dit", "memory_efficient_sharding"), _SHARD),
    **dict.fromkeys(("enable_sequential_cpu_offload", "enable_group_cpu_offload"), _OFFLOAD),
    "teacache_use_ret_steps": "give the model's coefficients, as in --spec cache=teacache,coefficients=[...]",
    "use_cache": _EXACT,
    **dict.fromkeys(("use_ssta_sparse_text_to_image", "use_spargeattn_head_balance"), _SPARSE),
    "profile": _PROFILE,
    "no_reshard_after_forward": "a block's parameters are dropped after it, always; leave it out",
    "use_vae_channels_last_format": "the autoencoder keeps its memory format; call .to(memory_format=...) in a script",
    "use_ray": _RAY,
    "resize_input_images": "give pictures of the size wanted",
}
"""Flags of xDiT without a value, of the same kind."""

IDLE = frozenset(f"{no}{name}" for no in ("", "no_") for name in (
    "spargeattn_reorder_sequence", "use_spargeattn_static_block_mask", "vsa_reorder_sequence",
    "use_vsa_static_block_mask", "use_vsa_first_frame_mask"))
"""Flags of xDiT that say how its sparse kernels go about it, and nothing where none is asked for, as never here."""

CALL: dict[str, tuple[type, str]] = {
    "height": (int, "pixels"), "width": (int, "pixels"), "num_frames": (int, "frames of a video"),
    "num_inference_steps": (int, "steps of denoising"), "guidance_scale": (float, "classifier-free guidance"),
    "guidance_scale_2": (float, "that of the second model"), "max_sequence_length": (int, "tokens of the prompt"),
}
"""Flags that are arguments of the pipeline's call by the same name."""

DEGREES = {"ulysses_degree": "ulysses", "ring_degree": "ring", "data_parallel_degree": "data",
           "pipefusion_parallel_degree": "pipefusion", "tensor_parallel_degree": "tensor",
           "fully_shard_degree": "shard"}
"""Flags that are words of the spec."""

PIPEFUSION = {"num_pipeline_patch": "patches", "warmup_steps": "warmup"}
"""Those that mean something with PipeFusion only."""
NEUTRAL = {"num_pipeline_patch": (None, 1), "warmup_steps": (None, 0, 1)}
"""What they may be without it: xDiT's scripts give them always."""


def spelled(arguments: Sequence[str]) -> list[str]:
    """Names of flags with underscores throughout, and without the model that xDiT has some caches' flags begin with."""
    made = []
    for text in arguments:
        name, equals, value = text.partition("=")
        plain = re.sub(r"^[a-z]+_(?=teacache_)", "", name[2:].replace("-", "_"))
        made.append(f"--{plain}{equals}{value}" if name.startswith("--") else text)
    return made


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of the command."""
    add = parser.add_argument
    add("--model", required=True, metavar="DIR_OR_ID", help="a folder of a pipeline, or its name on the hub")
    add("--spec", default="", help="how to shard, as in cfg=2,ulysses=2, or auto (default: one process)")
    add("--output", "--output_directory", default="results", metavar="DIR", type=Path,
        help="where images, videos or tensors are written (default results)")
    add("--overwrite", action="store_true", help="replace results of an earlier run that are there")
    add("--json", action="store_true", help="print the summary as JSON")
    add("--dtype", choices=DTYPES, default="auto", help="of the weights (default: bfloat16 on a GPU, else float32)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if it fits")
    add("--pipeline", metavar="CLASS", help="a pipeline of diffusers in place of the one that the folder names")
    add("--scheduler", metavar="CLASS", help="a scheduler of diffusers in place of the pipeline's own")
    add("--lora", metavar="PATH[:SCALE]", nargs="+", action="extend", default=[], help="adapters to load")
    add("--artifact", dest="artifacts", metavar="[NAME=]FOLDER", nargs="+", action="extend", default=[],
        help="an exported model in the place of the component; the spec is the artifact's")
    add("--warmup_calls", type=_count, default=0, metavar="N", help="calls before the one that is timed and kept")
    add("--fps", type=_count, metavar="N", help="of videos written (default: the call's frame_rate, or 8)")
    _add_call(parser.add_argument_group("the pipeline's call", "what is not given is left to the pipeline"))
    _add_xdit(parser.add_argument_group("as in xDiT"))
    for name in VALUES:
        add(f"--{name}", nargs="*", help=argparse.SUPPRESS)
    for name in (*SWITCHES, *sorted(IDLE)):
        add(f"--{name}", action="store_true", help=argparse.SUPPRESS)


def _add_call(group: Any) -> None:
    for name in ("prompt", "negative_prompt"):
        group.add_argument(f"--{name}", nargs="*", metavar="TEXT", help="one or several")
    for name, (kind, text) in CALL.items():
        group.add_argument(f"--{name}", type=kind, metavar="N" if kind is int else "X", help=text)
    group.add_argument("--output_type", choices=("pil", "latent", "pt", "np"),
                       help="pictures (default), or tensors, which are written as safetensors")
    for names, text in ((["--image"], "pictures for the argument `image`, or for the one named"),
                        (["--img_file_path", "--img_file_paths", "--input_images"], argparse.SUPPRESS)):
        group.add_argument(*names, dest="image", nargs="+", action="extend", default=[], metavar="[NAME=]FILE",
                           help=text)
    group.add_argument("--arg", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
                       help="any other argument; the value is JSON, or else text")
    group.add_argument("--seed", type=int, default=42, help="of the noise (default 42)")


def _add_xdit(group: Any) -> None:
    for name, word in (DEGREES | PIPEFUSION).items():
        group.add_argument(f"--{name}", type=int, metavar="N", help=f"the spec's {word}=N")
    group.add_argument("--teacache_thresh", type=float, metavar="X", help="the spec's threshold=X, with --use_teacache")
    group.add_argument("--attn_layer_num_for_pp", type=int, nargs="*", metavar="N",
                       help="blocks of each stage, the spec's stage_blocks=N+N")
    for name, text in {
        "use_cfg_parallel": "the spec's cfg=2",
        "use_parallel_vae": "the spec's vae=N, N being all processes",
        "shard_t5_encoder": "the spec's encoders=shard",
        "use_fbcache": "the spec's cache=first_block (approximate)",
        "use_teacache": "the spec's cache=teacache (approximate)",
        "use_torch_compile": "the spec's backend=inductor",
        "use_onediff": "the spec's backend=onediff",
        "no_use_resolution_binning": "take height and width as they are",
        "enable_model_cpu_offload": "keep each component on the CPU until it is called",
        "enable_tiling": "decode tile by tile",
        "enable_slicing": "decode one sample after the other",
        "trust_remote_code": "run code that comes with the model",
    }.items():
        group.add_argument(f"--{name}", action="store_true", help=text)
    group.add_argument("--download_dir", metavar="DIR", help="where models from the hub are kept")


def request(options: argparse.Namespace) -> Request:
    """What the flags ask for.

    Raises:
        XditError: a flag asks for what is not there, or two contradict each other.
    """
    given = vars(options)
    for name, (neutral, why) in VALUES.items():
        if any(value not in neutral for value in given[name] or ()):
            raise XditError(f"--{name} {' '.join(given[name])}: {why}")
    for name, why in SWITCHES.items():
        if given[name]:
            raise XditError(f"--{name}: {why}")
    if options.fps is not None and options.output_type not in (None, "pil"):
        raise XditError(f"--fps is for videos that are written, but --output_type {options.output_type} writes tensors")
    arguments, pictures = _arguments(options), _pictures(options.image)
    if both := arguments.keys() & pictures.keys():
        raise XditError(f"{both.pop()} is given twice, as --arg and as --image")
    artifacts = _artifacts(options.artifacts)
    habits: dict[str, Any] = {} if options.output_type else {"output_type": "pil"}
    if options.no_use_resolution_binning:
        habits["use_resolution_binning"] = False
    return Request(
        source=_source(options), spec=exported_spec(artifacts, _spec(options)) if artifacts else _spec(options),
        artifacts=artifacts, output=options.output, arguments=arguments, habits=habits,
        pictures=pictures, seed=options.seed, dtype=options.dtype,
        device=options.device, offload=options.enable_model_cpu_offload, warmup_calls=options.warmup_calls,
        frame_rate=options.fps, overwrite=options.overwrite)


def _source(options: argparse.Namespace) -> PipelineSource:
    further = {"cache_dir": options.download_dir, "trust_remote_code": options.trust_remote_code or None}
    return PipelineSource(options.model, options.pipeline, options.scheduler, tuple(map(adapter, options.lora)),
                  tuple(n for n in ("enable_tiling", "enable_slicing") if vars(options)[n]),
                  {name: value for name, value in further.items() if value is not None})


def _spec(options: argparse.Namespace) -> ShardingSpec | Auto:
    """The words of ``--spec`` and those that xDiT's flags stand for."""
    words = {word: str(vars(options)[flag]) for flag, word in DEGREES.items() if vars(options)[flag] is not None}
    if options.attn_layer_num_for_pp:
        words["stage_blocks"] = "+".join(map(str, options.attn_layer_num_for_pp))
    if words.get("pipefusion", "1") != "1" or "pipefusion" in options.spec:
        given = {word: vars(options)[flag] for flag, word in PIPEFUSION.items()}
        words |= {word: str(value) for word, value in given.items() if value is not None}
    else:
        for flag, neutral in NEUTRAL.items():
            if vars(options)[flag] not in neutral:
                raise SpecError(f"--{flag} {vars(options)[flag]} belongs to PipeFusion; add "
                                "--pipefusion_parallel_degree N")
    if options.use_cfg_parallel:
        words["cfg"] = "2"
    if options.shard_t5_encoder:
        words["encoders"] = "shard"
    if options.use_fbcache and options.use_teacache:
        raise SpecError("--use_fbcache and --use_teacache name two caches; give one of them")
    if options.use_fbcache or options.use_teacache:
        words["cache"] = "first_block" if options.use_fbcache else "teacache"
    if options.use_teacache and options.teacache_thresh is not None:
        words["threshold"] = str(options.teacache_thresh)
    elif options.teacache_thresh not in (None, 0.2):
        raise SpecError(f"--teacache_thresh {options.teacache_thresh} belongs to a cache; add --use_teacache")
    if options.use_torch_compile and options.use_onediff:
        raise SpecError("--use_torch_compile and --use_onediff name two compilers; give one of them")
    if options.use_torch_compile or options.use_onediff:
        words["backend"] = "onediff" if options.use_onediff else "inductor"
    text = options.spec if Auto.parse(options.spec) is None else options.spec.partition(",")[2]
    own = {word.removesuffix("_degree"): value for word, value in pairs_of(text)}
    if both := [w for w in words if w in own and own[w] != words[w]]:
        raise SpecError(f"--spec {options.spec} and the flags for {', '.join(f'{w}={words[w]}' for w in both)} "
                        "contradict each other; give one of them")
    parts = [options.spec, *(f"{word}={value}" for word, value in words.items() if word not in own)]
    if options.use_parallel_vae and "vae" not in own:
        parts.append(f"vae={spec_of(','.join(parts)).world_size}")
    return spec_of(",".join(filter(None, parts)))


def _arguments(options: argparse.Namespace) -> dict[str, Any]:
    given = vars(options)
    made = {name: given[name] for name in (*CALL, "output_type") if given[name] is not None}
    for name in ("prompt", "negative_prompt"):
        if given[name]:
            made[name] = given[name] if len(given[name]) > 1 else given[name][0]
    for name in ("height", "width", "num_inference_steps"):
        if made.get(name, 1) < 1:
            raise XditError(f"--{name} must be at least 1, got {made[name]}")
    for text in options.arg:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise XditError(f"cannot read --arg {text}; write NAME=VALUE, as in --arg class_labels=[1,2]")
        if name in made:
            raise XditError(f"{name} is given twice, once as --arg {text}")
        if name in ("output_type", "generator"):
            raise XditError(f"--arg {text}: use --{'seed' if name == 'generator' else name}")
        made[name] = _value(value)
    return made


def _value(text: str) -> Any:
    """JSON if it is, else the text. Infinities and the like are no JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _pictures(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Files by argument. An address may have an equals sign as well, but not after a mere name."""
    made: dict[str, tuple[str, ...]] = {}
    for text in texts:
        named = re.fullmatch(r"([A-Za-z_]\w*)=(.+)", text)
        name, file = named.groups() if named else ("image", text)
        made[name] = (*made.get(name, ()), file)
    return made


def _artifacts(texts: Sequence[str]) -> dict[str, str]:
    """Folders by the names of components; of the one that has none, by the empty name."""
    made: dict[str, str] = {}
    for text in texts:
        name, folder = found.groups() if (found := re.fullmatch(r"([A-Za-z_]\w*)=(.+)", text)) else ("", text)
        if name in made:
            raise XditError(f"--artifact {text}: there is one before it {f'for {name}' if name else 'without a name'}; "
                            "write NAME=FOLDER, with the name of each component")
        made[name] = folder
    return made


def adapter(text: str) -> tuple[str, float]:
    """A path, and what follows its last colon if that is a number."""
    path, _, scale = text.rpartition(":")
    try:
        number = float(scale)
    except ValueError:
        return text, 1.0
    if not path or not math.isfinite(number):
        raise XditError(f"cannot read --lora {text}; write PATH or PATH:SCALE")
    return path, number


def _count(text: str) -> int:
    """A whole number that is not negative."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {text}")
    return number
