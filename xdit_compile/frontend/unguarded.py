"""What code can read and no guard can: random bytes of the system are refused, clocks and files are said by name.

What a function calls is told from the names in its code; that it may not come that far does not count.
"""

from __future__ import annotations

import time
import warnings

from torch import nn

from xdit_compile.errors import CaptureError
from xdit_compile.frontend.reads import Reads, resolve

_RANDOM = frozenset({"urandom", "uuid1", "uuid4", "token_bytes", "token_hex", "randbelow", "randbits", "SystemRandom"})
_OUTSIDE = (open, time.time, time.time_ns, time.monotonic, time.monotonic_ns)


def check_reads(model: nn.Module, reads: Reads) -> None:
    """Say what the forward of ``model`` can read that may be another at each call.

    Raises:
        CaptureError: random bytes of the system, which every rank would draw differently.
    """
    if drawn := sorted(_RANDOM & reads.names()):
        raise CaptureError(f"the forward of {type(model).__name__} can draw from {drawn[0]}, which is another on every "
                           "rank and at every call; pass what it draws in as an argument")
    found = ((".".join(chain), resolve(ran, chain)[2]) for ran, chain in reads.chains() if not ran.is_layer)
    if outside := sorted({name for name, value in found if any(value is k for k in _OUTSIDE)}):
        warnings.warn(f"the forward of {type(model).__name__} can read {', '.join(outside)}: a program keeps what that "
                      "gave when it was captured", stacklevel=2)
