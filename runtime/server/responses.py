"""HTTP responses: JSON, and streams of events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from satchel.runtime.server.errors import Gone, RequestError, explain

ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
TEXT = "\ue000"
"""Where the text of a `Form` is, as no object that it is made of has it."""


@dataclass(frozen=True)
class Chunk:
    """An object that is encoded already, and its "type" if it has one."""

    content: bytes
    type: str = ""


Chunks = AsyncIterator[dict[str, Any] | Chunk]


class Form:
    """Objects that differ in one text, as those of a stream do: the rest is encoded once."""

    def __init__(self, document: dict[str, Any]) -> None:
        """`document` is one of the objects, with TEXT as its text."""
        self._before, self._after = encoded(document).split(encoded(TEXT))
        self._type = document.get("type", "")

    def __call__(self, text: str) -> Chunk:
        """The object with a text."""
        return Chunk(self._before + encoded(text) + self._after, self._type)


def encoded(document: Any) -> bytes:
    """JSON in UTF-8; half of a surrogate pair, as clients may send it, is escaped."""
    return ENCODER.encode(document).encode("utf-8", "backslashreplace")


def json_response(document: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON object as a response."""
    return Response(encoded(document), status, headers, "application/json")


def error_response(error: RequestError, *, anthropic: bool) -> Response:
    """An error in the form of a protocol."""
    return json_response(error.body(anthropic=anthropic), error.status, error.headers())


class EventStream(Response):
    """Sends objects as server-sent events, and closes `stack` at the end, whatever ends it.

    An error after the first event is an event too: the status has been sent then.
    """

    def __init__(
        self,
        chunks: Chunks,
        stack: AsyncExitStack,
        *,
        named: bool = False,
        done: str | None = None,
        form: Callable[[RequestError], dict[str, Any]] = lambda error: error.body(anthropic=False),
    ) -> None:
        """`named` events have their "type" as a name; `done` is a last event's text, `form` that of an error."""
        self._chunks, self._stack, self._named, self._done, self._form = chunks, stack, named, done, form
        super().__init__(headers={"Cache-Control": "no-cache"}, media_type="text/event-stream")
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; that the client goes ends `chunks`."""
        async with self._stack:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                async with aclosing(self._chunks) as chunks:  # type: ignore[type-var]
                    async for chunk in chunks:
                        await send({"type": "http.response.body", "body": self._event(chunk), "more_body": True})
                last = b"" if self._done is None else f"data: {self._done}\n\n".encode()
            except Gone:
                last = b""
            except Exception as error:  # noqa: BLE001 - the client is to know of any
                last = self._event(self._form(explain(error)))
            await send({"type": "http.response.body", "body": last})

    def _event(self, chunk: dict[str, Any] | Chunk) -> bytes:
        if isinstance(chunk, dict):
            chunk = Chunk(encoded(chunk), chunk.get("type", ""))
        name = b"event: " + chunk.type.encode() + b"\n" if self._named else b""
        return b"%sdata: %s\n\n" % (name, chunk.content)
