"""What every request passes before its route: the key, the size of its body, where it comes from; and its count."""

from __future__ import annotations

import hmac
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xdit_compile.serve.metrics import Metrics
from xdit_compile.serve.refusals import Refusal
from xdit_compile.serve.settings import Settings

LOCAL = ("127.0.0.1", "localhost", "::1")
"""Addresses of this machine alone."""
OPEN = ("/", "/health", "/ready")
"""Routes that need no key: they tell and do nothing that is anybody's."""


class Guards:
    """Middleware."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        held, started = 0, False

        async def counted() -> Message:
            nonlocal held
            message = await receive()
            held += len(message.get("body", b""))
            if held > self._settings.limits.body:
                raise self._too_long()
            return message

        async def told(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self._metrics.requests.labels(_route(scope), message["status"]).inc()
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, counted, told)
        except Refusal as refusal:
            if started:
                raise
            self._metrics.refused.labels(refusal.code).inc()
            await JSONResponse(refusal.body, refusal.status, {**refusal.headers, "Connection": "close"})(
                scope, receive, told)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._settings.limits.body:
            raise self._too_long()
        # A page of another site that someone has open must not use their machine, nor one whose name was made to
        # lead here.
        name = headers.get("host", "").rpartition(":")[0] or headers.get("host", "")
        if self._settings.host in LOCAL and name.strip("[]") not in LOCAL:
            raise Refusal(403, f"this server is this machine's alone, and is not called {name[:80]!r}", "foreign_host")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != headers.get("host"):
            raise Refusal(403, f"requests from pages of {origin[:80]} are not taken", "foreign_origin")
        if self._settings.api_key and scope["path"] not in OPEN:
            kind, _, key = headers.get("authorization", "").partition(" ")
            given = key.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
            if not hmac.compare_digest(given.encode(), self._settings.api_key.encode()):
                raise Refusal(401, "the key is missing or wrong; send it as Authorization: Bearer KEY",
                              "invalid_api_key")

    def _too_long(self) -> Refusal:
        return Refusal(413, f"the body is longer than {self._settings.limits.body} bytes", "too_long")


def _route(scope: MutableMapping[str, Any]) -> str:
    """The route as it was declared, so that clients cannot make new ones."""
    return getattr(scope.get("route"), "path", "none")
