"""The command line: explain what parallelising a model would do, verify that it is right, plan which spec is best, run
or serve a pipeline, or export a model as an artifact and look into one."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn
from torch.utils import _pytree as pytree

from xdit_compile import __version__
from xdit_compile.artifact.export import export
from xdit_compile.artifact.inspection import Inspection, inspect
from xdit_compile.cli import calibrate as calibration
from xdit_compile.cli import plan as planning
from xdit_compile.cli import run_flags as flags
from xdit_compile.cli import serve_flags
from xdit_compile.cli.flag_parser import FlagParser
from xdit_compile.cli.pass_dump import PassDump
from xdit_compile.cli.record_calls import record
from xdit_compile.cli.run import Request, run
from xdit_compile.cli.run_result import Run
from xdit_compile.diagnostics.approximation import Approximation, verify_approximate
from xdit_compile.diagnostics.explain import explain
from xdit_compile.diagnostics.explanation import Explanation
from xdit_compile.diagnostics.verification import Verification
from xdit_compile.diagnostics.verify import verify
from xdit_compile.engine.target import build, load
from xdit_compile.errors import LaunchError, SpecError, XditError
from xdit_compile.ir.call_arguments import Inputs, call_arguments
from xdit_compile.pipelines.loading import only_one_speaks
from xdit_compile.pipelines.output_files import absent
from xdit_compile.planner.auto import Auto, bytes_of, resolved, spec_of
from xdit_compile.planner.calibrate import Calibration
from xdit_compile.planner.plan_report import Plan
from xdit_compile.progress import speaks
from xdit_compile.report.text import least_width, plain
from xdit_compile.runtime.launch import launch, place_of
from xdit_compile.runtime.uncaught import is_mine
from xdit_compile.spec import ShardingSpec

TARGET = "file.py:function or package.module:function; the function takes nothing and returns (model, kwargs)"
SPEC = "how to shard, as in ulysses=2,ring=2; or auto,machine=8xNAME"

EXPLAIN = """\
Say what parallelising one call of a model would do: no processes, no weights, any number of ranks.
The model is a function's, or one of a pipeline, which is run up to its first call of it.

examples:
  xdit-compile explain model.py:example --spec ulysses=8
  xdit-compile explain my_package.models:example --spec ulysses=4,ring=2 --json > report.json
  xdit-compile explain model.py:example --spec ulysses=2 --rank 1 --dump programs
  xdit-compile explain model.py:autoencoder --spec ring=4 --method decode
  xdit-compile explain model.py:example --spec pipefusion=4,patches=8 --timeline stages.svg --steps 12
  xdit-compile explain model.py:example --spec ulysses=8 --html report.html
  xdit-compile explain --model DIR --spec cfg=2,ulysses=2 --height 1024 --width 1024
"""

VERIFY = """\
Run a model as it is and in parallel, compare, and name the operator at which they part. Starts one process
for each rank, or takes part in the job that torchrun started it for. The model is a function's, or one of a pipeline.

