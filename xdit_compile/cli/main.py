"""The command line: explain what parallelising a model would do, verify that it is right, run a pipeline, or export a
model as an artifact and look into one."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from torch.utils import _pytree as pytree

from xdit_compile import __version__
from xdit_compile.artifact.export import export
from xdit_compile.artifact.inspection import Inspection, inspect
from xdit_compile.cli import run_flags as flags
from xdit_compile.cli.pass_dump import PassDump
from xdit_compile.cli.record_calls import record
from xdit_compile.cli.run import run
from xdit_compile.cli.run_result import Run
from xdit_compile.cli.target import build, load
from xdit_compile.diagnostics.approximation import Approximation, verify_approximate
from xdit_compile.diagnostics.explain import explain
from xdit_compile.diagnostics.explanation import Explanation
from xdit_compile.diagnostics.verification import Verification
from xdit_compile.diagnostics.verify import verify
from xdit_compile.errors import LaunchError, SpecError, XditError
from xdit_compile.pipelines.loading import only_one_speaks
from xdit_compile.report.text import plain
from xdit_compile.runtime.launch import launch, place_of
from xdit_compile.spec import ShardingSpec

TARGET = "file.py:function or package.module:function; the function takes nothing and returns (model, kwargs)"
SPEC = "how to shard, as in ulysses=2,ring=2"

EXPLAIN = """\
Say what parallelising one call of a model would do: no processes, no weights, any number of ranks.

examples:
  xdit-compile explain model.py:example --spec ulysses=8
  xdit-compile explain my_package.models:example --spec ulysses=4,ring=2 --json > report.json
  xdit-compile explain model.py:example --spec ulysses=2 --rank 1 --dump programs
  xdit-compile explain model.py:autoencoder --spec ring=4 --method decode
  xdit-compile explain model.py:example --spec pipefusion=4,patches=8 --timeline stages.svg --steps 12
"""

VERIFY = """\
Run a model as it is and in parallel, compare, and name the operator at which they part. Starts one process
for each rank, or takes part in the job that torchrun started it for.

examples:
  xdit-compile verify model.py:example --spec ulysses=2,ring=2
  xdit-compile verify model.py:example --spec ulysses=4 --device cpu --tolerance 1e-4 --json
  torchrun --nproc-per-node 8 -m xdit_compile.cli verify model.py:example --spec ulysses=8
  xdit-compile verify model.py:example --spec ulysses=2,cache=first_block --approximate --steps 28

exit status: 0 if every output is within the tolerance, 1 if not, 2 if there was no comparison.
"""

EXPORT = """\
Write what every rank runs of a model into a folder, from which xdit_compile.load starts it without the model's code.
The model is a function's, or one of a pipeline, which is run for two steps to find the calls that it makes.

examples:
  xdit-compile export model.py:example --spec ulysses=4 -o model-u4.xdit
  xdit-compile export --model DIR --spec ulysses=4 --height 1024 --width 1024 -o model-u4.xdit
  xdit-compile export --model DIR --spec pipefusion=2,patches=4 --weights included -o model-p2.xdit --overwrite
"""

INSPECT = """\
Say what an artifact holds: spec, calls, collectives and bytes of rank 0, versions, hashes. Nothing of it is run.

examples:
  xdit-compile inspect model-u4.xdit
  xdit-compile inspect model-u4.xdit --check-all --json
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(flags.spelled(words) if words[:1] in (["run"], ["export"]) else words)
    _quieten()
    report: Explanation | Verification | Approximation | Run | Inspection
    try:
        if options.command == "run":
            report = _run(options)
        elif options.command == "export":
            report = _export(options)
        elif options.command == "inspect":
            report = inspect(options.path, check_all=options.check_all)
        else:
            spec = ShardingSpec.parse(options.spec)
            report = _explain(options, spec) if options.command == "explain" else _verify(options, spec)
    except XditError as error:
        cause = error.__cause__ if isinstance(error, LaunchError) and isinstance(
            error.__cause__, XditError) else error
        print(f"xdit-compile: {cause}", file=sys.stderr)
        return 2
    except Exception:
        # The target's own fault, or ours: to be seen whole, and told from a verification that failed.
        traceback.print_exc()
        return 2
    if _first():
        _show(report, options.json)
    return 1 if isinstance(report, (Verification, Approximation)) and not report.ok else 0


