"""/v1/responses: OpenAI's newer protocol, for text."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from satchel.runtime.generation.request import Request
from satchel.runtime.generation.result import Generation
from satchel.runtime.server import openai
from satchel.runtime.server.answers import Answers, asking, now
from satchel.runtime.server.errors import RequestError
from satchel.runtime.server.fields import Field, anything, flag, ignored, mapping, one_of, read, refused, text, whole
from satchel.runtime.server.messages import chat_ids, for_template
from satchel.runtime.server.models import Model
from satchel.runtime.server.options import MOST_TOKENS, OWN, options_of
from satchel.runtime.server.records import record_of
from satchel.runtime.server.responses import Chunks, EventStream, json_response
from satchel.runtime.server.state import State

NOT_KEPT = "answers are not kept: send the whole talk as input"

TABLE: dict[str, Field] = {
    **OWN,
    "model": text,
    "input": anything,
    "instructions": text,
    "max_output_tokens": whole(1, MOST_TOKENS),
    "stream": flag,
    "stream_options": mapping,
    "chat_template_kwargs": mapping,
    "text": refused({"format": {"type": "text"}}, {}, why="only text is supported: leave it out"),
    "tools": refused([], why="are not supported: leave them out"),
    "tool_choice": refused("none", "auto", why="must be none or auto"),
    "truncation": refused("disabled", why="prompts are not shortened: leave it out"),
    "previous_response_id": refused(why=NOT_KEPT),
    "conversation": refused(why=NOT_KEPT),
    "background": refused(False, why=NOT_KEPT),
    "store": ignored,
    "include": ignored,
    "metadata": ignored,
    "parallel_tool_calls": ignored,
    "prompt_cache_key": ignored,
    "reasoning": ignored,
    "safety_identifier": ignored,
    "service_tier": ignored,
    "user": ignored,
}

ITEM: dict[str, Field] = {
    "type": one_of("message"),
    "role": one_of("system", "developer", "user", "assistant"),
    "content": anything,
    "id": ignored,
    "status": ignored,
    "phase": ignored,
}


async def responses(state: State, http: HttpRequest, body: Any) -> Response:
    """Answer one request."""
    given = read(body, TABLE, "input")
    talk = _talk(given)
    async with AsyncExitStack() as stack:
        model = await stack.enter_async_context(state.models.using(given.get("model")))
        arguments = given.get("chat_template_kwargs")
        written, ids = await asyncio.to_thread(chat_ids, model.generator, talk, arguments=arguments)
        record_of(http).asks(model.name, written if state.settings.log_prompts else None)
        options = options_of(given, model.chat_options, model.generator.engine.vocabulary)
        answers = await stack.enter_async_context(asking(model, [Request(ids, options)], http, state.settings.timeout))
        work = _Work(model, answers, given)
        if given.get("stream"):
            return EventStream(work.chunks(), stack.pop_all(), named=True, form=_error)
        (result,) = await answers.whole()
        return json_response(work.document(result))


def _talk(given: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages as chat templates expect them. Raises RequestError."""
    items = given["input"]
    if isinstance(items, str):
        items = [{"role": "user", "content": items}]
    if not isinstance(items, list) or not items:
        raise RequestError(400, "input: must be a text or a list of messages", "input", "invalid_value")
    found = [{"role": "system", "content": given["instructions"]}] if given.get("instructions") else []
    for place, item in enumerate(items):
        one = read(item, ITEM, "role", "content", where=f"input[{place}].")
        found.append({"role": one["role"], "content": one["content"]})
    return for_template(found)


def _error(error: RequestError) -> dict[str, Any]:
    """An error in a stream."""
    return {"type": "error", "code": error.code, "message": error.message, "param": error.param}


@dataclass
class _Work:
    """What is being answered, and the form of the answer."""

    model: Model
    answers: Answers
    given: dict[str, Any]
    id: str = field(default_factory=lambda: openai.new_id("resp"))
    item: str = field(default_factory=lambda: openai.new_id("msg"))
    created: int = field(default_factory=now)

    def document(self, result: Generation | None) -> dict[str, Any]:
        """The answer as a whole; of None, before its first token."""
        reason = None if result is None else openai.FINISH[result.finish_reason]
        status = {None: "in_progress", "stop": "completed"}.get(reason, "incomplete")
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "model": self.model.name,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": self.given.get("instructions"),
            "max_output_tokens": self.given.get("max_output_tokens"),
            "metadata": {},
            "output": [] if result is None else [self._message(result.text, status)],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": self.given.get("temperature"),
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": self.given.get("top_p"),
            "truncation": "disabled",
            "usage": None if result is None else _usage(result),
        }

    async def chunks(self) -> Chunks:
        """The answer in pieces, numbered."""
        number = 0
        async for event in self._events():
            yield {**event, "sequence_number": number}
            number += 1

    async def _events(self) -> Chunks:
        place = {"item_id": self.item, "output_index": 0, "content_index": 0}
        yield {"type": "response.created", "response": self.document(None)}
        yield {"type": "response.in_progress", "response": self.document(None)}
        begun = self._message(None, "in_progress")
        yield {"type": "response.output_item.added", "output_index": 0, "item": begun}
        yield {"type": "response.content_part.added", **place, "part": _part("")}
        async for _, event in self.answers:
            if event.text:
                yield {"type": "response.output_text.delta", **place, "delta": event.text, "logprobs": []}
        result = self.answers.results[0]
        whole = self.document(result)
        yield {"type": "response.output_text.done", **place, "text": result.text, "logprobs": []}
        yield {"type": "response.content_part.done", **place, "part": _part(result.text)}
        yield {"type": "response.output_item.done", "output_index": 0, "item": whole["output"][0]}
        yield {"type": f"response.{whole['status']}", "response": whole}

    def _message(self, content: str | None, status: str) -> dict[str, Any]:
        parts = [] if content is None else [_part(content)]
        return {"id": self.item, "type": "message", "role": "assistant", "status": status, "content": parts}


def _part(content: str) -> dict[str, Any]:
    return {"type": "output_text", "text": content, "annotations": [], "logprobs": []}


def _usage(result: Generation) -> dict[str, Any]:
    return {
        "input_tokens": result.prompt_tokens,
        "input_tokens_details": {"cached_tokens": result.reused_tokens, "cache_write_tokens": 0},
        "output_tokens": result.new_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": result.prompt_tokens + result.new_tokens,
    }
