"""What a server says in place of an answer, in the form of OpenAI's API."""

from __future__ import annotations

from concurrent.futures import CancelledError
from typing import Any

from xdit_compile.errors import ArgumentError, XditError

# What pipelines raise, of arguments that they cannot use, without saying so.
_OF_ARGUMENTS = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError)


class Refusal(Exception):
    """An answer other than 200.

    Args:
        status: of HTTP.
        code: for programs.
        param: the argument that it is about.
        after: seconds after which it is worth while to ask again.
    """

    def __init__(self, status: int, text: str, code: str, param: str | None = None, after: int | None = None) -> None:
        super().__init__(text)
        self.status, self.text, self.code, self.param, self.after = status, text, code, param, after

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.text, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.after is None else {"Retry-After": str(self.after)}


def bad(text: str, param: str | None = None) -> Refusal:
    """The request itself is wrong."""
    return Refusal(400, text, "invalid_value", param)


def refusal_of(error: BaseException, steps: int) -> Refusal:
    """How a call's failure is told: as the client's fault where all ranks refused it alike before their first step."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, CancelledError):
        return Refusal(409, "the request was cancelled", "cancelled")
    if isinstance(error, TimeoutError):
        return Refusal(504, f"{error}", "timeout")
    if isinstance(error, ArgumentError):
        return bad(str(error))
    if isinstance(error, _OF_ARGUMENTS) and not isinstance(error, XditError) and steps == 0:
        return Refusal(422, f"the pipeline cannot use these arguments: {type(error).__name__}: {error}",
                       "unusable_arguments")
    return Refusal(500, f"{type(error).__name__}: {error}", "failed")
