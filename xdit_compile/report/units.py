"""Numbers as people read them."""

from __future__ import annotations


def size(count: float) -> str:
    """Bytes: ``1.50 MB``."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB", "PB"))


def work(count: float) -> str:
    """Floating-point operations: ``1.50 TFLOP``."""
    return _scaled(count, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"))


def plural(count: int, word: str, words: str = "") -> str:
    """``1 collective``, ``2 collectives``; ``words`` is the plural where it is not made by an s."""
    return f"{count:,} {word if count == 1 else words or f'{word}s'}"


def _scaled(count: float, names: tuple[str, ...]) -> str:
    step = 0
    while abs(count) >= 999.5 and step < len(names) - 1:
        count, step = count / 1000, step + 1
    digits = 0 if step == 0 else 2 if count < 9.995 else 1 if count < 99.95 else 0
    return f"{count:.{digits}f} {names[step]}"
