"""Streaming text: pieces joined are the whole text, and no piece ends inside a character."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.tiny_tokenizers import byte_fallback_json, byte_level_json, sentencepiece_model

from satchel.runtime.generation.detokenizer import LONGEST_WINDOW, UNFINISHED, IncrementalDetokenizer
from satchel.runtime.generation.tokenizer import JsonTokenizer, SentencePieceTokenizer, Tokenizer

TEXTS = [
    "the cat sat on the mat",
    "the  lazy   dog\n\n\tjumps ",
    "你好世界,今天",
    "🙂🙃 over 👩‍👩‍👧 the dog",
    "cafe\u0301 naïve क्षि العربية",
    "日本語のテキスト𠮷野家 the fox",
    "a \n b",
]


@pytest.fixture(params=["byte level", "byte fallback", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    path = tmp_path / "tokenizer"
    if request.param == "sentencepiece":
        path.write_bytes(sentencepiece_model())
        return SentencePieceTokenizer(path, add_bos=True)
    path.write_bytes(byte_level_json() if request.param == "byte level" else byte_fallback_json())
    return JsonTokenizer(path)


def stream(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> list[str]:
    """The piece for each id, then what `finish` gives."""
    text = IncrementalDetokenizer(tokenizer, prompt)
    return [*(text.add(token) for token in ids), text.finish()]


def whole_characters(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of ids, less a last character of which they hold only the first bytes."""
    texts = [tokenizer.decode(ids[:end]) for end in range(len(ids), max(-1, len(ids) - 4), -1)]
    return next(text for text in texts if UNFINISHED not in text)


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_after_any_prompt_join_to_the_rest_of_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    for cut in range(len(ids) + 1):
        assert whole_characters(tokenizer, ids[:cut]) + "".join(stream(tokenizer, ids[:cut], ids[cut:])) == text


@pytest.mark.parametrize("text", TEXTS)
def test_no_piece_holds_a_part_of_a_character(tokenizer: Tokenizer, text: str) -> None:
    pieces = stream(tokenizer, [], tokenizer.encode(text))
    assert not any(UNFINISHED in piece for piece in pieces)
    assert pieces[-1] == ""  # whole characters are not held back to the end


def test_text_after_a_prompt_keeps_its_leading_space(tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("the cat")
    rest = tokenizer.encode("the cat sat on")[len(prompt) :]
    assert stream(tokenizer, prompt, rest)[0].startswith(" ")
    assert "".join(stream(tokenizer, prompt, rest)) == " sat on"


def test_text_after_nothing_but_bos_begins_without_a_space(tokenizer: Tokenizer) -> None:
    bos, *rest = tokenizer.encode("the cat")
    assert "".join(stream(tokenizer, [bos], rest)) == "the cat"


def test_special_and_unknown_ids_give_no_text_and_do_not_part_words_from_their_space(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the cat sat")[1:]
    strewn = [part for token in ids for part in (1, token, 100000, *[2] * LONGEST_WINDOW)]
    assert "".join(stream(tokenizer, [1], strewn)) == "the cat sat"


def test_random_ids_stream_to_the_text_that_decoding_all_of_them_gives(tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        ids = rng.integers(259, 330, 60).tolist()  # pieces, which in the tiny vocabularies stand after the bytes
        joined = tokenizer.decode(ids[:20]) + "".join(stream(tokenizer, ids[:20], ids[20:]))
        assert joined == tokenizer.decode(ids)


def test_bytes_that_never_become_a_character_are_shown_at_the_end(tokenizer: Tokenizer) -> None:
    *ids, _ = tokenizer.encode("the 🙂")
    pieces = stream(tokenizer, [], ids)
    assert "".join(pieces[:-1]) == "the "
    assert pieces[-1] == tokenizer.decode(ids).removeprefix("the ")
    assert set(pieces[-1]) == {UNFINISHED}


def test_endless_broken_bytes_are_not_held_back_for_ever(tokenizer: Tokenizer) -> None:
    half = tokenizer.encode("🙂")[-2]
    pieces = stream(tokenizer, [], [half] * (3 * LONGEST_WINDOW))
    assert sum(piece != "" for piece in pieces[:-1]) >= 2


def test_the_tokens_that_are_decoded_are_linear_in_the_length(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, decode = [], tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: decoded.append(len(ids)) or decode(ids))
    work = []
    for count in (500, 2000):
        ids = (tokenizer.encode("the cat 🙂 sat")[1:] * count)[:count]
        decoded.clear()
        stream(tokenizer, [], ids)
        work.append(sum(decoded))
    assert work[1] < 5 * work[0]  # 4 when linear, 16 when quadratic


def test_special_tokens_that_are_to_be_visible_have_their_text_where_they_stand(tokenizer: Tokenizer) -> None:
    words = tokenizer.encode_rendered("the cat") + tokenizer.encode_rendered("the mat")
    special = next(token for token in range(400) if tokenizer.is_hidden(token) and tokenizer.token_text(token))
    mark = tokenizer.token_text(special)
    broken = tokenizer.encode_rendered("🙂")[-2:-1]
    ids = [*words, special, *words, *broken, special, *words]
    text = IncrementalDetokenizer(tokenizer, [], {special})
    pieces = [text.add(token) for token in ids]
    assert [place for place, piece in enumerate(pieces) if mark in piece] == [len(words), 2 * len(words) + 2]
    assert pieces[2 * len(words) + 2] == UNFINISHED + mark
    found = "".join([*pieces, text.finish()]).replace(UNFINISHED, "").split(mark)
    assert [part.strip() for part in found] == [tokenizer.decode(words).strip()] * 3
