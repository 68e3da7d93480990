"""/v1/completions: continues texts as they are."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from satchel.runtime.generation.result import Generation
from satchel.runtime.generation.sampling.logprobs import TokenLogprob
from satchel.runtime.generation.tokenizer import Tokenizer
from satchel.runtime.server import openai
from satchel.runtime.server.answers import Answers, asking, now
from satchel.runtime.server.fields import Field, anything, read, refused, whole
from satchel.runtime.server.models import Model
from satchel.runtime.server.options import MOST_LOGPROBS, options_of
from satchel.runtime.server.records import record_of
from satchel.runtime.server.responses import TEXT, Chunks, EventStream, Form, json_response
from satchel.runtime.server.state import State

TABLE: dict[str, Field] = {
    **openai.COMMON,
    "prompt": anything,
    "logprobs": whole(0, MOST_LOGPROBS),
    "echo": refused(False, why="the prompt is not repeated: leave it out"),
    "suffix": refused("", why="texts are continued at their end only: leave it out"),
    "best_of": refused(1, why="is not supported: use n"),
}

MOST_PROMPTS = 64


async def completions(state: State, http: HttpRequest, body: Any) -> Response:
    """Answer one request."""
    given = read(body, TABLE, "prompt")
    told = openai.wants_usage(given)
    async with AsyncExitStack() as stack:
        model = await stack.enter_async_context(state.models.using(given.get("model")))
        options = options_of(given, model.raw_options, model.generator.engine.vocabulary)
        prompts = openai.prompts_of(given["prompt"], "prompt", MOST_PROMPTS)
        record_of(http).asks(model.name, prompts if state.settings.log_prompts else None)
        ids = [await asyncio.to_thread(openai.checked_ids, model.generator, prompt, "prompt") for prompt in prompts]
        requests = [each for one in ids for each in openai.samples(one, options, given.get("n", 1))]
        answers = await stack.enter_async_context(asking(model, requests, http, state.settings.timeout))
        work = _Work(model, answers, len(prompts), told)
        if given.get("stream"):
            return EventStream(work.chunks(), stack.pop_all(), done="[DONE]")
        return json_response(work.document(await answers.whole()))


@dataclass
class _Work:
    """What is being answered, and the form of the answer."""

    model: Model
    answers: Answers
    prompts: int
    told: bool
    head: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.head = {
            "id": openai.new_id("cmpl"),
            "object": "text_completion",
            "created": now(),
            "model": self.model.name,
            "system_fingerprint": self.model.fingerprint,
        }

    def document(self, results: Sequence[Generation]) -> dict[str, Any]:
        """The answer as a whole."""
        choices = [
            self._choice(index, result.text, result.logprobs, openai.FINISH[result.finish_reason])
            for index, result in enumerate(results)
        ]
        return {**self.head, "choices": choices, "usage": openai.usage(results, self.prompts)}

    async def chunks(self) -> Chunks:
        """The answer in pieces."""
        empty = {"usage": None} if self.told else {}
        forms = [
            Form({**self.head, "choices": [self._choice(index, TEXT, None, None)], **empty})
            for index in range(self.answers.count)
        ]
        offsets: dict[int, int] = {}
        async for index, event in self.answers:
            ended = self.answers.results.get(index)
            if ended is None and not event.logprobs:
                if event.text:
                    yield forms[index](event.text)
                continue
            reason = openai.FINISH[ended.finish_reason] if ended else None
            choice = self._choice(index, event.text, event.logprobs or None, reason, offsets.get(index, 0))
            offsets[index] = offsets.get(index, 0) + len(event.text)
            yield {**self.head, "choices": [choice], **empty}
        if self.told:
            results = [self.answers.results[index] for index in sorted(self.answers.results)]
            yield {**self.head, "choices": [], "usage": openai.usage(results, self.prompts)}

    def _choice(
        self, index: int, text: str, entries: Sequence[TokenLogprob] | None, reason: str | None, offset: int = 0
    ) -> dict[str, Any]:
        found = None if entries is None else _logprobs(self.model.tokenizer, entries, offset)
        return {"index": index, "text": text, "logprobs": found, "finish_reason": reason}


def _logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    texts = [tokenizer.text_of(entry.token) for entry in entries]
    return {
        "tokens": texts,
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [{tokenizer.text_of(token): value for token, value in entry.top} for entry in entries],
        "text_offset": [offset + sum(map(len, texts[:place])) for place in range(len(texts))],
    }
