"""What is wrong with a request, in the form of each protocol."""

from __future__ import annotations

import sys
import traceback
from dataclasses import dataclass
from typing import Any

from satchel.runtime.errors import PromptError, QueueFullError, SatchelError
from satchel.runtime.util.terminal import printable

RETRY_SECONDS = 1
"""What Retry-After says: a row is free again after an answer, and how long that takes is not known."""

TYPES = {
    400: ("invalid_request_error", "invalid_request_error"),
    401: ("authentication_error", "authentication_error"),
    403: ("permission_error", "permission_error"),
    404: ("not_found_error", "not_found_error"),
    405: ("invalid_request_error", "invalid_request_error"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("rate_limit_error", "rate_limit_error"),
    503: ("service_unavailable", "overloaded_error"),
    504: ("timeout", "timeout_error"),
}
"""The `type` of an error by status: OpenAI's and Anthropic's."""
OTHER = ("server_error", "api_error")


@dataclass
class RequestError(Exception):
    """A request that is refused, or that failed: its HTTP status, what is wrong, where, and a name of the error."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None

    def headers(self) -> dict[str, str]:
        """What the answer has beside the body."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": str(RETRY_SECONDS)} if self.status in (429, 503) else {}

    def body(self, *, anthropic: bool) -> dict[str, Any]:
        """The error in OpenAI's form, or in Anthropic's."""
        openai_type, anthropic_type = TYPES.get(self.status, OTHER)
        message = printable(self.message)
        if anthropic:
            return {"type": "error", "error": {"type": anthropic_type, "message": message}}
        return {"error": {"message": message, "type": openai_type, "param": self.param, "code": self.code}}


class Gone(Exception):
    """The client has closed the connection."""


def explain(error: Exception) -> RequestError:
    """An error of satchel, or of the program, as one of a request; the traceback of the latter is printed."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, QueueFullError):
        return RequestError(429, str(error), code="queue_full")
    if isinstance(error, PromptError):
        return RequestError(400, str(error), code="invalid_request")
    if isinstance(error, SatchelError):
        return RequestError(500, str(error), code="bundle_error")
    if isinstance(error, MemoryError):
        return RequestError(503, "out of memory: ask again later", code="out_of_memory")
    traceback.print_exception(error, file=sys.stderr)
    return RequestError(500, "internal error: the server's log says more", code="internal_error")
