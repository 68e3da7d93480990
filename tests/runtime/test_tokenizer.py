"""Encoding: special tokens as the bundle says, never two BOS, and the ids that were recorded at export."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from support.tiny_bundle import read_manifest, write_bundle, write_manifest
from support.tiny_tokenizers import byte_fallback_json, byte_level_json, sentencepiece_model
from transformers import LlamaTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from satchel.runtime.errors import BundleError, PromptError
from satchel.runtime.generation.tokenizer import JsonTokenizer, SentencePieceTokenizer, Tokenizer
from satchel.runtime.ort.open_bundle import open_bundle

LLAMA2 = "SATCHEL_LLAMA2_TOKENIZER"
needs_llama2 = pytest.mark.skipif(LLAMA2 not in os.environ, reason=f"{LLAMA2} does not name a Llama-2 tokenizer.model")

RENDERED = [
    "<s>[INST] hello [/INST] fine </s><s>[INST]and now?[/INST]",
    "<s>\n</s>\n\nthe cat<unk>the dog</s>",
    "<s> the <s> cat</s>é世\U0001f642<s>世",
    "the cat</s>the dog",
    "\nthe cat<s>",
    "<s></s><s>",
    "<s",
    "",
]


CONTENTS = {"byte level": byte_level_json, "byte fallback": byte_fallback_json, "sentencepiece": sentencepiece_model}
KINDS = pytest.mark.parametrize("kind", CONTENTS)


def opened(kind: str, folder: Path, add_bos: bool = True) -> Tokenizer:
    """A tiny tokenizer from its file: tokenizer.model where it is SentencePiece's, else tokenizer.json."""
    path = folder / ("tokenizer.model" if kind == "sentencepiece" else "tokenizer.json")
    path.write_bytes(CONTENTS[kind]())
    return SentencePieceTokenizer(path, add_bos) if kind == "sentencepiece" else JsonTokenizer(path)


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_a_rendered_text_gets_the_special_tokens_that_it_spells_out_and_no_other(tmp_path: Path, kind: str) -> None:
    tokenizer = opened(kind, tmp_path)
    original = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in RENDERED:
        assert tokenizer.encode_rendered(text) == original.encode(text, add_special_tokens=False)
    assert tokenizer.encode_rendered("<s>the cat</s>")[:1] == [1]
    assert tokenizer.encode_rendered("<s>the cat</s>").count(1) == 1
    assert 1 not in tokenizer.encode_rendered("the cat")


@pytest.mark.parametrize("add_bos", [True, False])
def test_sentencepiece_cuts_control_pieces_out_of_a_rendered_text(tmp_path: Path, add_bos: bool) -> None:
    tokenizer = opened("sentencepiece", tmp_path, add_bos)
    plain = SentencePieceTokenizer(tmp_path / "tokenizer.model", add_bos=False)
    assert tokenizer.encode_rendered("the cat") == plain.encode("the cat")
    # A text has a space put in front of it. What follows a special token has not.
    expected = [1, *plain.encode("the cat"), 2, *plain.encode("the dog")]
    assert tokenizer.encode_rendered("<s> the cat</s> the dog") == expected
    ids = tokenizer.encode_rendered("the cat</s>the dog")
    assert ids[: ids.index(2)] == plain.encode("the cat")
    assert tokenizer.token_text(ids[ids.index(2) + 1]) != "▁the"
    assert tokenizer.decode(ids[ids.index(2) + 1 :]) == "the dog"
    assert tokenizer.encode_rendered("<s><unk></s>") == [1, 0, 2]
    assert tokenizer.encode_rendered("") == []


def test_sentencepiece_encodes_a_rendered_text_as_the_python_tokenizer_of_transformers(tmp_path: Path) -> None:
    check_against_transformers(opened("sentencepiece", tmp_path), tmp_path / "tokenizer.model")


@needs_llama2
def test_the_llama_2_tokenizer_encodes_a_rendered_text_as_transformers() -> None:
    path = Path(os.environ[LLAMA2])
    tokenizer = SentencePieceTokenizer(path, add_bos=True)
    check_against_transformers(tokenizer, path)
    fast = LlamaTokenizer.from_pretrained(str(path.parent), vocab_file=str(path), local_files_only=True)
    for text in RENDERED:  # without runs of spaces, which that class cuts up otherwise than the model itself
        assert tokenizer.encode_rendered(text) == fast.encode(text, add_special_tokens=False)


def check_against_transformers(tokenizer: SentencePieceTokenizer, path: Path) -> None:
    """Compare with the class that calls the sentencepiece library; it puts no space in front of a text, so <s> does."""
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    original = SentencePieceBackend(vocab_file=str(path), legacy=False, **names)
    for text in [*RENDERED, "  two  spaces\n    four</s>  two", "    ", "a   <s>   b"]:
        assert tokenizer.encode_rendered("<s>" + text) == original.encode("<s>" + text, add_special_tokens=False)


