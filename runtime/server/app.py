"""The application: which path is answered by what."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

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


class Endpoint:
    """Answers the requests of one path and method.

    An application of its own: Starlette gives functions and whole applications a layer each that every piece of a
    stream passes.
    """

    def __init__(self, answer: Callable[[Request], Awaitable[Response]]) -> None:
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; an error is an answer in the protocol's form."""
        http = Request(scope, receive, send)
        try:
            response = await self._answer(http)
        except (Gone, ClientDisconnect):
            response = Response(status_code=GONE)
        except Exception as error:  # noqa: BLE001 - each one is an answer
            response = error_response(explain(error), anthropic=is_anthropic(http.url.path))
        await response(scope, receive, send)


def make_app(state: State, hosts: frozenset[str] | None = None) -> ASGIApp:
    """The application; `hosts` are the names that it may be called by, None for any."""

    def post(handler: Handler) -> Endpoint:
        async def answer(http: Request) -> Response:
            return await handler(state, http, parse(await read_body(http, state.settings.max_body)))

        return Endpoint(answer)

    def get(handler: Handler) -> Endpoint:
        return Endpoint(lambda http: handler(state, http, None))

    def refusal(status: int, words: str, headers: dict[str, str]) -> Endpoint:
        async def answer(http: Request) -> Response:
            path = http.url.path
            error = RequestError(status, f"{path[:60]}: {words}", code="not_found")
            return json_response(error.body(anthropic=is_anthropic(path)), status, headers)

        return Endpoint(answer)

    def wrong_method(allowed: str) -> Endpoint:
        return refusal(405, "the path does not take this method", {"Allow": allowed})

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(state.models.close)

    routes = [Route(path, post(handler), methods=["POST"]) for path, handler in POSTS.items()]
    routes += [Route(path, get(handler), methods=["GET"]) for path, handler in GETS.items()]
    routes += [Route(path, wrong_method("POST")) for path in POSTS]
    routes += [Route(path, wrong_method("GET, HEAD")) for path in GETS]
    router = Router(routes, default=refusal(404, "there is no such path", {}), lifespan=lifespan)
    return Guard(router, state, frozenset([*POSTS, *GETS]), hosts)
