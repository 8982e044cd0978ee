"""A model named on the command line: where its function is, and what it gives."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from xdit_compile.errors import XditError, did_you_mean
from xdit_compile.ir.call_arguments import Inputs


def load(target: str) -> Callable[[], Any]:
    """The function that ``file.py:function`` or ``package.module:function`` names.

    Raises:
        XditError: there is no such file, module or function.
    """
    where, _, name = target.rpartition(":")
    if not where or not name:
        raise XditError(f"cannot read the target {target!r}; write file.py:function or "
                        "package.module:function")
    module = _from_file(Path(where)) if where.endswith(".py") else _from_name(where)
    function = getattr(module, name, None)
    if not callable(function):
        there = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")
                 and getattr(v, "__module__", "") == module.__name__]
        raise XditError(f"{where} has no function {name!r}{did_you_mean(name, there)}; it has "
                        f"{', '.join(there) or 'none'}")
    return function


def build(function: Callable[[], Any]) -> tuple[nn.Module, Inputs]:
    """The model and its example inputs.

    Raises:
        XditError: the function returns something else.
    """
    made = function()
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module) and isinstance(
            made[1], (Mapping, tuple, list)):
        return made
    raise XditError(f"{function.__name__} must return (model, kwargs), a torch.nn.Module and the keyword "
                    f"arguments of its forward; it returned a {type(made).__name__}")


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise XditError(f"there is no file {path}")
    if (path.parent / "__init__.py").is_file():
        return _in_package(path)
    # As when the file is run as a script, it may import its neighbours; a name of its own, lest a `types.py`
    # pass for Python's module.
    sys.path.insert(0, str(path.parent.resolve()))
    name = f"xdit_compile_target_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        if "attempted relative import" not in str(error):
            raise
        del sys.modules[name]
        return _in_package(path)  # a package without an __init__.py
    return module


def _in_package(path: Path) -> ModuleType:
    """The module of a file of a package, by its name in there, so that it may import its siblings relatively."""
    root = path.resolve().parent
    names = [root.name, path.stem]
    while (root / "__init__.py").is_file() and (root.parent / "__init__.py").is_file():
        root = root.parent
        names.insert(0, root.name)
    sys.path.insert(0, str(root.parent))
    return importlib.import_module(".".join(names))


def _from_name(name: str) -> ModuleType:
    # An installed command does not look for modules in the current folder, as Python itself does.
    sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise XditError(f"there is no module {name!r}") from None
        raise
