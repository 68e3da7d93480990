"""/v1/embeddings: texts become vectors of length 1, by a bundle that was exported with `--embeddings`."""

from __future__ import annotations

import asyncio
import base64
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from satchel.runtime.errors import PromptError, QueueFullError
from satchel.runtime.server.errors import Gone, RequestError
from satchel.runtime.server.fields import Field, anything, ignored, one_of, read, text, whole
from satchel.runtime.server.models import Model
from satchel.runtime.server.openai import checked_ids, prompts_of
from satchel.runtime.server.records import record_of
from satchel.runtime.server.responses import json_response
from satchel.runtime.server.state import State

MOST_TEXTS = 2048

TABLE: dict[str, Field] = {
    "model": text,
    "input": anything,
    "encoding_format": one_of("float", "base64"),
    "dimensions": whole(1, 2**31 - 1),
    "adapter": text,
    "user": ignored,
}


async def embeddings(state: State, http: HttpRequest, body: Any) -> Response:
    """Answer one request."""
    given = read(body, TABLE, "input")
    async with state.models.using(given.get("model")) as model:
        texts = prompts_of(given["input"], "input", MOST_TEXTS)
        record_of(http).asks(model.name, texts if state.settings.log_prompts else None)
        _check(model, given)
        ids = [await asyncio.to_thread(checked_ids, model.generator, each, "input") for each in texts]
        count = sum(map(len, ids))
        vectors = await _embed(state, http, model, ids, given.get("adapter"))
        record_of(http).embedded = count
        encode = _base64 if given.get("encoding_format") == "base64" else _numbers
        data = [
            {"object": "embedding", "index": index, "embedding": encode(vector)} for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": count, "total_tokens": count}
        return json_response({"object": "list", "data": data, "model": model.name, "usage": usage})


def _check(model: Model, given: dict[str, Any]) -> None:
    """Raise RequestError for what the bundle does not do."""
    engine = model.generator.engine
    if engine.bundle.manifest.embeddings is None:
        rule = "has no embeddings: use one that was exported with --embeddings"
        raise RequestError(400, f"model {model.name}: {rule}", "model", "embeddings_not_supported")
    size = engine.check_embeddings().size
    if given.get("dimensions", size) != size:
        rule = f"vectors of this model have {size} dimensions and are not shortened: leave it out"
        raise RequestError(400, f"dimensions: {rule}", "dimensions", "invalid_value")
    try:
        engine.adapters.check(given.get("adapter"))
    except PromptError as error:
        raise RequestError(400, str(error), "adapter", "invalid_value") from None


async def _embed(
    state: State, http: HttpRequest, model: Model, ids: list[Any], adapter: str | None
) -> list[NDArray[np.float32]]:
    """The vectors, one text after another: requests of one model wait for each other.

    Raises Gone if the client has gone, QueueFullError if too many wait, and RequestError at the end of the time limit.
    """
    if model.embedding_waits >= state.settings.queue + 1:
        raise QueueFullError(f"{state.settings.queue} requests wait already, as many as may: ask again later")
    end = time.monotonic() + state.settings.timeout if state.settings.timeout else None
    found = []
    model.embedding_waits += 1
    try:
        async with model.embedding:
            for each in ids:
                if await http.is_disconnected():
                    raise Gone
                if end is not None and time.monotonic() > end:
                    raise RequestError(504, "the time limit was over before the last text", code="timeout")
                found.append((await asyncio.to_thread(model.generator.embed, [each], adapter=adapter))[0])
    finally:
        model.embedding_waits -= 1
    return found


def _numbers(vector: NDArray[np.float32]) -> list[float]:
    numbers: list[float] = vector.tolist()
    return numbers


def _base64(vector: NDArray[np.float32]) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
