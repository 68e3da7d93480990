"""Reasoning ends after as many tokens as it may have, with or without a grammar, and drafts do not change that."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from support.chat_bundle import END, TEMPLATE, write_chat_bundle

from satchel.runtime.errors import PromptError
from satchel.runtime.generation.generator import Generator
from satchel.runtime.generation.grammar import Grammar
from satchel.runtime.generation.options import GenerationOptions
from satchel.runtime.generation.reasoning import Thought, ThoughtLimit
from satchel.runtime.generation.request import Request
from satchel.runtime.generation.result import Generation

THINKS = TEMPLATE + "{# <think> </think> #}"
CHANNELS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")
ENDLESS = {"logit_bias": {END: -1e9, 1: -1e9, 2: -1e9}, "max_repeats": 0}


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Generator]:
    folder = tmp_path_factory.mktemp("bundles") / "thinker"
    marks = ("<think>", "</think>", *CHANNELS)
    generator = Generator.open(write_chat_bundle(folder, template=THINKS, marks=marks), threads=1)
    yield generator
    generator.template.close()


def ids(generator: Generator, text: str) -> list[int]:
    return generator.need_tokenizer().encode_rendered(text)


@pytest.mark.parametrize("most", [1, 2, 7, 30])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_end_is_written_after_so_many_tokens(generator: Generator, most: int, temperature: float) -> None:
    (begin,), (end,) = ids(generator, "<think>"), ids(generator, "</think>")
    bias = {**ENDLESS["logit_bias"], begin: -1e9, end: -1e9}  # the model itself does not end it
    drawn = {"temperature": temperature, "seed": 1} if temperature else {}
    options = {"logit_bias": bias, "max_new_tokens": 50, **drawn}
    prompt = ids(generator, "the cat<think>")
    free = generator.generate(prompt, **options).token_ids
    found = generator.generate(prompt, max_thinking_tokens=most, **options)
    assert found.token_ids[: most + 1] == (*free[:most], end)
    assert end not in found.token_ids[most + 1 :]
    assert len(found.token_ids) == 50
    after = generator.generate([*prompt, *free[:most], end], **options).token_ids
    if not temperature:
        assert found.token_ids[most + 1 :] == after[: 50 - most - 1]


def follow(generator: Generator, prompt: str, answer: str, most: int, template: str = THINKS) -> list[bool]:
    """Whether each token of an answer may be chosen; nothing if no reasoning follows the prompt."""
    thought = Thought.of(generator.need_tokenizer(), np.asarray(ids(generator, prompt), np.int64), template, most=most)
    if thought is None:
        return []
    limit, found = ThoughtLimit(thought), []
    for token in ids(generator, answer):
        found.append(bool(np.isfinite(limit.masked(np.zeros(400, np.float32))[token])))
        limit.take(token)
    return found


def test_reasoning_that_the_answer_begins_is_counted_from_there(generator: Generator) -> None:
    size = len(ids(generator, "a dog"))
    for most in (size, size + 1):
        assert all(follow(generator, "q", "<think>a dog</think>a dog and a cat", most))
        assert all(follow(generator, "q<think>", "a dog</think>a dog and a cat", most))
    assert not all(follow(generator, "q", "<think>a dog</think>", size - 1))
    assert all(follow(generator, "q", "a dog and a cat<think>a dog and a cat", 1))  # not at the beginning
    assert follow(generator, "q<think></think>", "a dog", 1) == []


def test_a_batch_ends_each_thought_at_its_own_place(generator: Generator) -> None:
    (end,) = ids(generator, "</think>")
    requests = [
        Request(
            ids(generator, text + "<think>"),
            GenerationOptions(max_new_tokens=25, max_thinking_tokens=most, logit_bias={END: -1e9, end: -1e9}),
        )
        for text, most in (("the cat", 3), ("the dog sat", 9), ("the", 20))
    ]
    for index, result in generator.run_requests(requests, rows=3):
        request = requests[index]
        assert isinstance(result, Generation)
        assert result.token_ids.index(end) == request.options.max_thinking_tokens
        assert result.token_ids == generator.generate(request.prompt, **vars(request.options)).token_ids


def test_with_a_grammar_the_answer_follows(generator: Generator) -> None:
    pytest.importorskip("llguidance")
    (end,), prompt = ids(generator, "</think>"), ids(generator, "the cat<think>")
    options = {"max_thinking_tokens": 6, "temperature": 1.0, "seed": 2, "logit_bias": {end: -1e9}}
    found = generator.generate(prompt, 60, grammar=Grammar("regex", "(yes|no)", chat=True), **options)
    assert found.token_ids.index(end) == 6
    assert found.text.endswith(("yes", "no"))
    assert found.finish_reason == "stop"


class TestChannels:
    """Where answers are messages in channels, the message of reasoning is what is counted."""

    TEMPLATE = "<|channel|><|message|>"

    def test_a_message_of_reasoning_comes_first_and_ends(self, generator: Generator) -> None:
        begun, text = "<|channel|>analysis<|message|>", "abc"
        size = len(ids(generator, text))
        for most in (size, size + 1):
            assert all(follow(generator, "<|start|>assistant", f"{begun}{text}<|end|><|start|>x", most, self.TEMPLATE))
        assert not all(follow(generator, "<|start|>assistant", f"{begun}{text}{text}<|end|>", size, self.TEMPLATE))
        assert not all(follow(generator, "<|start|>assistant", "<|channel|>final<|message|>a", size, self.TEMPLATE))

    def test_a_message_that_is_continued_has_none(self, generator: Generator) -> None:
        assert follow(generator, "<|start|>assistant<|channel|>final<|message|>a", "b", 3, self.TEMPLATE) == []


@pytest.mark.parametrize("wrong", [0, -1, True, 1.5])
def test_wrong_numbers_are_refused(generator: Generator, wrong: object) -> None:
    with pytest.raises(PromptError, match=r"max.thinking.tokens"):
        generator.generate("the", 3, max_thinking_tokens=wrong)
