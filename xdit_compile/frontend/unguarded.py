"""What code can read and no guard can: random bytes of the system are refused, clocks and files are said by name.

What a function calls is told from the names in its code; that it may not come that far does not count.
"""

from __future__ import annotations

import os
import random
import secrets
import sys
import time
import uuid
import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

from xdit_compile.errors import CaptureError
from xdit_compile.frontend.reads import Reads, names_of, resolve

_RANDOM = (os.urandom, uuid.uuid1, uuid.uuid4, secrets, random.SystemRandom)
_OUTSIDE = (open, time.time, time.time_ns, time.monotonic, time.monotonic_ns)


def check_reads(model: nn.Module, reads: Reads) -> None:
    """Say what the forward of ``model`` can read that may be another at each call.

    Raises:
        CaptureError: random bytes of the system, which every rank would draw differently.
    """
    found = dict(_named(reads))
    if drawn := [name for name, value in found.items() if _among(value, _RANDOM)]:
        raise CaptureError(f"the forward of {type(model).__name__} can draw from {drawn[0]}, which is another on every "
                           "rank and at every call; pass what it draws in as an argument")
    if outside := sorted(name for name, value in found.items() if _among(value, _OUTSIDE)):
        warnings.warn(f"the forward of {type(model).__name__} can read {', '.join(outside)}: a program keeps what that "
                      "gave when it was captured", stacklevel=2)


def _named(reads: Reads) -> Iterator[tuple[str, Any]]:
    """What code of the model names: globals, and attributes of modules that it imports itself."""
    for ran, chain in reads.chains():
        if not ran.is_layer:
            yield ".".join(chain), resolve(ran, chain)[2]
            yield chain[0], resolve(ran, chain[:1])[2]
    for ran in reads.codes.values():
        names = names_of(ran.code)
        for module in names.imported & {"os", "uuid", "secrets", "random", "time"} if not ran.is_layer else ():
            yield from ((f"{module}.{n}", vars(sys.modules[module]).get(n)) for n in sorted(names.attributes)
                        if n in vars(sys.modules[module]))


def _among(value: Any, known: tuple[Any, ...]) -> bool:
    return any(value is k for k in known) or (
        getattr(value, "__module__", None) == "secrets")