def verify_target(target: str, spec: ShardingSpec, tolerance: float, device: str | None,
                  steps: int = 0) -> Verification | Approximation:
    """What one rank of a verification does. Every rank draws the target's weights from the same seed."""
    _quieten()
    place = place_of(spec.world_size, device)
    torch.manual_seed(0)
    model, inputs = build(load(target))
    if place.type != "cpu" and not any(p.is_meta for p in model.parameters()):
        model, inputs = model.to(place), pytree.tree_map_only(torch.Tensor, lambda t: t.to(place), inputs)
    if steps:
        return verify_approximate(model, spec, inputs, steps=steps)
    return verify(model, spec, inputs, tolerance=tolerance)


def _quieten() -> None:
    # PyTorch's exporter uses what it deprecates itself.
    warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")


def _explain(options: argparse.Namespace, spec: ShardingSpec) -> Explanation:
    function = load(options.target)
    with _progress(f"capturing {options.target}"):
        model, inputs = build(function)
        dump = PassDump(Path(options.dump)) if options.dump else None
        made = explain(model, spec, inputs, rank=options.rank, dump=dump, method=options.method,
                       device_memory=options.device_memory)
    if options.timeline:
        if made.stages is None:
            raise SpecError(f"--timeline shows the stages of a pipeline, but {spec} has none; add pipefusion=2 or more")
        made.stages.draw(options.timeline, options.steps, options.tflops * 1e12, options.gbytes * 1e9)
    return made


def _verify(options: argparse.Namespace, spec: ShardingSpec) -> Verification | Approximation:
    task = (options.target, spec, options.tolerance, options.device, options.steps if options.approximate else 0)
    with _progress(f"verifying {options.target} on {spec.world_size} ranks"):
        if "RANK" in os.environ:
            return verify_target(*task)
        spec.check_world(options.world_size or spec.world_size)
        if spec.world_size == 1:
            return verify_target(*task)
        # Before any process is started: a target that is not there, or a spec that does not fit it, is told at once.
        model, inputs = build(load(options.target))
        explain(model, spec, inputs)
        return launch(verify_target, *task, world_size=spec.world_size, device=options.device)[0]


def _run(options: argparse.Namespace) -> Run:
    made = run(flags.request(options))
    if dist.is_initialized():
        dist.destroy_process_group()  # nothing follows; NCCL complains of a group that is left
    return made


def _export(options: argparse.Namespace) -> Inspection:
    if (options.target is None) == (options.model is None):
        raise SpecError("export takes either a target, as in model.py:example, or --model with a pipeline's folder")
    with _progress(f"exporting {options.target or options.model}") as say:
        if options.target is not None:
            torch.manual_seed(0)  # as verify draws the weights of a target
            model, inputs = build(load(options.target))
            spec, calls = ShardingSpec.parse(options.spec), [inputs]
        else:
            only_one_speaks(_first())
            request = flags.request(options)
            spec, (model, calls) = request.spec, record(request, options.component)
        export(model, spec, calls, options.artifact, weights=options.weights, native=options.native,
               overwrite=options.overwrite, progress=say)
    return inspect(options.artifact)