@KINDS
def test_the_texts_of_single_tokens_join_to_the_text_with_its_spaces(tmp_path: Path, kind: str) -> None:
    tokenizer = opened(kind, tmp_path)
    ids = tokenizer.encode("the quick brown\nfox  jumps")
    assert "".join(tokenizer.text_of(token) for token in ids).lstrip(" ") == "the quick brown\nfox  jumps"
    assert any(tokenizer.text_of(token).startswith(" ") for token in ids[2:])
    assert tokenizer.text_of(1) == tokenizer.text_of(2) == tokenizer.text_of(100_000) == tokenizer.text_of(-1) == ""
    first_byte, *_ = tokenizer.encode("\U0001f642")[-4:]
    assert tokenizer.text_of(first_byte) == "\ufffd"


@KINDS
def test_a_token_has_the_text_that_its_vocabulary_gives_it(tmp_path: Path, kind: str) -> None:
    tokenizer = opened(kind, tmp_path)
    assert [tokenizer.token_text(token) for token in (0, 1, 2)] == ["<unk>", "<s>", "</s>"]
    space = "Ġ" if kind == "byte level" else "▁"
    assert tokenizer.token_text(tokenizer.encode("a the")[-1]).startswith(space)
    assert tokenizer.token_text(100_000) is None
    assert tokenizer.token_text(-1) is None


def test_a_bos_that_the_text_spells_out_is_encoded_as_the_original_tokenizer_does(tmp_path: Path) -> None:
    tokenizer, text = opened("byte level", tmp_path), "<s>the cat"
    original = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode(text) == original(text).input_ids


@pytest.mark.parametrize(("kind", "add_bos"), [*((kind, True) for kind in CONTENTS), ("sentencepiece", False)])
def test_a_text_gets_one_bos_where_the_file_or_the_bundle_says_so(tmp_path: Path, kind: str, add_bos: bool) -> None:
    tokenizer = opened(kind, tmp_path, add_bos)
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


@KINDS
def test_text_that_is_not_unicode_is_refused(tmp_path: Path, kind: str) -> None:
    tokenizer = opened(kind, tmp_path)
    for encode in (tokenizer.encode, tokenizer.encode_rendered):
        with pytest.raises(PromptError, match="not valid UTF-8 at character 3"):
            encode("<s>\udcff")


def test_the_texts_recorded_at_export_must_encode_the_same(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle")
    document = read_manifest(folder)
    ids = Tokenizer.open(open_bundle(folder)).encode("the cat")
    document["tokenizer"]["corpus"] = [{"text": "the cat", "ids": ids}]
    write_manifest(folder, document)
    Tokenizer.open(open_bundle(folder))
    document["tokenizer"]["corpus"][0]["ids"] = [*ids, 5]
    write_manifest(folder, document)
    with pytest.raises(BundleError, match=r"tokenizer\.json: encodes 'the cat' differently .* export the bundle again"):
        Tokenizer.open(open_bundle(folder))


def test_a_bundle_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="bare: has no tokenizer: use token ids, or export it again with --tokenizer"):
        Tokenizer.open(open_bundle(write_bundle(tmp_path / "bare", tokenizer_kind=None)))


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        *(("tokenizer.json", content) for content in (b"", b"{}", b"[" * 100_000, b"\xff", b'{"version": "1.0"}')),
        ("tokenizer.json", b'{"version": "9.0", "model": {}}'),
        *(("sentencepiece", content) for content in (b"", b"x", b"\x0a\x05", b'{"version": "9.0", "model": {}}')),
    ],
)
def test_a_tokenizer_that_its_library_cannot_read_is_named(tmp_path: Path, kind: str, content: bytes) -> None:
    folder = write_bundle(tmp_path / "bundle", tokenizer=content, tokenizer_kind=kind)
    message = r"tokenizer\.(json|model): \w+ [\d.]+ cannot read it .* export the bundle again"
    with pytest.raises(BundleError, match=message):
        Tokenizer.open(open_bundle(folder))


@needs_llama2
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


def test_a_library_that_panics_over_a_text_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    content = byte_level_json()
    changed = content.replace(b'"special_tokens":{"<s>":', b'"special_tokens":{"<x>":')
    assert changed != content
    (tmp_path / "tokenizer.json").write_bytes(changed)
    try:
        tokenizer = JsonTokenizer(tmp_path / "tokenizer.json")
    except BundleError:
        return  # a later library may notice when it reads the file
    with pytest.raises(BundleError, match=r"^the bundle's tokenizer fails \(.*\): export the bundle again$"):
        tokenizer.encode("the cat")
