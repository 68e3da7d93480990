"""Chat, beams and reuse with a real model, SmolLM2-135M, compared with transformers in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from integration.conftest import PROMPT

from satchel.runtime import Conversation, Generator
from satchel.runtime.generation.options import GenerationOptions

pytestmark = pytest.mark.slow

QUESTIONS = ("What is the capital of France?", "And of Italy? Answer in one word.")


@pytest.fixture(scope="module")
def generator(smollm2: Path) -> Generator:
    return Generator.open(smollm2, threads=2)


def test_turns_are_those_of_transformers_and_feed_only_what_is_new(
    generator: Generator, original: tuple[Any, Any]
) -> None:
    tokenizer, model = original
    talk, messages, before = Conversation(generator), [], 0
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        with torch.no_grad():
            whole = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=30)[0].tolist()
        answer = talk.ask(question).result()
        assert answer.prompt_tokens == len(ids)
        assert answer.finish_reason == "stop"
        assert list(answer.token_ids) == whole[len(ids) : -1]  # the last one is the end token
        assert answer.reused_tokens == before
        messages.append({"role": "assistant", "content": answer.text})
        before = answer.prompt_tokens + answer.new_tokens
    assert talk.messages == messages
    talk.close()


def test_beams_are_those_of_transformers(generator: Generator, original: tuple[Any, Any]) -> None:
    tokenizer, model = original
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    settings = {"do_sample": False, "num_beams": 3, "max_new_tokens": 12, "num_return_sequences": 3}
    with torch.no_grad():
        expected = model.generate(ids, **settings, return_dict_in_generate=True, output_scores=True)
    found = generator.beam_search(PROMPT, 3, max_new_tokens=12)
    assert [list(one.token_ids) for one in found] == [row[ids.shape[1] :].tolist() for row in expected.sequences]
    assert [one.score for one in found] == pytest.approx(expected.sequences_scores.tolist(), abs=1e-4)


def test_a_batch_and_a_reused_prefix_change_no_answer(smollm2: Path) -> None:
    fresh = Generator.open(smollm2, threads=2, prefix_cache_mib=0)
    prompts = [f"{PROMPT} {rest}" for rest in ("there lived", "a ship", "the old keeper of the lighthouse", "it")]
    alone = [fresh.generate(prompt, 16) for prompt in prompts]
    found = Generator.open(smollm2, threads=2).generate_batch(prompts, rows=3, max_new_tokens=16)
    assert [one.token_ids for one in found] == [one.token_ids for one in alone]
    assert sum(one.reused_tokens for one in found) > 20


def test_an_answer_by_a_schema_is_right(generator: Generator) -> None:
    schema = {
        "type": "object",
        "properties": {
            "country": {"type": "string", "maxLength": 20},
            "capital": {"type": "string", "maxLength": 20},
            "continent": {"enum": ["Africa", "America", "Asia", "Europe", "Oceania"]},
        },
        "required": ["country", "capital", "continent"],
        "additionalProperties": False,
    }
    talk = Conversation(generator, options=GenerationOptions(max_new_tokens=80, grammar={"json_schema": schema}))
    answer = talk.ask(f"{QUESTIONS[0]} Answer in JSON.").result()
    found = json.loads(answer.text)
    jsonschema.validate(found, schema)
    assert (answer.finish_reason, found["capital"], found["continent"]) == ("stop", "Paris", "Europe")
