"""Encoding: special tokens as the bundle says, never two BOS, and the ids that were recorded at export."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from support.tiny_bundle import read_manifest, write_bundle, write_manifest
from support.tiny_tokenizers import byte_fallback_json, byte_level_json, sentencepiece_model
from transformers import PreTrainedTokenizerFast

from satchel.runtime.bundle import open_bundle
from satchel.runtime.errors import BundleError, PromptError
from satchel.runtime.tokenizer import JsonTokenizer, SentencePieceTokenizer, Tokenizer

LLAMA2 = "SATCHEL_LLAMA2_TOKENIZER"


@pytest.mark.parametrize("content", [byte_level_json, byte_fallback_json])
def test_tokenizer_json_adds_its_own_bos_once(tmp_path: Path, content) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content())
    tokenizer = JsonTokenizer(tmp_path / "tokenizer.json")
    plain = tokenizer.encode("the cat")
    assert plain[0] == 1
    assert 1 not in plain[1:]
    assert tokenizer.decode(plain) == "the cat"


def test_a_bos_that_the_text_spells_out_is_encoded_as_the_original_tokenizer_does(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(byte_level_json())
    text = "<s>the cat"
    original = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert JsonTokenizer(tmp_path / "tokenizer.json").encode(text) == original(text).input_ids


@pytest.mark.parametrize("add_bos", [True, False])
def test_sentencepiece_gets_bos_where_the_bundle_says_so(tmp_path: Path, add_bos: bool) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    tokenizer = SentencePieceTokenizer(tmp_path / "tokenizer.model", add_bos)
    ids = tokenizer.encode("the cat")
    assert ids.count(1) == add_bos
    assert (ids[0] == 1) is add_bos
    assert tokenizer.decode(ids) == "the cat"


def test_a_text_is_never_cut_or_padded_by_settings_left_in_the_file(tmp_path: Path) -> None:
    import tokenizers

    settings = tokenizers.Tokenizer.from_str(byte_level_json().decode())
    settings.enable_truncation(4)
    settings.enable_padding(length=9)
    settings.save(str(tmp_path / "tokenizer.json"))
    tokenizer = JsonTokenizer(tmp_path / "tokenizer.json")
    text = "the quick brown fox jumps over"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("a")) == 2


def test_text_that_is_not_unicode_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(byte_level_json())
    with pytest.raises(PromptError, match="not valid UTF-8 at character 3: mend or remove it"):
        JsonTokenizer(tmp_path / "tokenizer.json").encode("abc\udcff")


def test_the_texts_recorded_at_export_must_encode_the_same(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle")
    document = read_manifest(folder)
    ids = Tokenizer.open(open_bundle(folder)).encode("the cat")
    document["tokenizer"]["corpus"] = [{"text": "the cat", "ids": ids}]
    write_manifest(folder, document)
    Tokenizer.open(open_bundle(folder))
    document["tokenizer"]["corpus"][0]["ids"] = [*ids, 5]
    write_manifest(folder, document)
    with pytest.raises(BundleError, match=r"tokenizer\.json: encodes 'the cat' otherwise .* export the bundle again"):
        Tokenizer.open(open_bundle(folder))


def test_a_bundle_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="bare: has no tokenizer: use token ids, or export it again with --tokenizer"):
        Tokenizer.open(open_bundle(write_bundle(tmp_path / "bare", tokenizer_kind=None)))


@pytest.mark.parametrize("kind", ["tokenizer.json", "sentencepiece"])
def test_a_tokenizer_that_its_library_cannot_read_is_named(tmp_path: Path, kind: str) -> None:
    folder = write_bundle(tmp_path / "bundle", tokenizer=b'{"version": "9.0", "model": {}}', tokenizer_kind=kind)
    with pytest.raises(
        BundleError, match=r"tokenizer\.(json|model): \w+ [\d.]+ cannot read it .* export the bundle again"
    ):
        Tokenizer.open(open_bundle(folder))


@pytest.mark.skipif(LLAMA2 not in os.environ, reason=f"{LLAMA2} does not name a Llama-2 tokenizer.model")
def test_the_llama_2_tokenizer_gives_its_known_ids_and_the_text_back() -> None:
    tokenizer = SentencePieceTokenizer(Path(os.environ[LLAMA2]), add_bos=True)
    ids = tokenizer.encode("I love Beijing, because")
    assert ids == [1, 306, 5360, 1522, 823, 292, 29892, 1363]
    assert tokenizer.decode(ids) == "I love Beijing, because"


def test_the_tiny_tokenizers_are_the_same_on_every_run() -> None:
    byte_level_json.cache_clear()
    first = hashlib.sha256(byte_level_json()).hexdigest()
    byte_level_json.cache_clear()
    assert hashlib.sha256(byte_level_json()).hexdigest() == first
