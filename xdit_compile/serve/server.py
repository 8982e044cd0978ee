"""Serving until told to stop."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from importlib import import_module

from xdit_compile.engine.handle import Engine
from xdit_compile.errors import XditError
from xdit_compile.serve.settings import Settings

log = logging.getLogger(__name__)


def serve(settings: Settings, start: Callable[[], Engine]) -> bool:
    """Serve an engine until SIGTERM or Ctrl-C: then what is under way gets its time, and new requests a 503.

    Returns:
        Whether the engine had started.

    Raises:
        XditError: a library is missing.
    """
    try:
        uvicorn = import_module("uvicorn")
        app = import_module("xdit_compile.serve.app")
    except ImportError as error:
        raise XditError(f"serving needs FastAPI, uvicorn, prometheus_client and python-multipart ({error}); "
                        "pip install 'xdit-compile[serve]'") from error
    failed: list[bool] = []

    def give_up() -> None:
        failed.append(True)
        server.should_exit = True

    application = app.application(app.Server(settings, start, give_up))
    patience = int(settings.grace) + 5
    server = uvicorn.Server(uvicorn.Config(application, settings.host, settings.port, log_level="warning",
                                           timeout_graceful_shutdown=patience))
    # uvicorn hands a signal on when it is done; it has been heeded by then.
    for number in (signal.SIGTERM, signal.SIGINT):
        if threading.current_thread() is threading.main_thread():
            signal.signal(number, lambda *_: None)
    server.run()
    return not failed
