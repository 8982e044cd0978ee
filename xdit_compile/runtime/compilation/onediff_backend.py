"""Hands functions to onediff (``onediff.infer_compiler.compile``, read in 1.2.0) and checks what it makes of them.

Its compilers change numbers in ways of their own (one writes GELU in another form), and there is no promise of how
much. So the first call of each function is computed twice, and a difference is said. Nothing else takes the place of a
compiler that is asked for.
"""

from __future__ import annotations

import importlib
import inspect
import platform
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from xdit_compile.errors import SpecError, XditError
from xdit_compile.runtime.compilation.graph_segments import Function
from xdit_compile.spec import ShardingSpec

TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-2}
"""Of the largest value of a result; results of other types must be equal."""


def _here() -> str:
    return f"here is torch {torch.__version__} with Python {platform.python_version()}"


NEEDS: dict[str, tuple[str, Callable[[], str]]] = {
    "oneflow": ("oneflow", lambda: "its wheels are for Python 3.10 and older: pip install oneflow in such a Python, as "
                                   f"onediff's README says; {_here()}"),
    "nexfort": ("nexfort.compilers", lambda: "pip install nexfort==0.1.dev330, its last release, which runs with torch "
                                             f"2.4.0+cu121 and no other; {_here()}"),
}
"""What a compiler of onediff imports, and how to come by it."""


def onediff_compiler(spec: ShardingSpec) -> Callable[[fx.GraphModule], Function]:
    """What compiles one function with onediff as ``spec`` asks for.

    Raises:
        SpecError: onediff or its compiler is absent, unable, or does not know the options.
    """
    compile_with = _compile()
    default = inspect.signature(compile_with).parameters["backend"].default
    name = spec.onediff_backend or default
    _check_compiler(name)
    options = _options(name, spec.options)

    def compiler(module: fx.GraphModule) -> Function:
        try:
            made = compile_with(module, backend=name, options=options)
        except Exception as error:  # whatever the compiler is unable to do
            raise XditError(f"onediff's compiler {name!r} refuses a function of the model: {type(error).__name__}: "
                            f"{error}; say backend=inductor or backend=eager to do without it") from error
        return Checked(name, module, made)

    return compiler


def _compile() -> Callable[..., Any]:
    """``onediff.infer_compiler.compile``."""
    try:
        package = importlib.import_module("onediff.infer_compiler")
    except ImportError as error:
        raise SpecError("backend=onediff needs the package onediff 1.2 or newer: pip install 'xdit-compile[onediff]'; "
                        f"importing it says: {error}") from error
    found = getattr(package, "compile", None)
    if found is None or not {"backend", "options"} <= inspect.signature(found).parameters.keys():
        version = getattr(importlib.import_module("onediff"), "__version__", "of an unknown version")
        raise SpecError("backend=onediff needs onediff 1.2 or newer, whose compile takes a backend and options; "
                        f"installed is onediff {version}: pip install 'xdit-compile[onediff]'")
    return found


def _check_compiler(name: str) -> None:
    """Raise SpecError unless onediff has this compiler, and it can run here."""
    registry = importlib.import_module("onediff.infer_compiler.backends.registry")
    module, advice = NEEDS.get(name, ("", lambda: ""))
    try:
        if module:
            # onediff itself would import it at the first call, when ranks wait for each other.
            importlib.import_module(module)
        registry.lookup_backend(name)
    except Exception as error:  # a package made for another torch may fail in any way
        if module:
            raise SpecError(f"onediff_backend={name} needs the package {module.partition('.')[0]}, and importing it "
                            f"says: {type(error).__name__}: {error}. To come by it: {advice()}. Or say "
                            "backend=inductor") from error
        known = ", ".join(sorted({*NEEDS, *registry._BACKENDS}))
        raise SpecError(f"onediff has no compiler named {name!r}; it knows {known}, and what is registered with "
                        f"onediff.infer_compiler.backends.registry.register_backend ({error})") from error


def _options(name: str, options: dict[str, Any]) -> Any:
    """``options`` as the compiler takes them; None for none."""
    if not options or name != "oneflow":
        return options or None
    made = importlib.import_module("onediff.infer_compiler").OneflowCompileOptions
    try:
        return made(**options)
    except TypeError as error:
        raise SpecError(f"compile_options are not those of oneflow: {error}") from error


class Checked:
    """A compiled function whose first call is compared with the graph it was made from."""

    def __init__(self, name: str, module: fx.GraphModule, call: Function) -> None:
        self._name, self._call = name, call
        self._module: fx.GraphModule | None = module

    def __call__(self, *tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        results = self._call(*tensors)
        if self._module is not None:
            self._compare(results, self._module(*tensors))
            self._module = None
        return results

    def _compare(self, results: Any, expected: Sequence[torch.Tensor]) -> None:
        said = f"onediff's compiler {self._name!r} gives"
        if not isinstance(results, (tuple, list)) or [_kind(t) for t in results] != [_kind(t) for t in expected]:
            raise XditError(f"{said} {_kinds(results)} where the function has {_kinds(expected)}; choose other "
                            "compile_options, or backend=inductor")
        for got, wanted in zip(results, expected, strict=True):
            difference, tolerance = _difference(got, wanted), TOLERANCES.get(wanted.dtype, 0.0)
            if not difference <= tolerance:
                warnings.warn(f"{said} other numbers than the function it was given: they differ by {difference:.2g} "
                              f"of the largest value, and {tolerance:g} is usual for {wanted.dtype}. They are used as "
                              "they are; other compile_options may help, backend=inductor does", RuntimeWarning,
                              stacklevel=2)
                return


def _kind(value: Any) -> Any:
    return (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__


def _kinds(values: Any) -> str:
    return ", ".join(str(_kind(v)) for v in values) if isinstance(values, (tuple, list)) else str(_kind(values))


def _difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference over the largest value."""
    if not wanted.numel() or torch.equal(got, wanted):
        return 0.0
    if not (wanted.is_floating_point() or wanted.is_complex()):
        return float("inf")
    wide = torch.complex128 if wanted.is_complex() else torch.float64
    scale = wanted.abs().max().item()
    return (got.to(wide) - wanted.to(wide)).abs().max().item() / (scale or 1.0)
