"""What our code waits for in the thread that calls it: values of tensors, and other ranks."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import habits
import torch
import zoo
from cases import made
from kept_runs import results, stepped
from torch.utils._python_dispatch import TorchDispatchMode

import xdit_compile
from xdit_compile.ir import host_values
from xdit_compile.runtime.control.agreement_channel import Comparison
from xdit_compile.runtime.control.control_plane import ControlPlane
from xdit_compile.runtime.deferred.deferred_tensor import materialize

OURS = str(Path(xdit_compile.__file__).parent)
aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.is_nonzero.default, aten.equal.default}


class Waits(TorchDispatchMode):
    """Counts, while it is on, what this thread waits for because our code asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.on, self.step = False, 0
        self._thread = threading.get_ident()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            self.note(str(func))
        return func(*args, **(kwargs or {}))

    def note(self, what: str) -> None:
        if self.on and threading.get_ident() == self._thread and (place := _asked_by()):
            self.seen[f"{what} by {place}"] += 1


def _asked_by() -> str:
    """The innermost code that is neither PyTorch's nor this file, if it is ours."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/torch/" not in name and name != __file__:
            return f"{Path(name).name}:{frame.f_lineno}" if name.startswith(OURS) else ""
        frame = frame.f_back  # type: ignore[assignment]
    return ""


@contextmanager
def watched(device: bool) -> Iterator[Waits]:
    """Within, waits are counted, if they are switched on; with ``device``, as if no tensor lay on the host."""
    waits = Waits()
    places: list[tuple[Any, str]] = [(torch.Tensor, n) for n in ("item", "tolist", "cpu", "numpy", "__bool__")]
    places += [(torch.cuda, "synchronize"), (torch.cuda.Event, "synchronize")]
    before = [(owner, name, getattr(owner, name)) for owner, name in places]
    on_host, arrive, ask = host_values.on_host, host_values.to_host, ControlPlane._await

    def to_host(numbers: torch.Tensor) -> Callable[[], list[Any]]:
        """What was asked for in a step before has arrived."""
        asked, found = waits.step, before[1][2](numbers)

        def arrived() -> list[Any]:
            if asked == waits.step:
                waits.note("what was just asked for")
            return found

        return arrived

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name != "numpy" or device:  # on the host it reads nothing
                waits.note(name)
            return function(*args, **kwargs)

        return call

    def awaited(control: ControlPlane, comparison: Comparison | None) -> None:
        if comparison is not None and comparison.waits:
            waits.note("another rank")
        ask(control, comparison)

    try:
        for owner, name, function in before:
            setattr(owner, name, counted(name, function))
        ControlPlane._await = awaited  # type: ignore[method-assign]
        if device:
            host_values.on_host, host_values.to_host = lambda tensor: False, to_host
        with waits:
            yield waits
    finally:
        host_values.on_host, host_values.to_host = on_host, arrive
        ControlPlane._await = ask  # type: ignore[method-assign]
        for owner, name, function in before:
            setattr(owner, name, function)


def of_a_model(name: str, spec: str, batch: int, device: bool, check_inputs: Any = "behind") -> dict[str, int]:
    """What steps after the second of a denoising loop wait for."""
    case = zoo.CASES[name]
    model, inputs = made(case), case.inputs(batch, True)
    spec = xdit_compile.ShardingSpec.parse(spec)
    run = xdit_compile.parallelize(model, spec, ranks=range(spec.world_size), timeout=60, check_inputs=check_inputs)
    sample = inputs["hidden_states"]
    with watched(device) as waits, torch.no_grad():
        for step in range(6):
            waits.on, waits.step = step >= 3, step
            out = run(**stepped(model, inputs, step) | {"hidden_states": sample}, return_dict=False)[0]
            sample = sample - 0.1 * out[:, :sample.shape[1]].reshape(sample.shape)
            waits.on = False
            if spec.pipefusion_degree == 1:
                sample = materialize(sample)
    return dict(waits.seen)


def begun_unseen(name: str, spec: str, check_inputs: Any) -> list[str]:
    """What each call says. The fourth looks like the next of its loop, while its time on a device, which is not waited
    for, says that it is the first of another."""
    case = zoo.CASES[name]
    model, inputs = made(case), case.inputs(1, True)
    run = xdit_compile.parallelize(model, spec, ranks=range(2), timeout=60, check_inputs=check_inputs)
    sample, said = inputs["hidden_states"], []
    with watched(True) as waits, torch.no_grad():
        for waits.step, step in enumerate((0, 1, 2, 0, 1, 0, 1)):
            try:
                out = run(**stepped(model, inputs, step) | {"hidden_states": sample}, return_dict=False)[0]
                sample = sample - 0.1 * out[:, :sample.shape[1]].reshape(sample.shape)
                said.append("")
            except xdit_compile.XditError as error:
                said.append(str(error))
    materialize(sample)
    return said


def of_a_pipeline(name: str, root: str, spec: str, device: bool) -> dict[str, int]:
    """What steps of a pipeline's call wait for between the third and the last."""
    case, _, pipe = habits.both(name, root, spec)
    with watched(device) as waits:
        def stepping(_: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
            waits.on, waits.step = 2 <= step < 5, step
            return given

        run = habits.pipelines.run
        run(pipe, case)
        run(pipe, case, callback_on_step_end=stepping, num_inference_steps=6)
    return dict(waits.seen)


def differing(name: str, spec: str, batch: int, what: str) -> tuple[str, str, int]:
    """Rank 1 does something else from the fourth step on: the error on this rank, its text, and at which step."""
    case = zoo.CASES[name]
    model, inputs = made(case), case.inputs(batch, True)
    run = xdit_compile.parallelize(model, spec, ranks=range(2), timeout=30)
    sample, deferred = inputs["hidden_states"], "pipefusion" in spec
    for step in range(8):
        given = stepped(model, inputs, step) | ({"hidden_states": sample} if deferred else {})
        if step >= 3 and torch.distributed.get_rank() == 1:
            CHANGES[what][0](model, given)
        try:
            if deferred:
                with torch.no_grad():
                    sample = sample - 0.1 * run(**given)["sample"][:, :sample.shape[1]]
            else:
                results(run, given)
        except Exception as error:
            return type(error).__name__, str(error), step
    return "", "nothing was noticed", 8


def _scaled(model: torch.nn.Module, given: dict[str, Any]) -> None:
    with torch.no_grad():
        model.get_parameter("adaln_single.linear.weight").mul_(1.01)  # which stages have in common


CHANGES: dict[str, tuple[Callable[[torch.nn.Module, dict[str, Any]], None], str]] = {
    "value": (lambda m, g: g.update(hidden_states=g["hidden_states"] + 1e-3), "hidden_states: "),
    "time": (lambda m, g: g.update(timestep=g["timestep"] * 0.5), "timestep: "),
    "prompt": (lambda m, g: g.update(encoder_hidden_states=-g["encoder_hidden_states"]), "encoder_hidden_states: "),
    "shape": (lambda m, g: g.update(hidden_states=g["hidden_states"][:, :, ::2]), "hidden_states: "),
    "dtype": (lambda m, g: g.update(hidden_states=g["hidden_states"].double()), "float64"),
    "option": (lambda m, g: g.update(return_dict=False), "return_dict: "),
    "weight": (_scaled, "do not hold the same weights: "),
}
"""What rank 1 may do else, and what the error says of it."""
