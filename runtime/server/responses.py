"""HTTP responses: JSON, and streams of events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, aclosing
from typing import Any

from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from satchel.runtime.server.errors import Gone, RequestError, explain

Chunks = AsyncIterator[dict[str, Any]]


def encoded(document: Any) -> bytes:
    """JSON in UTF-8; half of a surrogate pair, as clients may send it, is escaped."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")


def json_response(document: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON object as a response."""
    return Response(encoded(document), status, headers, "application/json")


def error_response(error: RequestError, *, anthropic: bool) -> Response:
    """An error in the form of a protocol."""
    return json_response(error.body(anthropic=anthropic), error.status, error.headers())


class EventStream(StreamingResponse):
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
        super().__init__(self._lines(), headers={"Cache-Control": "no-cache"}, media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; that the client goes ends `chunks`."""
        async with self._stack:
            await self.stream_response(send)

    async def _lines(self) -> AsyncIterator[bytes]:
        try:
            async with aclosing(self._chunks) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    yield self._event(chunk)
            if self._done is not None:
                yield f"data: {self._done}\n\n".encode()
        except Gone:
            return
        except Exception as error:  # noqa: BLE001 - the client is to know of any
            yield self._event(self._form(explain(error)))

    def _event(self, chunk: dict[str, Any]) -> bytes:
        name = b"event: " + chunk["type"].encode() + b"\n" if self._named else b""
        return name + b"data: " + encoded(chunk) + b"\n\n"
