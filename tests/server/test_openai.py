"""OpenAI's own client against the server: what it gets is what the generator gives."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from support.chat_bundle import CONTEXT, TEMPLATE, write_chat_bundle
from support.served import Served, serving

MODEL = "chatty"
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello there"}]


def expected(served: Served, messages: list[dict], **options: object):  # type: ignore[no-untyped-def]
    return served.generator.generate(served.generator.encode_chat(messages), **options)


def test_the_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "satchel"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_chat_gets_the_answer_of_the_generator(served: Served, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=TALK, max_tokens=12, temperature=0)
    alone = expected(served, TALK, max_new_tokens=12)
    choice = answer.choices[0]
    assert (choice.message.content, choice.message.role) == (alone.text, "assistant")
    assert alone.text
    assert choice.finish_reason == {"stop": "stop", "length": "length"}[alone.finish_reason]
    assert answer.usage.prompt_tokens == alone.prompt_tokens
    assert answer.usage.completion_tokens == len(alone.token_ids)
    assert answer.usage.total_tokens == alone.prompt_tokens + len(alone.token_ids)
    again = client.chat.completions.create(model=MODEL, messages=TALK, max_tokens=12, temperature=0)
    assert again.usage.prompt_tokens_details.cached_tokens > 0
    assert again.choices[0].message.content == alone.text


def test_a_stream_is_the_answer_in_pieces(served: Served, client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=TALK, max_tokens=12, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    alone = expected(served, TALK, max_new_tokens=12)
    text = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(text) == alone.text
    assert sum(map(bool, text)) > 2
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 12
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_without_usage_has_none(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model=MODEL, messages=TALK, max_tokens=2, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_texts_are_continued_as_they_are(served: Served, client: openai.OpenAI) -> None:
    ids = served.generator.encode("Once upon").tolist()
    for prompt in ("Once upon", ids, ["Once upon", "Other"], [ids, ids[:3]]):
        answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=9)
        several = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
        alone = [served.generator.generate(each, max_new_tokens=9) for each in several]
        assert [choice.text for choice in answer.choices] == [each.text for each in alone]
        assert answer.usage.prompt_tokens == sum(each.prompt_tokens for each in alone)
        assert answer.usage.completion_tokens == sum(each.new_tokens for each in alone)
    stream = client.completions.create(model=MODEL, prompt="Once upon", max_tokens=9, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == served.generator.generate("Once upon", 9).text


def test_several_answers_are_samples_of_one_prompt(served: Served, client: openai.OpenAI) -> None:
    options = {"max_tokens": 8, "temperature": 1.5, "seed": 3}
    answer = client.chat.completions.create(model=MODEL, messages=TALK, n=3, **options)
    ids = served.generator.encode_chat(TALK)
    alone = served.generator.samples(ids, 3, max_new_tokens=8, temperature=1.5, seed=3)
    assert [choice.message.content for choice in answer.choices] == [each.text for each in alone]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage.prompt_tokens == len(ids)
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(model=MODEL, messages=TALK, n=3, stream=True, **options):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [each.text for each in alone]


def test_a_seed_gives_the_same_text_and_another_one_another(client: openai.OpenAI) -> None:
    def say(seed: int) -> str:
        answer = client.chat.completions.create(model=MODEL, messages=TALK, max_tokens=12, temperature=2, seed=seed)
        return str(answer.choices[0].message.content)

    assert say(1) == say(1) != say(2)


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({"top_p": 0.5, "temperature": 1.0, "seed": 5}, {"top_p": 0.5, "temperature": 1.0, "seed": 5}),
        (
            {"extra_body": {"min_p": 0.2, "top_k": 7}, "temperature": 1.0, "seed": 5},
            {"min_p": 0.2, "top_k": 7, "temperature": 1.0, "seed": 5},
        ),
        ({"presence_penalty": 1.5}, {"presence_penalty": 1.5}),
        ({"frequency_penalty": 1.5}, {"frequency_penalty": 1.5}),
        ({"logit_bias": {"65": 100}}, {"logit_bias": {65: 100.0}}),
        ({"temperature": 0, "top_p": 0.5, "seed": 1}, {}),
        ({"max_completion_tokens": 4}, {"max_new_tokens": 4}),
        ({"extra_body": {"repetition_penalty": 1.7}}, {"repetition_penalty": 1.7}),
    ],
)  # fmt: skip
def test_options_reach_the_sampler(served: Served, client: openai.OpenAI, given: dict, options: dict) -> None:
    both = {"max_tokens": 12} if "max_completion_tokens" not in given else {}
    answer = client.chat.completions.create(model=MODEL, messages=TALK, **both, **given)
    alone = expected(served, TALK, **{"max_new_tokens": 12, **options})
    assert answer.choices[0].message.content == alone.text


def test_a_stop_text_ends_the_answer(served: Served, client: openai.OpenAI) -> None:
    whole = expected(served, TALK, max_new_tokens=12).text
    stop = whole[4:6]
    answer = client.chat.completions.create(model=MODEL, messages=TALK, max_tokens=12, stop=[stop, "never"])
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_log_probabilities_of_a_chat(served: Served, client: openai.OpenAI) -> None:
    more = {"model": MODEL, "messages": TALK, "max_tokens": 6, "logprobs": True, "top_logprobs": 3}
    alone = expected(served, TALK, max_new_tokens=6, logprobs=3)
    whole = client.chat.completions.create(**more).choices[0].logprobs.content
    streamed = [
        entry
        for chunk in client.chat.completions.create(**more, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    for entries in (whole, streamed):
        assert [entry.logprob for entry in entries] == pytest.approx([each.logprob for each in alone.logprobs])
        assert [len(entry.top_logprobs) for entry in entries] == [3] * 6
        assert entries[0].top_logprobs[0].logprob == pytest.approx(alone.logprobs[0].top[0][1])
        assert all(entry.bytes is None or bytes(entry.bytes).decode() == entry.token for entry in entries)
        assert all(math.isfinite(entry.logprob) and entry.logprob <= 0 for entry in entries)


def test_log_probabilities_of_a_text(served: Served, client: openai.OpenAI) -> None:
    found = client.completions.create(model=MODEL, prompt="Once", max_tokens=5, logprobs=2).choices[0].logprobs
    alone = served.generator.generate("Once", max_new_tokens=5, logprobs=2)
    assert found.token_logprobs == pytest.approx([each.logprob for each in alone.logprobs])
    assert len(found.tokens) == len(found.text_offset) == 5
    assert found.text_offset[0] == 0


def test_the_last_message_is_continued(served: Served, client: openai.OpenAI) -> None:
    messages = [*TALK, {"role": "assistant", "content": "I am"}]
    text = served.generator.template.render(messages, continue_final_message=True)
    ids = served.generator.tokenizer.encode_rendered(text)
    answer = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=8, extra_body={"continue_final_message": True}
    )
    assert answer.choices[0].message.content == served.generator.generate(ids, max_new_tokens=8).text
    with pytest.raises(openai.BadRequestError, match="exclude"):
        client.chat.completions.create(
            model=MODEL, messages=messages,
            extra_body={"continue_final_message": True, "add_generation_prompt": True},
        )  # fmt: skip


def test_parts_of_text_are_joined_and_arguments_reach_the_template(served: Served, client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}]
    said = [client.chat.completions.create(
        model=MODEL, messages=[TALK[0], {"role": "user", "content": content}], max_tokens=8
    ).choices[0].message.content for content in (parts, "Hello there")]  # fmt: skip
    assert said[0] == said[1]
    moody = client.chat.completions.create(
        model=MODEL, messages=TALK, max_tokens=8, extra_body={"chat_template_kwargs": {"mood": "grumpy "}}
    )
    ids = served.generator.encode_chat(TALK, arguments={"mood": "grumpy "})
    assert moody.choices[0].message.content == served.generator.generate(ids, max_new_tokens=8).text


class TestEffort:
    """How much a model is to reason, for templates that take it."""

    @pytest.fixture
    def rendered(self, tmp_path: Path) -> Iterator[tuple[openai.OpenAI, Served]]:
        template = TEMPLATE + "[{{ reasoning_effort }}, {{ enable_thinking }}]"
        with (
            serving(write_chat_bundle(tmp_path / MODEL, template=template)) as served,
            openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client,
        ):
            yield client, served

    def test_it_reaches_the_template(self, rendered: tuple[openai.OpenAI, Served]) -> None:
        client, served = rendered
        for effort, told in (("high", True), ("none", False)):
            values = {"reasoning_effort": effort, "enable_thinking": told}
            ids = served.generator.encode_chat(TALK, arguments=values)
            expected = served.generator.generate(ids, max_new_tokens=6).text
            chat = client.chat.completions.create(model=MODEL, messages=TALK, max_tokens=6, reasoning_effort=effort)
            assert chat.choices[0].message.content == expected
            response = client.responses.create(
                model=MODEL, input=TALK, max_output_tokens=6, reasoning={"effort": effort}
            )
            assert response.output_text == expected
        ids = served.generator.encode_chat(TALK, arguments={"reasoning_effort": "own", "enable_thinking": True})
        kept = client.chat.completions.create(
            model=MODEL, messages=TALK, max_tokens=6, reasoning_effort="low",
            extra_body={"chat_template_kwargs": {"reasoning_effort": "own"}},
        )  # fmt: skip
        assert kept.choices[0].message.content == served.generator.generate(ids, max_new_tokens=6).text

    def test_other_values_are_refused(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=MODEL, messages=TALK, reasoning_effort="extreme")
        assert caught.value.param == "reasoning_effort"
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(model=MODEL, input="a", reasoning={"effort": "extreme"})
        assert caught.value.param == "reasoning.effort"


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_can_never_fit_is_refused(client: openai.OpenAI, stream: bool) -> None:
    long = [{"role": "user", "content": "a b c d " * CONTEXT}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=long, stream=stream)
    assert caught.value.code == "context_length_exceeded"
    assert str(CONTEXT) in str(caught.value)
