"""/v1/messages and /v1/messages/count_tokens: Anthropic's protocol."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from satchel.runtime.generation.request import Request
from satchel.runtime.generation.result import Generation
from satchel.runtime.server import openai
from satchel.runtime.server.answers import Answers, asking
from satchel.runtime.server.errors import RequestError
from satchel.runtime.server.fields import (
    Field,
    anything,
    flag,
    ignored,
    mapping,
    objects,
    one_of,
    read,
    refused,
    text,
    whole,
)
from satchel.runtime.server.fields import texts as several_texts
from satchel.runtime.server.messages import chat_ids
from satchel.runtime.server.models import Model
from satchel.runtime.server.options import MOST_TOKENS, OWN, options_of
from satchel.runtime.server.records import record_of
from satchel.runtime.server.responses import Chunks, EventStream, json_response
from satchel.runtime.server.state import State

COUNTED: dict[str, Field] = {
    "model": text,
    "messages": objects,
    "system": anything,
    "chat_template_kwargs": mapping,
    "thinking": refused({"type": "disabled"}, why="is not supported: leave it out"),
    "tools": refused([], why="are not supported: leave them out"),
    "tool_choice": refused({"type": "auto"}, {"type": "none"}, why="must be auto or none"),
}
"""Keys of both endpoints."""

TABLE: dict[str, Field] = {
    **OWN,
    **COUNTED,
    "max_tokens": whole(1, MOST_TOKENS),
    "stop_sequences": several_texts,
    "stream": flag,
    "metadata": ignored,
    "service_tier": ignored,
}

MESSAGE: dict[str, Field] = {"role": one_of("user", "assistant"), "content": anything}
BLOCK: dict[str, Field] = {"type": one_of("text"), "text": text, "cache_control": ignored, "citations": ignored}


async def messages(state: State, http: HttpRequest, body: Any) -> Response:
    """Answer one request."""
    given = read(body, TABLE, "messages", "max_tokens")
    talk = _talk(given)
    async with AsyncExitStack() as stack:
        model = await stack.enter_async_context(state.models.using(given.get("model")))
        written, ids = await _encoded(model, given, talk)
        record_of(http).asks(model.name, written if state.settings.log_prompts else None)
        options = options_of(given, model.chat_options, model.generator.engine.vocabulary)
        answers = await stack.enter_async_context(asking(model, [Request(ids, options)], http, state.settings.timeout))
        work = _Work(model, answers, len(ids), options.stop)
        if given.get("stream"):
            return EventStream(work.chunks(), stack.pop_all(), named=True, form=anthropic_form)
        (result,) = await answers.whole()
        return json_response(work.document(result))


async def count_tokens(state: State, http: HttpRequest, body: Any) -> Response:
    """The number of tokens of a request."""
    given = read(body, COUNTED, "messages")
    talk = _talk(given)
    async with state.models.using(given.get("model")) as model:
        record_of(http).asks(model.name, None)
        _, ids = await _encoded(model, given, talk)
        return json_response({"input_tokens": len(ids)})


def anthropic_form(error: RequestError) -> dict[str, Any]:
    """An error in a stream."""
    return error.body(anthropic=True)


async def _encoded(model: Model, given: dict[str, Any], talk: list[dict[str, Any]]) -> tuple[str, Any]:
    """The text and the ids of messages; the answer continues a last message of the assistant."""
    unfinished = talk[-1]["role"] == "assistant"
    arguments = given.get("chat_template_kwargs")
    return await asyncio.to_thread(chat_ids, model.generator, talk, arguments=arguments, unfinished=unfinished)


def _talk(given: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages as chat templates expect them. Raises RequestError."""
    if not given["messages"]:
        raise RequestError(400, "messages: must have at least one message", "messages", "invalid_value")
    found = [{"role": "system", "content": _text(given["system"], "system")}] if given.get("system") else []
    for place, message in enumerate(given["messages"]):
        where = f"messages[{place}]."
        one = read(message, MESSAGE, "role", "content", where=where)
        found.append({"role": one["role"], "content": _text(one["content"], f"{where}content")})
    return found


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(400, f"{where}: must be a text or a list of blocks", where, "invalid_value")
    blocks = (read(block, BLOCK, "type", "text", where=f"{where}[{place}].") for place, block in enumerate(content))
    return "\n".join(block["text"] for block in blocks)


@dataclass
class _Work:
    """What is being answered, and the form of the answer."""

    model: Model
    answers: Answers
    prompt_tokens: int
    stops: tuple[str, ...]

    def document(self, result: Generation) -> dict[str, Any]:
        """The answer as a whole."""
        content = [{"type": "text", "text": result.text}] if result.text else []
        return self._message(content) | self._end(result) | {"usage": _usage(result)}

    async def chunks(self) -> Chunks:
        """The answer in pieces."""
        begun = {"input_tokens": self.prompt_tokens, "output_tokens": 0}
        ends = {"stop_reason": None, "stop_sequence": None}
        yield {"type": "message_start", "message": self._message([]) | ends | {"usage": begun}}
        yield {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
        async for _, event in self.answers:
            if event.text:
                delta = {"type": "text_delta", "text": event.text}
                yield {"type": "content_block_delta", "index": 0, "delta": delta}
        result = self.answers.results[0]
        yield {"type": "content_block_stop", "index": 0}
        yield {"type": "message_delta", "delta": self._end(result), "usage": _usage(result)}
        yield {"type": "message_stop"}

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": openai.new_id("msg"), "type": "message", "role": "assistant", "model": self.model.name}
        return head | {"content": content}

    def _end(self, result: Generation) -> dict[str, Any]:
        """Why an answer ended; the tokens of one that a stop text ended hold that text."""
        if result.finish_reason != "stop":
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        told = self.model.tokenizer.decode(result.token_ids) if self.stops else ""
        found = min((stop for stop in self.stops if stop in told), key=told.index, default=None)
        return {"stop_reason": "end_turn" if found is None else "stop_sequence", "stop_sequence": found}


def _usage(result: Generation) -> dict[str, Any]:
    return {
        "input_tokens": result.prompt_tokens - result.reused_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": result.reused_tokens,
        "output_tokens": result.new_tokens,
    }
