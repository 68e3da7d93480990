"""/v1/chat/completions: answers messages in the chat template."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from satchel.runtime.generation.result import Generation
from satchel.runtime.generation.scheduler import Event
from satchel.runtime.server import openai
from satchel.runtime.server.answers import Answers, asking, now
from satchel.runtime.server.errors import RequestError
from satchel.runtime.server.fields import Field, flag, ignored, mapping, objects, read, refused, whole
from satchel.runtime.server.messages import chat_ids, for_template
from satchel.runtime.server.models import Model
from satchel.runtime.server.options import MOST_LOGPROBS, MOST_TOKENS, options_of
from satchel.runtime.server.records import record_of
from satchel.runtime.server.replies import Piece, Reply
from satchel.runtime.server.responses import Chunks, EventStream, json_response
from satchel.runtime.server.state import State

TEXT_ONLY = "satchel writes text only: leave it out"

TABLE: dict[str, Field] = {
    **openai.COMMON,
    "messages": objects,
    "max_completion_tokens": whole(1, MOST_TOKENS),
    "logprobs": flag,
    "top_logprobs": whole(0, MOST_LOGPROBS),
    "continue_final_message": flag,
    "add_generation_prompt": flag,
    "chat_template_kwargs": mapping,
    "response_format": refused({"type": "text"}, why="only text is supported: leave it out"),
    "tools": refused([], why="are not supported: leave them out"),
    "tool_choice": refused("none", "auto", why="must be none or auto"),
    "parallel_tool_calls": ignored,
    "modalities": refused(["text"], why=TEXT_ONLY),
    "audio": refused(why=TEXT_ONLY),
    "prediction": ignored,
    "reasoning_effort": ignored,
    "verbosity": ignored,
}


async def chat(state: State, http: HttpRequest, body: Any) -> Response:
    """Answer one request."""
    given = read(body, TABLE, "messages")
    told, messages = openai.wants_usage(given), for_template(given["messages"])
    async with AsyncExitStack() as stack:
        model = await stack.enter_async_context(state.models.using(given.get("model")))
        text, ids = await asyncio.to_thread(
            chat_ids, model.generator, messages,
            arguments=given.get("chat_template_kwargs"), unfinished=_is_unfinished(given),
        )  # fmt: skip
        record_of(http).asks(model.name, text if state.settings.log_prompts else None)
        options = options_of(_with_logprobs(given), model.chat_options, model.generator.engine.vocabulary)
        requests = openai.samples(ids, options, given.get("n", 1))
        answers = await stack.enter_async_context(asking(model, requests, http, state.settings.timeout))
        work = _Work(model, answers, told)
        if given.get("stream"):
            return EventStream(work.chunks(len(requests)), stack.pop_all(), done="[DONE]")
        return json_response(work.document(await answers.whole()))


def _is_unfinished(given: dict[str, Any]) -> bool:
    unfinished = bool(given.get("continue_final_message"))
    if unfinished and given.get("add_generation_prompt"):
        raise RequestError(
            400, "continue_final_message and add_generation_prompt exclude each other", "continue_final_message"
        )
    return unfinished


def _with_logprobs(given: dict[str, Any]) -> dict[str, Any]:
    """The keys with satchel's `logprobs`: how many likely tokens, in place of whether and how many."""
    others = {key: value for key, value in given.items() if key not in ("logprobs", "top_logprobs")}
    if given.get("logprobs"):
        return others | {"logprobs": given.get("top_logprobs", 0)}
    if "top_logprobs" in given:
        raise RequestError(400, "top_logprobs: needs logprobs to be true", "top_logprobs", "invalid_value")
    return others


@dataclass
class _Work:
    """What is being answered, and the form of the answer."""

    model: Model
    answers: Answers
    told: bool
    head: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.head = {
            "id": openai.new_id("chatcmpl"),
            "object": "chat.completion",
            "created": now(),
            "model": self.model.name,
            "system_fingerprint": self.model.fingerprint,
        }

    def document(self, results: Sequence[Generation]) -> dict[str, Any]:
        """The answer as a whole."""
        choices = []
        for index, result in enumerate(results):
            reply = Reply()
            message = _message([*reply.add(result.text), *reply.finish()])
            found = None if result.logprobs is None else openai.chat_logprobs(self.model.tokenizer, result.logprobs)
            reason = openai.FINISH[result.finish_reason]
            choices.append({"index": index, "message": message, "logprobs": found, "finish_reason": reason})
        return {**self.head, "choices": choices, "usage": openai.usage(results)}

    async def chunks(self, count: int) -> Chunks:
        """The answer in pieces."""
        replies = [Reply() for _ in range(count)]
        for index in range(count):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        async for index, event in self.answers:
            ended = self.answers.results.get(index)
            pieces = replies[index].add(event.text) + (replies[index].finish() if ended else [])
            deltas = [_delta(piece) for piece in pieces]
            if event.logprobs:
                deltas = deltas or [{}]
            for place, delta in enumerate(deltas):
                yield self._chunk(index, delta, event=event if place == 0 else None)
            if ended:
                yield self._chunk(index, {}, openai.FINISH[ended.finish_reason])
        if self.told:
            results = [self.answers.results[index] for index in range(count)]
            yield {**self.head, "object": "chat.completion.chunk", "choices": [], "usage": openai.usage(results)}

    def _chunk(
        self, index: int, delta: dict[str, Any], reason: str | None = None, event: Event | None = None
    ) -> dict[str, Any]:
        found = openai.chat_logprobs(self.model.tokenizer, event.logprobs) if event and event.logprobs else None
        choice = {"index": index, "delta": delta, "logprobs": found, "finish_reason": reason}
        empty = {"usage": None} if self.told else {}
        return {**self.head, "object": "chat.completion.chunk", "choices": [choice], **empty}


def _message(pieces: Sequence[Piece]) -> dict[str, Any]:
    """The message that the pieces of an answer make."""
    return {"role": "assistant", "content": "".join(piece.text for piece in pieces), "refusal": None}


def _delta(piece: Piece) -> dict[str, Any]:
    """A piece of an answer in a stream."""
    return {piece.kind: piece.text}
