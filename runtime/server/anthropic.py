"""/v1/messages and /v1/messages/count_tokens: Anthropic's protocol."""

from __future__ import annotations

import json
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from satchel.runtime.generation.result import Generation
from satchel.runtime.server import openai
from satchel.runtime.server.anthropic_messages import for_template
from satchel.runtime.server.call_source import Piece
from satchel.runtime.server.errors import RequestError
from satchel.runtime.server.fields import Field, anything, flag, ignored, mapping, objects, one_of, read, text, whole
from satchel.runtime.server.fields import texts as several_texts
from satchel.runtime.server.options import MOST_TOKENS, OWN
from satchel.runtime.server.records import record_of
from satchel.runtime.server.responses import TEXT, Chunks, EventStream, Form, json_response
from satchel.runtime.server.state import State
from satchel.runtime.server.talks import Asked, Talk, ask, encoded
from satchel.runtime.server.tools import anthropic_tools

COUNTED: dict[str, Field] = {
    "model": text,
    "messages": objects,
    "system": anything,
    "chat_template_kwargs": mapping,
    "thinking": mapping,
    "tools": objects,
    "tool_choice": mapping,
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

THINKING: dict[str, Field] = {
    "type": one_of("enabled", "adaptive", "disabled"),
    "budget_tokens": whole(1, MOST_TOKENS),
    "display": ignored,
}


async def messages(state: State, http: HttpRequest, body: Any) -> Response:
    """Answer one request."""
    given = read(body, TABLE, "messages", "max_tokens")
    talk = _talk(given)
    if given.get("thinking", {}).get("type") != "disabled" and "budget_tokens" in given.get("thinking", {}):
        given["max_thinking_tokens"] = given["thinking"]["budget_tokens"]
    async with AsyncExitStack() as stack:
        work = _Work(await ask(stack, state, http, given, talk))
        if given.get("stream"):
            return EventStream(work.chunks(), stack.pop_all(), named=True, form=anthropic_form)
        return json_response(await work.document())


async def count_tokens(state: State, http: HttpRequest, body: Any) -> Response:
    """The number of tokens of a request."""
    given = read(body, COUNTED, "messages")
    talk = _talk(given)
    async with state.models.using(given.get("model")) as model:
        record_of(http).asks(model.name, None)
        _, ids = await encoded(model, talk)
        return json_response({"input_tokens": len(ids)})


def anthropic_form(error: RequestError) -> dict[str, Any]:
    """An error in a stream."""
    return error.body(anthropic=True)


def _talk(given: dict[str, Any]) -> Talk:
    """What the model is told; the answer continues a last message of the assistant. Raises RequestError."""
    talk = for_template(given)
    arguments = given.get("chat_template_kwargs", {})
    if "thinking" in given:
        thinking = read(given["thinking"], THINKING, "type", where="thinking.")
        arguments = {"enable_thinking": thinking["type"] != "disabled"} | arguments
    last = talk[-1]
    return Talk(talk, anthropic_tools(given), arguments, last["role"] == "assistant" and "tool_calls" not in last)


@dataclass(frozen=True)
class _Block:
    """A kind of block: its type, and those of its deltas with the key of their text."""

    type: str
    delta: str
    key: str

    def begun(self, piece: Piece) -> dict[str, Any]:
        """A block before its first delta."""
        if self.type == "tool_use":
            return {"type": self.type, "id": openai.new_id("toolu"), "name": piece.name, "input": {}}
        return {"type": self.type, self.type: ""} | ({"signature": ""} if self.type == "thinking" else {})


BLOCKS = {
    "content": _Block("text", "text_delta", "text"),
    "reasoning": _Block("thinking", "thinking_delta", "thinking"),
    "call": _Block("tool_use", "input_json_delta", "partial_json"),
}
"""The blocks of the pieces of answers."""


@dataclass
class _Work:
    """What is being answered, and the form of the answer."""

    asked: Asked
    blocks: list[dict[str, Any]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    async def document(self) -> dict[str, Any]:
        """The answer as a whole."""
        async for _ in self._content():
            pass
        result = self.asked.answers.results[0]
        content = [whole for pair in zip(self.blocks, self.texts, strict=True) if (whole := _whole(*pair)) is not None]
        return self._message(content) | self._end(result) | {"usage": _usage(result)}

    async def chunks(self) -> Chunks:
        """The answer in pieces."""
        begun = {"input_tokens": self.asked.prompt_tokens, "output_tokens": 0}
        ends = {"stop_reason": None, "stop_sequence": None}
        yield {"type": "message_start", "message": self._message([]) | ends | {"usage": begun}}
        async for event in self._content():
            yield event
        result = self.asked.answers.results[0]
        yield {"type": "message_delta", "delta": self._end(result), "usage": _usage(result)}
        yield {"type": "message_stop"}

    async def _content(self) -> Chunks:
        """The events of the blocks, which are collected; pieces of one kind that follow each other are one block.

        `blocks` are as they begin, `texts` what their deltas add.
        """
        forms: list[Form] = []
        async for _, event in self.asked.answers:
            for piece in self.asked.pieces(0, event):
                kind = BLOCKS[piece.kind]
                place = len(self.blocks) - 1
                if place < 0 or kind.type != self.blocks[place]["type"] or piece.name:
                    if place >= 0:
                        yield {"type": "content_block_stop", "index": place}
                    place += 1
                    self.blocks.append(kind.begun(piece))
                    self.texts.append("")
                    delta = {"type": kind.delta, kind.key: TEXT}
                    forms.append(Form({"type": "content_block_delta", "index": place, "delta": delta}))
                    yield {"type": "content_block_start", "index": place, "content_block": self.blocks[place]}
                if piece.text:
                    yield forms[place](piece.text)
                self.texts[place] += piece.text
        if self.blocks:
            yield {"type": "content_block_stop", "index": len(self.blocks) - 1}

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": openai.new_id("msg"), "type": "message", "role": "assistant", "model": self.asked.model.name}
        return head | {"content": content}

    def _end(self, result: Generation) -> dict[str, Any]:
        """Why an answer ended; the tokens of one that a stop text ended hold that text."""
        if result.finish_reason != "stop":
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        stops = self.asked.options.stop
        told = self.asked.model.tokenizer.decode(result.token_ids) if stops else ""
        found = min((stop for stop in stops if stop in told), key=told.index, default=None)
        called = any(block["type"] == "tool_use" for block in self.blocks)
        reason = "stop_sequence" if found is not None else "tool_use" if called else "end_turn"
        return {"stop_reason": reason, "stop_sequence": found}


def _whole(block: dict[str, Any], text: str) -> dict[str, Any] | None:
    """A block with its text; None for a call that is incomplete or not valid JSON: its input must be an object."""
    if block["type"] != "tool_use":
        return {**block, block["type"]: text}
    try:
        return {**block, "input": json.loads(text)}
    except ValueError:
        return None


def _usage(result: Generation) -> dict[str, Any]:
    return {
        "input_tokens": result.prompt_tokens - result.reused_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": result.reused_tokens,
        "output_tokens": result.new_tokens,
    }
