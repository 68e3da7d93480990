"""/v1/responses: OpenAI's newer protocol, for text and tools."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from satchel.runtime.generation.result import Generation
from satchel.runtime.server import openai
from satchel.runtime.server.answers import now
from satchel.runtime.server.call_source import Piece
from satchel.runtime.server.errors import RequestError
from satchel.runtime.server.fields import Field, anything, flag, ignored, mapping, objects, read, refused, text, whole
from satchel.runtime.server.formats import responses_format
from satchel.runtime.server.options import MOST_TOKENS, OWN
from satchel.runtime.server.response_input import messages_of
from satchel.runtime.server.responses import Chunks, EventStream, json_response
from satchel.runtime.server.state import State
from satchel.runtime.server.talks import EFFORT, Asked, Talk, ask
from satchel.runtime.server.tools import responses_tools

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
    "text": mapping,
    "tools": objects,
    "tool_choice": anything,
    "truncation": refused("disabled", why="prompts are not shortened: leave it out"),
    "previous_response_id": refused(why=NOT_KEPT),
    "conversation": refused(why=NOT_KEPT),
    "background": refused(False, why=NOT_KEPT),
    "store": ignored,
    "include": ignored,
    "metadata": ignored,
    "parallel_tool_calls": flag,
    "prompt_cache_key": ignored,
    "reasoning": mapping,
    "safety_identifier": ignored,
    "service_tier": ignored,
    "user": ignored,
}

REASONING: dict[str, Field] = {"effort": EFFORT, "summary": ignored, "generate_summary": ignored}


async def responses(state: State, http: HttpRequest, body: Any) -> Response:
    """Answer one request."""
    given = read(body, TABLE, "input")
    given |= responses_format(given)
    effort = read(given.get("reasoning", {}), REASONING, where="reasoning.").get("effort")
    talk = Talk(messages_of(given), responses_tools(given), given.get("chat_template_kwargs"), effort=effort)
    async with AsyncExitStack() as stack:
        work = _Work(await ask(stack, state, http, given, talk), given)
        if given.get("stream"):
            return EventStream(work.chunks(), stack.pop_all(), named=True, form=_error)
        return json_response(await work.whole())


def _error(error: RequestError) -> dict[str, Any]:
    """An error in a stream."""
    return {"type": "error", "code": error.code, "message": error.message, "param": error.param}


@dataclass(frozen=True)
class _Kind:
    """A kind of item: its type, the beginning of its id, and the events of its text, with the key of that."""

    type: str
    prefix: str
    events: str
    key: str = "text"

    def item(self, id: str, piece: Piece, text: str | None, status: str) -> dict[str, Any]:
        """The item; before its text, None is the text."""
        head = {"id": id, "type": self.type, "status": status}
        if self.type == "function_call":
            return head | {"call_id": f"call_{id[3:]}", "name": piece.name, "arguments": text or ""}
        parts = [] if text is None else [self.part(text)]
        if self.type == "reasoning":
            return head | {"summary": [], "content": parts}
        return head | {"role": "assistant", "content": parts}

    def part(self, text: str) -> dict[str, Any]:
        """The part of an item that has its text."""
        if self.type == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


KINDS = {
    "content": _Kind("message", "msg", "output_text"),
    "reasoning": _Kind("reasoning", "rs", "reasoning_text"),
    "call": _Kind("function_call", "fc", "function_call_arguments", "arguments"),
}
"""The items of the pieces of answers."""


@dataclass
class _Work:
    """What is being answered, and the form of the answer."""

    asked: Asked
    given: dict[str, Any]
    id: str = field(default_factory=lambda: openai.new_id("resp"))
    created: int = field(default_factory=now)
    output: list[dict[str, Any]] = field(default_factory=list)

    async def whole(self) -> dict[str, Any]:
        """The answer as a whole."""
        async for _ in self._items():
            pass
        return self.document(self.asked.answers.results[0])

    def document(self, result: Generation | None) -> dict[str, Any]:
        """The answer; of None, before its first token."""
        reason = None if result is None else openai.FINISH[result.finish_reason]
        status = {None: "in_progress", "stop": "completed"}.get(reason, "incomplete")
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "model": self.asked.model.name,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": self.given.get("instructions"),
            "max_output_tokens": self.given.get("max_output_tokens"),
            "metadata": {},
            "output": list(self.output),
            "parallel_tool_calls": self.given.get("parallel_tool_calls", True),
            "previous_response_id": None,
            "store": False,
            "temperature": self.given.get("temperature"),
            "text": {"format": {"type": "text"}} | self.given.get("text", {}),
            "tool_choice": self.given.get("tool_choice", "auto"),
            "tools": self.given.get("tools", []),
            "top_p": self.given.get("top_p"),
            "truncation": "disabled",
            "usage": None if result is None else _usage(result, self.asked.reasoning_tokens()),
        }

    async def chunks(self) -> Chunks:
        """The answer in pieces, numbered."""
        number = 0
        async for event in self._events():
            yield {**event, "sequence_number": number}
            number += 1

    async def _events(self) -> AsyncIterator[dict[str, Any]]:
        yield {"type": "response.created", "response": self.document(None)}
        yield {"type": "response.in_progress", "response": self.document(None)}
        async for event in self._items():
            yield event
        whole = self.document(self.asked.answers.results[0])
        yield {"type": f"response.{whole['status']}", "response": whole}

    async def _items(self) -> AsyncIterator[dict[str, Any]]:
        """The events of the items, which are collected; pieces of one kind that follow each other are one item."""
        open_item: _Item | None = None
        async for _, event in self.asked.answers:
            for piece in self.asked.pieces(0, event):
                if open_item is None or open_item.piece.kind != piece.kind or piece.name:
                    for done in self._ended(open_item, "completed"):
                        yield done
                    open_item = _Item(len(self.output), piece)
                    for begun in open_item.begun():
                        yield begun
                open_item.text += piece.text
                if piece.text:
                    yield open_item.delta(piece.text)
        result = self.asked.answers.results[0]
        complete = openai.FINISH[result.finish_reason] == "stop"
        for done in self._ended(open_item, "completed" if complete else "incomplete"):
            yield done

    def _ended(self, item: _Item | None, status: str) -> Iterator[dict[str, Any]]:
        if item is not None:
            self.output.append(item.document(item.text, status))
            yield from item.ended(self.output[-1])


class _Item:
    """An item of an answer as it grows."""

    def __init__(self, place: int, piece: Piece) -> None:
        self.piece = piece
        self.text = ""
        self._kind = KINDS[piece.kind]
        self._id = openai.new_id(self._kind.prefix)
        self._index = {"output_index": place}
        self._place = {"item_id": self._id, **self._index} | ({} if piece.kind == "call" else {"content_index": 0})

    def document(self, text: str | None, status: str) -> dict[str, Any]:
        """The item with a text."""
        return self._kind.item(self._id, self.piece, text, status)

    def begun(self) -> Iterator[dict[str, Any]]:
        """The events of its beginning."""
        yield {"type": "response.output_item.added", **self._index, "item": self.document(None, "in_progress")}
        if "content_index" in self._place:
            yield {"type": "response.content_part.added", **self._place, "part": self._kind.part("")}

    def delta(self, text: str) -> dict[str, Any]:
        """The event of more text."""
        return {"type": f"response.{self._kind.events}.delta", **self._place, "delta": text, **self._logprobs()}

    def ended(self, whole: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of its end."""
        told = {self._kind.key: self.text} | ({"name": self.piece.name} if self.piece.kind == "call" else {})
        yield {"type": f"response.{self._kind.events}.done", **self._place, **told, **self._logprobs()}
        if "content_index" in self._place:
            yield {"type": "response.content_part.done", **self._place, "part": self._kind.part(self.text)}
        yield {"type": "response.output_item.done", **self._index, "item": whole}

    def _logprobs(self) -> dict[str, Any]:
        return {"logprobs": []} if self.piece.kind == "content" else {}


def _usage(result: Generation, reasoning: int) -> dict[str, Any]:
    return {
        "input_tokens": result.prompt_tokens,
        "input_tokens_details": {"cached_tokens": result.reused_tokens, "cache_write_tokens": 0},
        "output_tokens": result.new_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": result.prompt_tokens + result.new_tokens,
    }