def _bytes(text: str) -> int:
    """A size as people write it: ``24GB``, ``80GiB``, a number of bytes."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *(?:([kMGT]?)(i?)B?)", text.strip(), re.IGNORECASE)
    if found is None:
        raise argparse.ArgumentTypeError(f"cannot read {text!r} as a size; write it as 24GB or 80GiB")
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))


def _show(report: Explanation | Verification | Approximation | Run | Inspection, as_json: bool) -> None:
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    elif sys.stdout.isatty():
        Console().print(report)
    else:
        print(plain(report))


def _first() -> bool:
    """Whether this is the process that speaks to the user."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def _progress(what: str) -> Iterator[Callable[[str], None]]:
    """A spinner on the terminal's error stream; nothing anywhere else. Gives what to tell of progress."""
    if sys.stderr.isatty() and _first():
        with Console(stderr=True).status(what) as status:
            yield lambda step: status.update(f"{what}: {step}")
    else:
        yield lambda _: None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="xdit-compile", description=__doc__)
    parser.add_argument("--version", action="version", version=f"xdit-compile {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("run", help=flags.HELP.partition("\n")[0], description=flags.HELP, allow_abbrev=False,
                                  usage="xdit-compile run --model DIR_OR_ID [--spec SPEC] [--prompt TEXT] ...",
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_arguments(command)
    command = commands.add_parser("export", help=EXPORT.partition("\n")[0], description=EXPORT, allow_abbrev=False,
                                  usage="xdit-compile export (TARGET | --model DIR) --spec SPEC -o FOLDER ...",
                                  formatter_class=argparse.RawDescriptionHelpFormatter, conflict_handler="resolve")
    flags.add_arguments(command)
    command.add_argument("target", metavar="TARGET", nargs="?", help=TARGET)
    command.add_argument("--model", metavar="DIR_OR_ID", help="a folder of a pipeline, or its name on the hub")
    command.add_argument("-o", "--output", dest="artifact", required=True, metavar="FOLDER", help="the artifact")
    command.add_argument("--component", metavar="NAME", help="which model of the pipeline (default: its denoiser)")
    command.add_argument("--weights", choices=("reference", "included"), default="reference",
                         help="leave them in the model's safetensors (default), or write them into the artifact")
    command.add_argument("--native", action="store_true", help="compile all functions ahead, by AOTInductor")
    command.add_argument("--overwrite", action="store_true", help="replace an artifact that is there")
    command = commands.add_parser("inspect", help=INSPECT.partition("\n")[0], description=INSPECT,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("path", metavar="FOLDER", help="an artifact")
    command.add_argument("--check-all", action="store_true", help="compare the hashes of weights too")
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    for name, text in (("explain", EXPLAIN), ("verify", VERIFY)):
        command = commands.add_parser(name, help=text.partition("\n")[0], description=text,
                                      formatter_class=argparse.RawDescriptionHelpFormatter)
        command.add_argument("target", metavar="TARGET", help=TARGET)
        command.add_argument("--spec", required=True, help=SPEC)
        command.add_argument("--json", action="store_true", help="print the report as JSON")
        if name == "explain":
            command.add_argument("--rank", type=int, default=0, help="whose program is described (default 0)")
            command.add_argument("--method", default="forward", metavar="NAME",
                                 help="which of the model's methods is called, as an autoencoder's decode")
            command.add_argument("--device-memory", metavar="SIZE", type=_bytes,
                                 help="of a device, as 24GB: whether it fits, and what would")
            command.add_argument("--timeline", metavar="SVG", help="draw when the stages of a pipeline run")
            for flag, default, text in (("--steps", 8, "steps of denoising drawn"),
                                        ("--tflops", 100.0, "10^12 operations a second of each device"),
                                        ("--gbytes", 10.0, "10^9 bytes a second between two stages")):
                command.add_argument(flag, type=type(default), default=default, help=f"{text} (default %(default)s)")
            command.add_argument("--dump", metavar="DIR", help="write the program after each pass there")
        else:
            command.add_argument("--world-size", type=int, metavar="N",
                                 help="processes to start (default: what the spec needs)")
            command.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if it fits")
            command.add_argument("--approximate", action="store_true",
                                 help="for a spec that approximates: how far a loop of steps ends from one device's")
            command.add_argument("--steps", type=int, default=20, metavar="N", help="of that loop (default 20)")
            command.add_argument("--tolerance", type=float, default=1e-5,
                                 help="largest difference over the largest value (default 1e-5)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
