"""Tokenizers: the file for the bundle encodes what the checkpoint's own tokenizer encodes, or is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import transformers
from support.checkpoints import add_tokenizer, save_tiny
from support.tiny_tokenizers import byte_fallback_json, byte_level_json, sentencepiece_model

from satchel.export.checkpoint import open_checkpoint
from satchel.export.checkpoint.hard_strings import HARD_STRINGS
from satchel.export.checkpoint.tokenizer import chosen_tokenizer, folder_tokenizer, transformers_tokenizer
from satchel.export.errors import ExportError


def test_a_folder_without_tokenizer_files_has_none(tmp_path: Path) -> None:
    assert folder_tokenizer(tmp_path) is None
    assert open_checkpoint(save_tiny(tmp_path)).tokenizer is None


def test_the_corpus_is_what_transformers_encodes_and_the_file_encodes_it_too(tmp_path: Path) -> None:
    add_tokenizer(tmp_path)
    found = folder_tokenizer(tmp_path)
    assert found is not None and found.file == tmp_path / "tokenizer.json" and not found.notes
    original = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    written = tokenizers.Tokenizer.from_str(byte_level_json().decode())
    assert [text for text, _ in found.corpus] == list(HARD_STRINGS)
    for text, ids in found.corpus:
        assert list(ids) == original(text).input_ids == written.encode(text).ids
    assert found.add_bos and found.corpus[0][1][0] == 1
    assert (found.kind, found.bos_token_id, found.eos_token_id) == ("tokenizer.json", 1, 2)


@pytest.mark.parametrize("add_bos", [True, False])
def test_a_sentencepiece_folder_keeps_its_model_with_its_bos(add_bos: bool, tmp_path: Path) -> None:
    save_tiny(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    table = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": add_bos}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(table))
    found = folder_tokenizer(tmp_path)
    assert found is not None and (found.kind, found.add_bos) == ("sentencepiece", add_bos)
    assert found.file == tmp_path / "tokenizer.model"
    processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    expected = [1] * add_bos + processor.EncodeAsIds("Hello, world!")
    assert list(dict(found.corpus)["Hello, world!"]) == expected


class Deviating:
    """A tokenizer whose backend does not do what it does itself."""

    bos_token_id = eos_token_id = pad_token_id = None

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self.backend_tokenizer = backend

    def __call__(self, text: str) -> transformers.BatchEncoding:
        return transformers.BatchEncoding({"input_ids": self.backend_tokenizer.encode(text.strip()).ids})


def test_a_file_that_encodes_a_string_differently_is_refused(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(byte_level_json().decode())
    with pytest.raises(ExportError, match=r"encodes ' ' as \[.*\] instead of \[.*\]; pass .* with --tokenizer"):
        transformers_tokenizer(Deviating(backend), "folder")


def test_a_tokenizer_without_backend_is_refused() -> None:
    with pytest.raises(ExportError, match=r"object .*--tokenizer"):
        transformers_tokenizer(object(), "folder")


@pytest.mark.parametrize("content", ["{", "{}", '{"model": 3}'])
def test_a_damaged_tokenizer_json_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ExportError, match=r"not a tokenizer\.json that the tokenizers library reads"):
        folder_tokenizer(tmp_path)
    with pytest.raises(ExportError, match=r"tokenizer\.json: not a tokenizer.json"):
        chosen_tokenizer(path)


def test_a_tokenizer_json_can_be_chosen(tmp_path: Path) -> None:
    path = tmp_path / "any.json"
    path.write_bytes(byte_fallback_json())
    found = chosen_tokenizer(path)
    plain = tokenizers.Tokenizer.from_str(byte_fallback_json().decode())
    assert found.file == path
    assert all(list(ids) == plain.encode(text).ids for text, ids in found.corpus)


@pytest.mark.parametrize(("table", "add_bos"), [(None, True), ({}, True), ({"add_bos_token": False}, False)])
def test_a_sentencepiece_model_can_be_chosen(table: dict[str, bool] | None, add_bos: bool, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentencepiece_model())
    if table is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(table))
    found = chosen_tokenizer(path)
    processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    start = [1] if add_bos else []
    assert (found.kind, found.file, found.add_bos) == ("sentencepiece", path, add_bos)
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (1, 2, None)
    assert all(list(ids) == start + processor.EncodeAsIds(text) for text, ids in found.corpus)


def test_a_chosen_tokenizer_replaces_the_folders_own(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", tokenizer=True)
    path = tmp_path / "other.json"
    path.write_bytes(byte_fallback_json())
    found = open_checkpoint(folder, tokenizer=path).tokenizer
    assert found is not None and found.file == path


def test_choices_that_are_no_tokenizer_are_refused(tmp_path: Path) -> None:
    for name, message in (("absent.json", "no such file"), (".", "no tokenizer in this folder")):
        with pytest.raises(ExportError, match=f"{message}; pass the model's tokenizer.json"):
            chosen_tokenizer(tmp_path / name)
    (tmp_path / "x.txt").write_text("")
    (tmp_path / "x.model").write_bytes(b"nonsense")
    with pytest.raises(ExportError, match=r"x\.txt: "):
        chosen_tokenizer(tmp_path / "x.txt")
    with pytest.raises(ExportError, match=r"x\.model: not a SentencePiece model"):
        chosen_tokenizer(tmp_path / "x.model")


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, tokenizer=True, vocab_size=64)
    with pytest.raises(ExportError, match=r"token id \d+, .* 64 ids; .*--tokenizer"):
        open_checkpoint(tmp_path)


def test_no_two_hard_strings_are_the_same() -> None:
    assert len(set(HARD_STRINGS)) == len(HARD_STRINGS) >= 40
