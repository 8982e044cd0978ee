"""What the command ``plan`` does, and its flags."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from torch import nn

from xdit_compile.errors import SpecError
from xdit_compile.frontend.program_cache import captured
from xdit_compile.ir.call_arguments import Call, Inputs, call_arguments
from xdit_compile.ir.parameter_groups import parameter_groups
from xdit_compile.planner.auto import batch_of, bytes_of, machine_file
from xdit_compile.planner.costs import Loop
from xdit_compile.planner.machine import Machine, machine, networks, shipped
from xdit_compile.planner.plan import GOALS, Planner, Question
from xdit_compile.planner.plan_plot import draw
from xdit_compile.planner.plan_report import Plan
from xdit_compile.spec import ShardingSpec

HELP = f"""\
Say which spec is best for a model on a machine: what each would take, where the time goes, which do not go and why.
Nothing is run: no processes, no weights, no devices.

examples:
  xdit-compile plan model.py:example --machine 8xl40-pcie
  xdit-compile plan model.py:example --machine 2x8xh100+infiniband-400g --steps 50 --calls 2
  xdit-compile plan model.py:example --machine my.toml --world 4 --exact --json
  xdit-compile plan model.py:example --machine 8xa100-nvlink --plot plan.svg

machines: {', '.join(shipped())}
networks: {', '.join(networks())}
"""


def add_arguments(command: argparse.ArgumentParser, target: str) -> None:
    """The flags of ``plan``."""
    command.add_argument("target", metavar="TARGET", help=target)
    command.add_argument("--machine", metavar="NAME", help="a file that calibrate wrote, or NxNAME of a shipped "
                         "machine (default: this machine's file, if calibrate wrote one)")
    command.add_argument("--world", type=int, metavar="N", help="devices (default: all of the machine)")
    command.add_argument("--steps", type=int, default=Loop.steps, help="of denoising (default %(default)s)")
    command.add_argument("--calls", type=int, default=1, metavar="N",
                         help="of the model in each step, one for each term of guidance, where these are not in one "
                              "batch (default %(default)s)")
    command.add_argument("--goal", choices=GOALS, default=GOALS[0],
                         help="the shortest loop (default), or the most samples in the same time")
    command.add_argument("--exact", action="store_true", help="no spec whose results are approximate")
    command.add_argument("--device-memory", metavar="SIZE", help="of a device, as 24GB (default: the machine's)")
    command.add_argument("--base", default="", metavar="SPEC",
                         help="words of the spec that all have, as backend=inductor")
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    command.add_argument("--plot", metavar="SVG",
                         help="draw time against the number of devices, a line for each method")


def plan(options: argparse.Namespace, target: Callable[[], tuple[nn.Module, Inputs]],
         progress: Callable[[str], None]) -> Plan:
    """Carry it out.

    Raises:
        XditError: there is no such machine, or no spec for the model on it.
    """
    for name in ("steps", "calls", "world"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise SpecError(f"--{name} is a whole number of at least 1, got {value}")
    named = options.machine or str(machine_file())
    if options.machine is None and not machine_file().is_file():
        raise SpecError(f"--machine says which one; there is no {machine_file()} of this machine, which "
                        "xdit-compile calibrate would write")

    def sized(world: int) -> Machine:
        found = machine(named)
        return found if found.world_size >= world else machine(named, world)

    here = machine(named, options.world) if options.world else machine(named)
    progress("capture")
    model, inputs = target()
    args, kwargs = call_arguments(model, inputs)
    planner = Planner(captured(model, args, kwargs), parameter_groups(model), type(model).__name__)
    question = Question(
        here, options.world or here.world_size, Loop(options.steps, options.calls, batch_of(Call(model, args, kwargs))),
        options.goal, options.exact, None if options.device_memory is None else bytes_of(options.device_memory),
        base=ShardingSpec.parse(options.base))
    made = planner.plan(question, progress)
    if options.plot:
        draw(planner, question, sized, options.plot)
    return made