examples:
  xdit-compile verify --model DIR --spec cfg=2 --prompt "a cat"
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
    options = _parser().parse_args(words if words[:1] in (["serve"], ["inspect"]) else flags.spelled(words))
    _quieten()
    report: Explanation | Verification | Approximation | Run | Inspection | Plan | Calibration
    try:
        if options.command == "serve":
            return serve_flags.run(options)
        if options.command == "run":
            report = _run(options)
        elif options.command == "export":
            report = _export(options)
        elif options.command == "inspect":
            report = inspect(options.path, check_all=options.check_all)
        elif options.command == "plan":
            with _progress(f"planning {options.target}") as say:
                report = planning.plan(options, lambda: build(load(options.target)), say)
        elif options.command == "calibrate":
            with _progress("measuring") as say:
                report = calibration.run(options, say)
        else:
            report = _explain(options) if options.command == "explain" else _verify(options)
    except XditError as error:
        cause = error.__cause__ if isinstance(error, LaunchError) and isinstance(
            error.__cause__, XditError) else error
        if is_mine(cause):
            print(f"xdit-compile: {cause}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if speaks():
            print("xdit-compile: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        # The target's own fault, or ours: to be seen whole, and told from a verification that failed.
        if is_mine(error):
            traceback.print_exc()
        return 2
    if speaks():
        _show(report, options.json)
    return 1 if isinstance(report, (Verification, Approximation)) and not report.ok else 0


def verify_target(target: str | tuple[Request, str | None], spec: ShardingSpec, tolerance: float,
                  device: str | None, steps: int = 0) -> Verification | Approximation:
    """What one rank of a verification does. Every rank draws the target's weights from the same seed."""
    _quieten()
    place = place_of(spec.world_size, device)
    model, inputs = _built(target)
    if place.type != "cpu" and not any(p.is_meta for p in model.parameters()):
        model, inputs = model.to(place), pytree.tree_map_only(torch.Tensor, lambda t: t.to(place), inputs)
    if steps:
        return verify_approximate(model, spec, inputs, steps=steps)
    return verify(model, spec, inputs, tolerance=tolerance)


def _built(target: str | tuple[Request, str | None]) -> tuple[nn.Module, Inputs]:
    """The model, and the arguments of one call of it, that a target or a pipeline gives."""
    torch.manual_seed(0)
    if isinstance(target, str):
        return build(load(target))
    only_one_speaks(speaks())
    model, calls = record(*target, first=True)
    return model, calls[0]


def _target(options: argparse.Namespace) -> str | tuple[Request, str | None]:
    """What the command is about: a function's model, or a pipeline's component."""
    if (options.target is None) == (options.model is None):
        raise SpecError(f"{options.command} takes either a target, as in model.py:example, or --model with a "
                        "pipeline's folder")
    return options.target or (flags.request(options), options.component)


def _quieten() -> None:
    # PyTorch's exporter uses what it deprecates itself.
    warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")


def _explain(options: argparse.Namespace) -> Explanation:
    target = _target(options)
    spec = spec_of(options.spec) if isinstance(target, str) else target[0].spec
    for path in filter(None, (options.dump, options.timeline, options.html)):
        absent(Path(path), options.overwrite)
    with _progress(f"capturing {options.target or options.model}"):
        model, inputs = _built(target)
        dump = PassDump(Path(options.dump)) if options.dump else None
        made = explain(model, spec, inputs, rank=options.rank, dump=dump, method=options.method,
                       device_memory=options.device_memory, every_rank=options.html is not None)
    if options.timeline:
        if made.stages is None:
            raise SpecError(f"--timeline shows the stages of a pipeline, but {made.spec} has none; add pipefusion=2 or "
                            "more")
        made.stages.draw(options.timeline, options.steps, options.tflops * 1e12, options.gbytes * 1e9)
    if options.html:
        made.write_page(options.html, flops_per_second=options.tflops * 1e12, bytes_per_second=options.gbytes * 1e9,
                        steps=options.steps)
    return made


def _verify(options: argparse.Namespace) -> Verification | Approximation:
    target = _target(options)
    spec = spec_of(options.spec) if isinstance(target, str) else target[0].spec
    if isinstance(spec, Auto):
        model, inputs = _built(target)
        spec = resolved(spec, model, *call_arguments(model, inputs))
    task = (target, spec, options.tolerance, options.device, options.steps if options.approximate else 0)
    with _progress(f"verifying {options.target or options.model} on {spec.world_size} ranks"):
        if "RANK" in os.environ:
            return verify_target(*task)
        spec.check_world(options.world_size or spec.world_size)
        if spec.world_size == 1:
            return verify_target(*task)
        # Before any process is started: a target that is not there, or a spec that does not fit it, is told at once.
        model, inputs = _built(target)
        explain(model, spec, inputs)
        return launch(verify_target, *task, world_size=spec.world_size, device=options.device)[0]


def _run(options: argparse.Namespace) -> Run:
    made = run(flags.request(options))
    if dist.is_initialized():
        dist.destroy_process_group()  # nothing follows; NCCL complains of a group that is left
    return made


def _export(options: argparse.Namespace) -> Inspection:
    if options.artifacts:
        raise SpecError("--artifact is for what was exported before; the folder to write is given as -o")
    target = _target(options)
    with _progress(f"exporting {options.target or options.model}") as say:
        if isinstance(target, str):
            model, inputs = _built(target)
            spec, calls = spec_of(options.spec), [inputs]
        else:
            only_one_speaks(speaks())
            spec, (model, calls) = target[0].spec, record(*target)
        export(model, spec, calls, options.artifact, weights=options.weights, native=options.native,
               overwrite=options.overwrite, progress=say)
    return inspect(options.artifact)


def _bytes(text: str) -> int:
    try:
        return bytes_of(text)
    except SpecError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _show(report: Explanation | Verification | Approximation | Run | Inspection | Plan | Calibration,
          as_json: bool) -> None:
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    elif sys.stdout.isatty():
        console = Console()
        Console(width=max(console.width, least_width(report))).print(report)
    else:
        print(plain(report))



@contextmanager
def _progress(what: str) -> Iterator[Callable[[str], None]]:
    """A spinner on the terminal's error stream; nothing anywhere else. Gives what to tell of progress."""
    if sys.stderr.isatty() and speaks():
        with Console(stderr=True).status(what) as status:
            yield lambda step: status.update(f"{what}: {step}")
    else:
        yield lambda _: None


def _parser() -> argparse.ArgumentParser:
    parser = FlagParser(prog="xdit-compile", description=__doc__)
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
    command = commands.add_parser("serve", help=serve_flags.HELP.partition(":")[0], description=serve_flags.HELP,
                                  allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                                  usage="xdit-compile serve --model DIR_OR_ID [--spec SPEC] [--port N] ...")
    serve_flags.add_arguments(command)
    command = commands.add_parser("inspect", help=INSPECT.partition("\n")[0], description=INSPECT,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("path", metavar="FOLDER", help="an artifact")
    command.add_argument("--check-all", action="store_true", help="compare the hashes of weights too")
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    command = commands.add_parser("plan", help=planning.HELP.partition("\n")[0], description=planning.HELP,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    planning.add_arguments(command, TARGET)
    command = commands.add_parser("calibrate", help=calibration.HELP.partition("\n")[0], description=calibration.HELP,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    calibration.add_arguments(command)
    for name, text in (("explain", EXPLAIN), ("verify", VERIFY)):
        command = commands.add_parser(name, help=text.partition("\n")[0], description=text, allow_abbrev=False,
                                      usage=f"xdit-compile {name} (TARGET | --model DIR) --spec SPEC ...",
                                      formatter_class=argparse.RawDescriptionHelpFormatter, conflict_handler="resolve")
        flags.add_arguments(command)
        command.add_argument("target", metavar="TARGET", nargs="?", help=TARGET)
        command.add_argument("--model", metavar="DIR_OR_ID", help="a folder of a pipeline, or its name on the hub")
        command.add_argument("--component", metavar="NAME", help="which model of the pipeline (default: its denoiser)")
        command.add_argument("--spec", required=True, help=SPEC)
        command.add_argument("--json", action="store_true", help="print the report as JSON")
        if name == "explain":
            command.add_argument("--rank", type=int, default=0, help="whose program is described (default 0)")
            command.add_argument("--method", default="forward", metavar="NAME",
                                 help="which of the model's methods is called, as an autoencoder's decode")
            command.add_argument("--device-memory", metavar="SIZE", type=_bytes,
                                 help="of a device, as 24GB: whether it fits, and what would")
            command.add_argument("--timeline", metavar="FILE", help="draw when the stages of a pipeline run, as SVG, "
                                                                    "PNG or PDF")
            command.add_argument("--html", metavar="FILE", help="write the report as one page with pictures")
            command.add_argument("--overwrite", action="store_true", help="replace files that are there")
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
