"""What signs the control plane: who does not hold the job's secret can neither speak for a rank nor end the job."""

from __future__ import annotations

import hashlib
import hmac
import os

VARIABLE = "XDIT_COMPILE_SECRET"
_SIGNATURE = 32


def secret() -> bytes:
    """The key of this job, derived from ``XDIT_COMPILE_SECRET``; empty where there is none, and nothing is signed.
    `launch` draws one for every job."""
    text = os.environ.get(VARIABLE, "")
    return hashlib.blake2b(text.encode(), digest_size=32).digest() if text else b""


def signed(key: bytes, name: str, text: str) -> str:
    """`text`, to be kept in the store under `name`, behind its signature."""
    return f"{_signature(key, name, text)}{text}" if key else text


def verified(key: bytes, name: str, held: bytes) -> str | None:
    """The text that was `signed`; None if it was not, or with another secret, or under another name."""
    found = held.decode(errors="replace")
    if not key:
        return found
    text = found[_SIGNATURE:]
    return text if hmac.compare_digest(found[:_SIGNATURE].encode(), _signature(key, name, text).encode()) else None


def _signature(key: bytes, name: str, text: str) -> str:
    content = f"{len(name)}:{name}{text}".encode()
    return hashlib.blake2b(content, key=key, digest_size=_SIGNATURE // 2).hexdigest()
