"""Usage tells how many tokens of an answer are reasoning, in each protocol that has such a count."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import openai
import pytest
from support.chat_bundle import TEMPLATE, chat_tokenizer, write_chat_bundle
from support.served import Served, serving

from satchel.runtime.generation.tokenizer import JsonTokenizer
from satchel.runtime.server.replies import Syntax

THOUGHT, ANSWER = "<think>Hm, 1 and 1</think>", "\n\nIt is 2."
QUESTION = [{"role": "user", "content": "1 + 1?"}]
CHAT: dict[str, Any] = {"model": "chatty", "messages": QUESTION}


def tokens_of(tokenizer: Any, text: str, part: str) -> int:
    """How many tokens of a text it takes to write its first part."""
    ids = tokenizer.encode_rendered(text)
    return next(count for count in range(len(ids) + 1) if tokenizer.decode(ids[:count]).startswith(part))


def test_a_chat_counts_its_reasoning(client: openai.OpenAI, served: Served, says: list[str]) -> None:
    says[0] = THOUGHT + ANSWER
    tokenizer = served.generator.tokenizer
    wanted = tokens_of(tokenizer, says[0], THOUGHT)
    usage = client.chat.completions.create(**CHAT).usage
    assert usage.completion_tokens_details.reasoning_tokens == wanted
    assert 5 < wanted < usage.completion_tokens == len(tokenizer.encode_rendered(says[0]))
    told = {"stream": True, "stream_options": {"include_usage": True}}
    *_, last = client.chat.completions.create(**CHAT, **told)
    assert last.usage.completion_tokens_details.reasoning_tokens == wanted
    several = client.chat.completions.create(**CHAT, n=3).usage
    assert several.completion_tokens_details.reasoning_tokens == 3 * wanted


def test_a_response_counts_its_reasoning(client: openai.OpenAI, served: Served, says: list[str]) -> None:
    says[0] = THOUGHT + ANSWER
    wanted = tokens_of(served.generator.tokenizer, says[0], THOUGHT)
    assert client.responses.create(model="chatty", input="?").usage.output_tokens_details.reasoning_tokens == wanted
    *_, last = client.responses.create(model="chatty", input="?", stream=True)
    assert last.response.usage.output_tokens_details.reasoning_tokens == wanted


@pytest.mark.parametrize(
    ("text", "all_of_it"), [(ANSWER, False), (f"Yes: {THOUGHT}", False), ("<think>Hm, and so on", True)]
)
def test_an_answer_that_only_thinks_or_only_answers(
    client: openai.OpenAI, says: list[str], text: str, all_of_it: bool
) -> None:
    says[0] = text
    usage = client.chat.completions.create(**CHAT).usage
    assert usage.completion_tokens_details.reasoning_tokens == (usage.completion_tokens if all_of_it else 0)


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """A client of a model whose template opens its reasoning, the marks of which are special tokens."""
    template = TEMPLATE.replace("assistant\n{% endif -%}", "assistant\n<think>{% endif -%}")
    folder = tmp_path_factory.mktemp("bundles") / "chatty"
    with (
        serving(write_chat_bundle(folder, template=template, marks=("<think>", "</think>"))) as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def test_a_model_that_thinks_by_itself(thinker: openai.OpenAI) -> None:
    """It is made to stop after 7 tokens; the eighth is the mark."""
    found = thinker.chat.completions.create(**CHAT, max_tokens=30, temperature=0, extra_body={"max_thinking_tokens": 7})
    assert found.choices[0].message.reasoning_content
    assert found.usage.completion_tokens_details.reasoning_tokens == 8
    assert found.usage.completion_tokens == 30


def test_messages_in_the_channel_for_it() -> None:
    marks = ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|return|>")
    tokenizer = JsonTokenizer(Path(), chat_tokenizer(*marks))
    first, second = (
        "<|channel|>analysis<|message|>Hm<|end|>",
        "<|start|>assistant<|channel|>analysis<|message|>So<|end|>",
    )
    between, last = "<|start|>assistant<|channel|>commentary<|message|>I add<|end|>", "<|channel|>final<|message|>2"
    syntax = Syntax("<|channel|><|message|>")
    ids = [tokenizer.encode_rendered(part) for part in (first, between, second, last)]
    reply = syntax.reply("", [])
    reply.add(first + between + second + last, final=True)
    assert reply.reasoning_tokens(tokenizer, [*chain(*ids)]) == len(ids[0]) + len(ids[2])
    unfinished = syntax.reply("<|channel|>final<|message|>some", [])
    assert unfinished.reasoning_tokens(tokenizer, tokenizer.encode_rendered("more<|return|>")) == 0
