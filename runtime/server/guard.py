"""What every request passes: who may ask, from which pages, how much, and the line of the log."""

from __future__ import annotations

import hmac
import re
import secrets
import sys
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from satchel.runtime.server.errors import RequestError
from satchel.runtime.server.records import Record
from satchel.runtime.server.responses import error_response
from satchel.runtime.server.state import State

PUBLIC = ("/", "/health")
"""Paths that need no key."""
REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
"""What a client may call its request."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Guard:
    """Refuses what is not allowed, and records the rest."""

    def __init__(self, app: ASGIApp, state: State, paths: frozenset[str], hosts: frozenset[str] | None) -> None:
        """`paths` are those that there are; `hosts` are the names that the server may be called by, None for any."""
        self._app, self._state, self._paths, self._hosts = app, state, paths, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request. Its answer has its id, which the client may have given."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        id = given if REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        record = Record(scope["method"], scope["path"], id)
        scope.setdefault("state", {})["record"] = record
        origin = headers.get("origin")
        allowed = origin if origin in self._state.settings.cors_origins else None

        async def recorded(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["request-id" if is_anthropic(scope["path"]) else "x-request-id"] = id
                if allowed is not None:
                    _allow(MutableHeaders(scope=message), allowed)
            await send(message)

        try:
            refusal = self._refusal(scope, headers, allowed)
            if refusal is not None:
                response = error_response(refusal, anthropic=is_anthropic(scope["path"]))
                await response(scope, receive, recorded)
            elif scope["method"] == "OPTIONS" and allowed is not None:
                await recorded({"type": "http.response.start", "status": 204, "headers": []})
                await recorded({"type": "http.response.body", "body": b""})
            else:
                await self._app(scope, receive, recorded)
        finally:
            self._state.metrics.add(record, record.path in self._paths)
            if not self._state.settings.quiet:
                print(record.line(), file=sys.stderr, flush=True)

    def _refusal(self, scope: Scope, headers: Headers, allowed: str | None) -> RequestError | None:
        settings, host, origin = self._state.settings, headers.get("host", ""), headers.get("origin")
        if self._hosts is not None and _name(host) not in self._hosts:
            return RequestError(403, f"this server is not called {host[:60]}: use localhost", code="wrong_host")
        if origin is not None and allowed is None and urlsplit(origin).netloc != host:
            return RequestError(
                403, f"pages of {origin[:60]} may not ask: start the server with --cors-origin", code="wrong_origin"
            )
        if settings.api_key is None or scope["path"] in PUBLIC or scope["method"] == "OPTIONS":
            return None
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = headers.get("x-api-key") or (bearer.strip() if scheme.lower() == "bearer" else "")
        if not hmac.compare_digest(given.encode("latin-1"), settings.api_key.encode()):
            return RequestError(401, "the API key is missing or wrong: send the server's", code="invalid_api_key")
        return None


async def read_body(http: Request, limit: int) -> bytes:
    """The body of a request. Raises RequestError for one of more than `limit` bytes, without reading it all."""
    content = bytearray()
    too_large = RequestError(413, f"the body has more than {limit} bytes: shorten it", code="body_too_large")
    if (declared := http.headers.get("content-length", "")).isdigit() and int(declared[:20]) > limit:
        raise too_large
    async for block in http.stream():
        content += block
        if len(content) > limit:
            raise too_large
    return bytes(content)


def is_anthropic(path: str) -> bool:
    """Whether a path is of Anthropic's protocol."""
    return path.startswith("/v1/messages")


def _name(host: str) -> str:
    """The name in a Host header, without its port."""
    return urlsplit(f"//{host}").hostname or ""


def _allow(headers: MutableHeaders, origin: str) -> None:
    headers["Access-Control-Allow-Origin"] = origin
    headers["Access-Control-Allow-Methods"] = "GET, POST, OPTIONS"
    headers["Access-Control-Allow-Headers"] = "*, Authorization"
    headers["Vary"] = "Origin"
