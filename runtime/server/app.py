"""The application: which path is answered by what."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from satchel.runtime.server import anthropic, texts
from satchel.runtime.server.chat import chat
from satchel.runtime.server.completions import completions
from satchel.runtime.server.embeddings import embeddings
from satchel.runtime.server.errors import Gone, RequestError, explain
from satchel.runtime.server.fields import parse
from satchel.runtime.server.guard import Guard, is_anthropic, read_body
from satchel.runtime.server.response_items import responses
from satchel.runtime.server.responses import error_response, json_response
from satchel.runtime.server.state import State

Handler = Callable[[State, Request, Any], Awaitable[Response]]

POSTS: dict[str, Handler] = {
    "/v1/chat/completions": chat,
    "/v1/completions": completions,
    "/v1/responses": responses,
    "/v1/messages": anthropic.messages,
    "/v1/messages/count_tokens": anthropic.count_tokens,
    "/v1/embeddings": embeddings,
    "/tokenize": texts.tokenize,
    "/detokenize": texts.detokenize,
    "/apply-template": texts.apply_template,
}
"""Endpoints that take a JSON body."""

GONE = 499
"""The status in the log of a request whose client has gone."""


async def health(state: State, http: Request, body: Any) -> Response:
    """Whether the server answers, and all loaded models run."""
    failed = sorted(name for name, model in state.models.loaded.items() if not model.alive)
    if failed:
        raise RequestError(503, f"model {', '.join(failed)}: a step failed; the next request loads it again")
    return json_response({"status": "ok"})


async def models(state: State, http: Request, body: Any) -> Response:
    """The models by name; of those that are loaded, `meta` says more."""
    loaded = state.models.loaded
    served = [
        {"id": name, "object": "model", "created": state.models.created, "owned_by": "satchel",
         "meta": loaded[name].meta if name in loaded else None}
        for name in state.models.paths
    ]  # fmt: skip
    name = http.path_params.get("name")
    if name is None:
        return json_response({"object": "list", "data": served})
    found = [each for each in served if each["id"] == name]
    if not found:
        raise RequestError(404, f"model {name[:60]}: is not served here", "model", "model_not_found")
    return json_response(found[0])


async def metrics(state: State, http: Request, body: Any) -> Response:
    """Counts, for Prometheus."""
    return PlainTextResponse(state.metrics.text(state.models.loaded.values()))


PAGE = Path(__file__).with_name("page.html")
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""The page loads nothing, and asks this server only."""


async def page(state: State, http: Request, body: Any) -> Response:
    """A page to chat with."""
    return FileResponse(PAGE, headers=PAGE_HEADERS, media_type="text/html")


GETS: dict[str, Handler] = {
    "/": page,
    "/health": health,
    "/v1/models": models,
    "/v1/models/{name:path}": models,
    "/metrics": metrics,
}
"""Endpoints without a body."""


def make_app(state: State, hosts: frozenset[str] | None = None) -> ASGIApp:
    """The application; `hosts` are the names that it may be called by, None for any."""

    def route(path: str, handler: Handler, method: str) -> Route:
        async def endpoint(http: Request) -> Response:
            try:
                body = parse(await read_body(http, state.settings.max_body)) if method == "POST" else None
                return await handler(state, http, body)
            except (Gone, ClientDisconnect):
                return Response(status_code=GONE)
            except Exception as error:  # noqa: BLE001 - each one is an answer in the protocol's form
                return error_response(explain(error), anthropic=is_anthropic(path))

        return Route(path, endpoint, methods=[method])

    async def refused(http: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        words = {404: "there is no such path", 405: "the path does not take this method"}
        found = RequestError(
            status, f"{http.url.path[:60]}: {words.get(status, 'cannot be answered')}", code="not_found"
        )
        response = error_response(found, anthropic=is_anthropic(http.url.path))
        response.headers.update(getattr(error, "headers", None) or {})  # Allow
        return response

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(state.models.close)

    routes = [route(path, handler, "POST") for path, handler in POSTS.items()]
    routes += [route(path, handler, "GET") for path, handler in GETS.items()]
    app = Starlette(routes=routes, exception_handlers={HTTPException: refused}, lifespan=lifespan)
    return Guard(app, state, frozenset([*POSTS, *GETS]), hosts)
