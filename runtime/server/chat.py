"""/v1/chat/completions: answers messages in the chat template."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from satchel.runtime.generation.events import Event
from satchel.runtime.generation.result import Generation
from satchel.runtime.server import openai
from satchel.runtime.server.answers import now
from satchel.runtime.server.call_source import Piece
from satchel.runtime.server.errors import RequestError
from satchel.runtime.server.fields import Field, anything, flag, ignored, mapping, objects, read, refused, whole
from satchel.runtime.server.formats import chat_format
from satchel.runtime.server.messages import for_template
from satchel.runtime.server.options import MOST_LOGPROBS, MOST_TOKENS
from satchel.runtime.server.responses import TEXT, Chunks, EventStream, Form, json_response
from satchel.runtime.server.state import State
from satchel.runtime.server.talks import EFFORT, Asked, Talk, ask
from satchel.runtime.server.tools import chat_tools

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
    "response_format": mapping,
    "tools": objects,
    "tool_choice": anything,
    "parallel_tool_calls": flag,
    "modalities": refused(["text"], why=TEXT_ONLY),
    "audio": refused(why=TEXT_ONLY),
    "prediction": ignored,
    "reasoning_effort": EFFORT,
    "verbosity": ignored,
}


async def chat(state: State, http: HttpRequest, body: Any) -> Response:
    """Answer one request."""
    given = read(body, TABLE, "messages")
    given |= chat_format(given)
    told, messages = openai.wants_usage(given), for_template(given["messages"])
    talk = Talk(messages, chat_tools(given), given.get("chat_template_kwargs"), _is_unfinished(given),
                given.get("reasoning_effort"))  # fmt: skip
    async with AsyncExitStack() as stack:
        asked = await ask(stack, state, http, _with_logprobs(given), talk, given.get("n", 1))
        work = _Work(asked, told)
        if given.get("stream"):
            return EventStream(work.chunks(), stack.pop_all(), done="[DONE]")
        return json_response(await work.document())


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

    asked: Asked
    told: bool
    head: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.head = {
            "id": openai.new_id("chatcmpl"),
            "object": "chat.completion",
            "created": now(),
            "model": self.asked.model.name,
            "system_fingerprint": self.asked.model.fingerprint,
        }

    async def document(self) -> dict[str, Any]:
        """The answer as a whole."""
        pieces: list[list[Piece]] = [[] for _ in self.asked.replies]
        async for index, event in self.asked.answers:
            pieces[index] += self.asked.pieces(index, event)
        results = [self.asked.answers.results[index] for index in range(len(self.asked.replies))]
        choices, tokenizer = [], self.asked.model.tokenizer
        for index, result in enumerate(results):
            found = None if result.logprobs is None else openai.chat_logprobs(tokenizer, result.logprobs)
            called = any(piece.kind == "call" for piece in pieces[index])
            choices.append(
                {
                    "index": index,
                    "message": _message(pieces[index]),
                    "logprobs": found,
                    "finish_reason": _reason(result, called),
                }
            )
        return {**self.head, "choices": choices, "usage": self._usage(results)}

    async def chunks(self) -> Chunks:
        """The answer in pieces."""
        calls = [0 for _ in self.asked.replies]
        forms = [Form(self._chunk(index, {"content": TEXT})) for index in range(len(self.asked.replies))]
        for index in range(len(self.asked.replies)):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        async for index, event in self.asked.answers:
            deltas: list[dict[str, Any]] = []
            pieces = self.asked.pieces(index, event)
            if not event.logprobs and event.outcome is None and all(piece.kind == "content" for piece in pieces):
                for piece in pieces:
                    yield forms[index](piece.text)
                continue
            for piece in pieces:
                calls[index] += bool(piece.name)
                deltas += _deltas(piece, calls[index] - 1)
            if event.logprobs:
                deltas = deltas or [{}]
            for place, delta in enumerate(deltas):
                yield self._chunk(index, delta, event=event if place == 0 else None)
            if ended := self.asked.answers.results.get(index):
                yield self._chunk(index, {}, _reason(ended, calls[index] > 0))
        if self.told:
            results = [self.asked.answers.results[index] for index in range(len(self.asked.replies))]
            yield {**self.head, "object": "chat.completion.chunk", "choices": [], "usage": self._usage(results)}

    def _usage(self, results: Sequence[Generation]) -> dict[str, Any]:
        details = {"reasoning_tokens": self.asked.reasoning_tokens()}
        return {**openai.usage(results), "completion_tokens_details": details}

    def _chunk(
        self, index: int, delta: dict[str, Any], reason: str | None = None, event: Event | None = None
    ) -> dict[str, Any]:
        found = openai.chat_logprobs(self.asked.model.tokenizer, event.logprobs) if event and event.logprobs else None
        choice = {"index": index, "delta": delta, "logprobs": found, "finish_reason": reason}
        empty = {"usage": None} if self.told else {}
        return {**self.head, "object": "chat.completion.chunk", "choices": [choice], **empty}


def _reason(result: Generation, called: bool) -> str:
    reason = openai.FINISH[result.finish_reason]
    return "tool_calls" if called and reason == "stop" else reason


def _message(pieces: Sequence[Piece]) -> dict[str, Any]:
    """The message that the pieces of an answer make."""
    texts = {kind: "".join(piece.text for piece in pieces if piece.kind == kind) for kind in ("content", "reasoning")}
    calls: list[dict[str, Any]] = []
    for piece in pieces:
        if piece.name:
            calls.append(_call(piece))
        elif piece.kind == "call":
            calls[-1]["function"]["arguments"] += piece.text
    message: dict[str, Any] = {"role": "assistant", "content": texts["content"], "refusal": None}
    if texts["reasoning"]:
        message["reasoning_content"] = texts["reasoning"]
    if calls:
        message |= {"content": texts["content"] or None, "tool_calls": calls}
    return message


def _call(piece: Piece) -> dict[str, Any]:
    function = {"name": piece.name, "arguments": piece.text}
    return {"id": openai.new_id("call"), "type": "function", "function": function}


def _deltas(piece: Piece, number: int) -> list[dict[str, Any]]:
    """A piece of an answer in a stream; a call with `number` others before it is its name, then its arguments."""
    if piece.kind != "call":
        return [{"reasoning_content" if piece.kind == "reasoning" else "content": piece.text}]
    named = [{**_call(Piece("call", "", piece.name)), "index": number}] if piece.name else []
    more = [{"index": number, "function": {"arguments": piece.text}}] if piece.text else []
    return [{"tool_calls": [each]} for each in named + more]
