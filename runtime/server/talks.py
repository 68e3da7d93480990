"""A chat as every protocol gives it, asked of a model: the one way from messages to the pieces of answers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request as HttpRequest

from satchel.runtime.generation.events import Event
from satchel.runtime.generation.options import GenerationOptions
from satchel.runtime.server import openai
from satchel.runtime.server.answers import Answers, asking
from satchel.runtime.server.call_source import Piece
from satchel.runtime.server.errors import RequestError
from satchel.runtime.server.fields import one_of
from satchel.runtime.server.formats import answer_grammar
from satchel.runtime.server.messages import chat_ids
from satchel.runtime.server.models import Model
from satchel.runtime.server.options import options_of
from satchel.runtime.server.records import record_of
from satchel.runtime.server.replies import Harmony, Reply, Syntax
from satchel.runtime.server.state import State
from satchel.runtime.server.tools import NO_TOOLS, Tools


@dataclass(frozen=True)
class Talk:
    """What a model is told: messages as chat templates expect them, tools, and variables of the template.

    `unfinished` leaves the last message open, to be continued. `effort` is how much the model is to reason.
    """

    messages: list[dict[str, Any]]
    tools: Tools = NO_TOOLS
    arguments: Mapping[str, Any] | None = None
    unfinished: bool = False
    effort: str | None = None


EFFORT = one_of("none", "minimal", "low", "medium", "high", "xhigh")


@dataclass(frozen=True)
class Asked:
    """A talk that has been put to a model, and what reads each of its answers."""

    model: Model
    options: GenerationOptions
    prompt_tokens: int
    answers: Answers
    replies: list[Reply | Harmony]

    def pieces(self, index: int, event: Event) -> list[Piece]:
        """The pieces of an answer that an event brings."""
        return self.replies[index].add(event.text, final=event.outcome is not None)

    def reasoning_tokens(self) -> int:
        """How many tokens of the answers, which have ended, are reasoning."""
        told = self.answers.results
        counts = (reply.reasoning_tokens(self.model.tokenizer, told[index].token_ids)
                  for index, reply in enumerate(self.replies))  # fmt: skip
        return sum(counts)


async def encoded(model: Model, talk: Talk) -> tuple[str, Any]:
    """The text of a talk, and its ids. Raises RequestError."""
    tools = list(talk.tools.functions) or None
    template = template_of(model, tools)
    if tools is not None and template and "tools" not in template:
        raise RequestError(400, "tools: the chat template of this model takes none", "tools", "tools_not_supported")
    return await asyncio.to_thread(
        chat_ids, model.generator, talk.messages,
        tools=tools, arguments=_variables(talk, template), unfinished=talk.unfinished,
    )  # fmt: skip


async def ask(
    stack: AsyncExitStack, state: State, http: HttpRequest, given: Mapping[str, Any], talk: Talk, count: int = 1
) -> Asked:
    """Ask the model that a request names for `count` answers; `stack` ends what still runs. Raises SatchelError."""
    model = await stack.enter_async_context(state.models.using(given.get("model")))
    rendered, ids = await encoded(model, talk)
    record_of(http).asks(model.name, rendered if state.settings.log_prompts else None)
    options = options_of(given, model.chat_options, model.generator.engine.vocabulary)
    tools = talk.tools.functions
    syntax = Syntax(template_of(model, tools or None))
    visible = syntax.special(model.tokenizer, tools=bool(tools))
    grammar = answer_grammar(options.grammar, talk.tools, syntax, model.tokenizer, unfinished=talk.unfinished)
    options = replace(options, grammar=grammar)
    requests = [replace(each, visible=visible) for each in openai.samples(ids, options, count)]
    answers = await stack.enter_async_context(asking(model, requests, http, state.settings.timeout))
    replies = [syntax.reply(rendered, tools, several=talk.tools.several) for _ in requests]
    return Asked(model, options, len(ids), answers, replies)


def _variables(talk: Talk, template: str) -> Mapping[str, Any]:
    """The variables of the template; those that a request names itself count more than what its effort means."""
    effort: dict[str, Any] = {}
    if talk.effort is not None:
        effort = {"reasoning_effort": talk.effort, "enable_thinking": talk.effort != "none"}
    return {name: value for name, value in effort.items() if name in template} | dict(talk.arguments or {})


def template_of(model: Model, tools: Any) -> str:
    """The source of the chat template; empty if there is none."""
    generator = model.generator
    return generator.template.sources[generator.template.choose(None, tools)] if generator.has_template else ""
