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
from satchel.runtime.generation.tokenizer import Tokenizer
from satchel.runtime.server import openai
from satchel.runtime.server.answers import Answers, asking, now
from satchel.runtime.server.errors import RequestError
from satchel.runtime.server.fields import Field, flag, ignored, mapping, objects, one_of, read, refused, text, whole
from satchel.runtime.server.messages import chat_ids, for_template
from satchel.runtime.server.models import Model
from satchel.runtime.server.options import MOST_LOGPROBS, MOST_TOKENS, options_of
from satchel.runtime.server.records import record_of
from satchel.runtime.server.replies import CLOSED, THINK, Piece, Reply
from satchel.runtime.server.responses import Chunks, EventStream, json_response
from satchel.runtime.server.state import State

LOOSE = "arguments are not constrained: leave it out"
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
    "tools": objects,
    "tool_choice": refused("none", "auto", why="must be none or auto"),
    "parallel_tool_calls": ignored,
    "modalities": refused(["text"], why=TEXT_ONLY),
    "audio": refused(why=TEXT_ONLY),
    "prediction": ignored,
    "reasoning_effort": ignored,
    "verbosity": ignored,
}


TOOL: dict[str, Field] = {"type": one_of("function"), "function": mapping}
FUNCTION: dict[str, Field] = {
    "name": text,
    "description": text,
    "parameters": mapping,
    "strict": refused(False, why=LOOSE),
}


async def chat(state: State, http: HttpRequest, body: Any) -> Response:
    """Answer one request."""
    given = read(body, TABLE, "messages")
    told, messages = openai.wants_usage(given), for_template(given["messages"])
    async with AsyncExitStack() as stack:
        model = await stack.enter_async_context(state.models.using(given.get("model")))
        tools = _tools(given, model)
        rendered, ids = await asyncio.to_thread(
            chat_ids, model.generator, messages, tools=tools,
            arguments=given.get("chat_template_kwargs"), unfinished=_is_unfinished(given),
        )  # fmt: skip
        record_of(http).asks(model.name, rendered if state.settings.log_prompts else None)
        options = options_of(_with_logprobs(given), model.chat_options, model.generator.engine.vocabulary)
        requests = openai.samples(ids, options, given.get("n", 1))
        answers = await stack.enter_async_context(asking(model, requests, http, state.settings.timeout))
        thinking = rendered.rstrip().endswith(THINK)
        replies = [Reply(tools=bool(tools), thinking=thinking) for _ in requests]
        work = _Work(model, answers, told, replies, special_marks(model.tokenizer) if tools else {})
        if given.get("stream"):
            return EventStream(work.chunks(), stack.pop_all(), done="[DONE]")
        return json_response(await work.document())


def _tools(given: dict[str, Any], model: Model) -> list[dict[str, Any]] | None:
    """The tools that the model is told of, None for none. Raises RequestError."""
    tools = given.get("tools") or None
    if tools is None or given.get("tool_choice") == "none":
        return None
    for place, tool in enumerate(tools):
        where = f"tools[{place}]."
        function = read(read(tool, TOOL, "type", "function", where=where)["function"], FUNCTION, "name",
                        where=f"{where}function.")  # fmt: skip
        if not function["name"]:
            raise RequestError(400, f"{where}function.name: must not be empty", f"{where}function.name")
    generator = model.generator
    if generator.has_template and "tools" not in generator.template.sources[generator.template.choose(None, tools)]:
        raise RequestError(400, "tools: the chat template of this model takes none", "tools", "tools_not_supported")
    return list(tools)


def special_marks(tokenizer: Tokenizer) -> dict[int, str]:
    """What begins a call, by the ids of special tokens, which have no text."""
    ids = {tokenizer.special_token(mark): mark for mark in CLOSED}
    return {token: mark for token, mark in ids.items() if token is not None}


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
    replies: list[Reply]
    marks: dict[int, str]
    head: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.head = {
            "id": openai.new_id("chatcmpl"),
            "object": "chat.completion",
            "created": now(),
            "model": self.model.name,
            "system_fingerprint": self.model.fingerprint,
        }

    async def document(self) -> dict[str, Any]:
        """The answer as a whole."""
        pieces: list[list[Piece]] = [[] for _ in self.replies]
        async for index, event in self.answers:
            pieces[index] += self._pieces(index, event)
        results = [self.answers.results[index] for index in range(len(self.replies))]
        choices = []
        for index, result in enumerate(results):
            found = None if result.logprobs is None else openai.chat_logprobs(self.model.tokenizer, result.logprobs)
            called = any(piece.kind == "call" for piece in pieces[index])
            choices.append(
                {
                    "index": index,
                    "message": _message(pieces[index]),
                    "logprobs": found,
                    "finish_reason": _reason(result, called),
                }
            )
        return {**self.head, "choices": choices, "usage": openai.usage(results)}

    async def chunks(self) -> Chunks:
        """The answer in pieces."""
        calls = [0 for _ in self.replies]
        for index in range(len(self.replies)):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        async for index, event in self.answers:
            deltas: list[dict[str, Any]] = []
            for piece in self._pieces(index, event):
                deltas += _deltas(piece, calls[index])
                calls[index] += piece.kind == "call"
            if event.logprobs:
                deltas = deltas or [{}]
            for place, delta in enumerate(deltas):
                yield self._chunk(index, delta, event=event if place == 0 else None)
            if ended := self.answers.results.get(index):
                yield self._chunk(index, {}, _reason(ended, calls[index] > 0))
        if self.told:
            results = [self.answers.results[index] for index in range(len(self.replies))]
            yield {**self.head, "object": "chat.completion.chunk", "choices": [], "usage": openai.usage(results)}

    def _pieces(self, index: int, event: Event) -> list[Piece]:
        """The pieces that an event brings; special tokens that begin a call have no text of their own."""
        marks = "".join(self.marks.get(token, "") for token in event.token_ids) if self.marks else ""
        return self.replies[index].add(event.text + marks, final=event.outcome is not None)

    def _chunk(
        self, index: int, delta: dict[str, Any], reason: str | None = None, event: Event | None = None
    ) -> dict[str, Any]:
        found = openai.chat_logprobs(self.model.tokenizer, event.logprobs) if event and event.logprobs else None
        choice = {"index": index, "delta": delta, "logprobs": found, "finish_reason": reason}
        empty = {"usage": None} if self.told else {}
        return {**self.head, "object": "chat.completion.chunk", "choices": [choice], **empty}


def _reason(result: Generation, called: bool) -> str:
    reason = openai.FINISH[result.finish_reason]
    return "tool_calls" if called and reason == "stop" else reason


def _message(pieces: Sequence[Piece]) -> dict[str, Any]:
    """The message that the pieces of an answer make."""
    texts = {kind: "".join(piece.text for piece in pieces if piece.kind == kind) for kind in ("content", "reasoning")}
    calls = [_call(piece) for piece in pieces if piece.kind == "call"]
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
    whole = _call(piece)
    named = {**whole, "index": number, "function": {"name": piece.name, "arguments": ""}}
    return [{"tool_calls": [named]}, {"tool_calls": [{"index": number, "function": {"arguments": piece.text}}]}]
