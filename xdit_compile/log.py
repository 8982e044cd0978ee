"""What the package says of its own work, through ``logging``: nothing, unless asked.

``XDIT_COMPILE_LOG=INFO`` shows captures, plans, compiled functions and programs that are used again, with their times,
each once, on the standard error of rank 0; ``DEBUG`` more. ``XDIT_COMPILE_LOG_RANKS=all`` shows those of all ranks.
Programs of their own take the loggers under ``xdit_compile`` as any others.
"""

from __future__ import annotations

import logging
import os
import sys

ROOT = __name__.split(".")[0]
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


def configure() -> None:
    """Do as the environment says. Called when the package is imported, in every process."""
    logger = logging.getLogger(ROOT)
    logger.addHandler(logging.NullHandler())
    level = os.environ.get("XDIT_COMPILE_LOG", "").upper()
    if not level:
        return
    if level not in LEVELS:
        print(f"xdit_compile: XDIT_COMPILE_LOG={level} is none of {', '.join(LEVELS)}; nothing is logged",
              file=sys.stderr)
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("[xdit_compile %(asctime)s rank %(rank)s] %(message)s", "%H:%M:%S"))
    handler.addFilter(_of_this_rank)
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False


def _of_this_rank(record: logging.LogRecord) -> bool:
    # The rank may be given to a process after it has imported the package.
    rank = os.environ.get("RANK", "0")
    record.__dict__["rank"] = rank
    return rank == "0" or os.environ.get("XDIT_COMPILE_LOG_RANKS") == "all"
