"""Endpoints for text and ids: /tokenize, /detokenize and /apply-template."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from satchel.runtime.errors import PromptError
from satchel.runtime.server.errors import RequestError
from satchel.runtime.server.fields import Field, anything, flag, mapping, objects, read, text
from satchel.runtime.server.messages import chat_ids, for_template
from satchel.runtime.server.records import record_of
from satchel.runtime.server.responses import json_response
from satchel.runtime.server.state import State

TOKENIZE: dict[str, Field] = {"model": text, "content": text, "add_special": flag}
DETOKENIZE: dict[str, Field] = {"model": text, "tokens": anything}
TEMPLATE: dict[str, Field] = {"model": text, "messages": objects, "tools": objects, "chat_template_kwargs": mapping}


async def tokenize(state: State, http: HttpRequest, body: Any) -> Response:
    """The ids of a text, with the special tokens that the tokenizer adds unless `add_special` is false."""
    given = read(body, TOKENIZE, "content")
    async with state.models.using(given.get("model")) as model:
        record_of(http).asks(model.name, None)
        encode = model.tokenizer.encode if given.get("add_special", True) else model.tokenizer.encode_rendered
        try:
            return json_response({"tokens": await asyncio.to_thread(encode, given["content"])})
        except PromptError as error:
            raise RequestError(400, str(error), "content", "invalid_value") from None


async def detokenize(state: State, http: HttpRequest, body: Any) -> Response:
    """The text of ids, without special tokens."""
    given = read(body, DETOKENIZE, "tokens")
    async with state.models.using(given.get("model")) as model:
        record_of(http).asks(model.name, None)
        vocabulary, tokens = model.generator.engine.vocabulary, given["tokens"]
        if not isinstance(tokens, list) or not all(type(each) is int and 0 <= each < vocabulary for each in tokens):
            rule = f"tokens: must be a list of whole numbers from 0 to {vocabulary - 1}"
            raise RequestError(400, rule, "tokens", "invalid_value")
        return json_response({"content": await asyncio.to_thread(model.tokenizer.decode, tokens)})


async def apply_template(state: State, http: HttpRequest, body: Any) -> Response:
    """The text of messages in the chat template."""
    given = read(body, TEMPLATE, "messages")
    messages = for_template(given["messages"])
    async with state.models.using(given.get("model")) as model:
        record_of(http).asks(model.name, None)
        rendered, _ = await asyncio.to_thread(
            chat_ids, model.generator, messages,
            tools=given.get("tools"), arguments=given.get("chat_template_kwargs"),
        )  # fmt: skip
        return json_response({"prompt": rendered})
