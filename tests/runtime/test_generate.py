"""Generation: the three layers agree, every way to end, and generators shared between threads."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from support.tiny_bundle import MAX_CONTEXT, VOCABULARY, write_bundle

from satchel.runtime.errors import PromptError
from satchel.runtime.generation.generator import Generator

PROMPT = "the cat sat on the mat"
PROMPT_IDS = [5, 80, 199, 12]


def reference(generator: Generator, ids: list[int], count: int) -> list[int]:
    """Greedy tokens by feeding the whole sequence again for every token."""
    ids = list(ids)
    for _ in range(count):
        state = generator.engine.new_state(len(ids))
        ids.append(int(np.argmax(generator.engine.prefill(state, ids))))
    return ids[-count:]


def test_the_tokens_are_those_of_feeding_everything_again(generator: Generator) -> None:
    result = generator.generate(PROMPT_IDS, 30)
    assert list(result.token_ids) == reference(generator, PROMPT_IDS, 30)
    assert len(set(result.token_ids)) > 5
    assert result.finish_reason == "length"


def test_the_pieces_of_a_stream_are_the_text_of_generate(generator: Generator) -> None:
    whole = generator.generate(PROMPT, 40)
    with generator.stream(PROMPT, 40) as stream:
        pieces = list(stream)
    assert len(pieces) > 10
    assert all(pieces)
    assert "".join(pieces) == whole.text == stream.result().text
    assert stream.result().token_ids == whole.token_ids
    encoded = generator.tokenizer.encode(PROMPT)
    assert PROMPT + whole.text == generator.tokenizer.decode([*encoded, *whole.token_ids])


def test_the_figures_add_up(generator: Generator) -> None:
    result = generator.generate([9, 81, 17, 33], 10)
    assert (result.prompt_tokens, result.reused_tokens, result.new_tokens, result.decode_steps) == (4, 0, 10, 9)
    assert result.kv_bytes == 2 * 2 * (2 * (4 + 9) * 16) * 4
    assert result.prefill_speed == 4 / result.prefill_seconds > 0
    assert result.decode_speed == 9 / result.decode_seconds > 0


def test_the_choice_of_a_token_can_be_handed_in(generator: Generator) -> None:
    shapes = []

    def least_likely(logits: np.ndarray) -> int:
        shapes.append((logits.shape, logits.dtype))
        return int(logits.argmin())

    result = generator.generate(PROMPT_IDS, 3, choose=least_likely)
    assert shapes == [((VOCABULARY,), np.float32)] * 3
    assert result.token_ids != generator.generate(PROMPT_IDS, 3).token_ids


def test_an_end_token_right_at_the_limit_is_not_reached(tmp_path: Path, generator: Generator) -> None:
    tokens = generator.generate(PROMPT_IDS, 4).token_ids
    ending = Generator.open(write_bundle(tmp_path / "ending", eos_token_ids=(tokens[3],)), threads=1)
    assert ending.generate(PROMPT_IDS, 3).finish_reason == "length"
    assert ending.generate(PROMPT_IDS, 4).finish_reason == "stop"


def test_no_new_tokens_run_nothing(generator: Generator) -> None:
    result = generator.generate(PROMPT, 0)
    assert (result.text, result.token_ids, result.finish_reason) == ("", (), "length")
    assert result.prefill_seconds == result.prefill_speed == result.decode_speed == 0


@pytest.mark.parametrize(("prompt_tokens", "new_tokens"), [(64, 1), (63, 2), (55, 10)])
def test_generation_ends_when_the_context_is_full(generator: Generator, prompt_tokens: int, new_tokens: int) -> None:
    ids = [5] * prompt_tokens
    result = generator.generate(ids, 1000)
    assert (result.new_tokens, result.finish_reason) == (new_tokens, "length")
    assert result.kv_bytes == 2 * 2 * (2 * MAX_CONTEXT * 16) * 4


def test_a_lower_context_ends_generation_earlier(tiny: Path, generator: Generator) -> None:
    short = Generator.open(tiny, threads=1, max_context=10)
    result = short.generate(PROMPT_IDS, 100)
    assert result.token_ids == generator.generate(PROMPT_IDS, 7).token_ids
    assert result.finish_reason == "length"


def test_text_that_encodes_to_nothing_is_refused(tmp_path: Path) -> None:
    from support.tiny_tokenizers import sentencepiece_model

    folder = write_bundle(tmp_path / "sp", tokenizer=sentencepiece_model(), tokenizer_kind="sentencepiece")
    with pytest.raises(PromptError, match="the prompt is empty: give some text"):
        Generator.open(folder, threads=1).stream("")


def test_a_bundle_without_a_tokenizer_takes_ids_only(tmp_path: Path, generator: Generator) -> None:
    bare = Generator.open(write_bundle(tmp_path / "bare", tokenizer_kind=None), threads=1)
    result = bare.generate(PROMPT_IDS, 5)
    assert (result.text, result.token_ids) == ("", generator.generate(PROMPT_IDS, 5).token_ids)
    with pytest.raises(PromptError, match="no tokenizer"):
        bare.generate(PROMPT, 5)


def test_closing_a_stream_early_frees_its_cache(generator: Generator) -> None:
    stream = generator.stream(PROMPT, 20)
    next(stream)
    cache = weakref.ref(stream._state.cache)
    stream.close()
    gc.collect()
    assert cache() is None
    assert list(stream) == []
    assert stream.result().finish_reason == "closed"


def test_a_finished_stream_keeps_its_reason_and_holds_no_cache(generator: Generator) -> None:
    stream = generator.stream(PROMPT_IDS, 2)
    assert stream.result().new_tokens == 2
    stream.close()
    assert stream.result().finish_reason == "length"
    assert stream._state is None


def test_threads_that_share_a_generator_get_the_text_that_each_gets_alone(generator: Generator) -> None:
    prompts = ["the cat", "a quick brown fox jumps", "satchel carries", "the lazy dog again"]
    alone = [generator.generate(prompt, 40).text for prompt in prompts]
    assert len(set(alone)) == 4
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            together = list(pool.map(lambda prompt: generator.generate(prompt, 40).text, prompts))
            assert together == alone


def test_a_choice_outside_the_vocabulary_is_refused(generator: Generator) -> None:
    with pytest.raises(PromptError, match="token id -1 was chosen, outside the vocabulary"):
        generator.generate([3, 4, 5], 4, choose=lambda logits: -1)
