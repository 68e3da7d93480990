"""The stored tokenizer is followed, whatever class a config names; what transformers' class does otherwise is said."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from support.tiny_tokenizers import CORPUS, byte_level_json, sentencepiece_model
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from satchel.export.checkpoint.hard_strings import HARD_STRINGS
from satchel.export.checkpoint.tokenizer import TokenizerFiles, chosen_tokenizer, folder_tokenizer, notes_on
from satchel.export.errors import ExportError
from satchel.runtime.generation.detokenizer import IncrementalDetokenizer

PLAIN = [text for text in HARD_STRINGS if "<" not in text]
"""The hard strings in which no special token is written."""

LINES = [*CORPUS, "one ring and two rings in 1234 boxes", "def f(a): return (a + 2024)  # it's\n"]
KEEP = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}


def pieces(**options: Any) -> bytes:
    out = io.BytesIO()
    settings = {"model_type": "bpe", "vocab_size": 340, "hard_vocab_limit": False, **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=out, num_threads=1, minloglevel=2, **settings
    )
    return out.getvalue()


MODELS: dict[str, dict[str, Any]] = {
    "as it is": KEEP,
    "no space in front": {**KEEP, "add_dummy_prefix": False},
    "NFKC and spaces made one": {"byte_fallback": True},
    "no byte fallback": {**KEEP, "byte_fallback": False, "vocab_size": 90},
    "unigram": {**KEEP, "model_type": "unigram"},
    "unigram in lower case": {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc_cf", "vocab_size": 90},
    "user-defined symbols": {**KEEP, "user_defined_symbols": ["<user>", "\n\n", "  "]},
    "other ids": {**KEEP, "bos_id": 4, "eos_id": 3, "pad_id": 0, "unk_id": 1},
    "space behind words": {**KEEP, "treat_whitespace_as_suffix": True},
    "digits alone": {**KEEP, "split_digits": True},
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("class_name", ["LlamaTokenizer", "GemmaTokenizer", "T5Tokenizer", None])
def test_a_sentencepiece_model_encodes_what_sentencepiece_does(
    kind: str, class_name: str | None, tmp_path: Path
) -> None:
    model = pieces(**MODELS[kind])
    files = folder_with(tmp_path, "tokenizer.model", model, {"tokenizer_class": class_name, "add_bos_token": False})
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = files.load()
    for text in PLAIN:
        ids = processor.encode(text)
        assert tokenizer.encode(text) == ids
        visible = [i for i in ids if not processor.is_control(i)]
        assert tokenizer.decode(ids) == streamed(files, ids) == processor.decode(visible)
    assert files.file == tmp_path / "tokenizer.model"


def byte_level(**options: Any) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **options})
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(LINES, trainer)
    return made


def split_by_hand() -> Tokenizer:
    made = byte_level()
    pattern = Regex(r"\p{N}{1,3}|[^\r\n\p{L}\p{N}]?\p{L}+|\s+|[^\s\p{L}\p{N}]+")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return made


def composed() -> Tokenizer:
    made = byte_level()
    made.normalizer = normalizers.NFC()
    return made


def word_pieces() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(LINES, trainers.WordPieceTrainer(special_tokens=special, show_progress=False))
    return made


def unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.Lowercase()])
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    made.decoder = decoders.Metaspace(prepend_scheme="never", split=False)
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(LINES, trainer)
    return made


def ending() -> Tokenizer:
    made = byte_level()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return made


JSONS = {
    "a Split of its own": (split_by_hand, "GPT2Tokenizer"),
    "NFC": (composed, "GPT2Tokenizer"),
    "a space in front": (lambda: byte_level(add_prefix_space=True), "Qwen2Tokenizer"),
    "EOS behind": (ending, "GPT2Tokenizer"),
    "cased word pieces": (word_pieces, "BertTokenizer"),
    "Unigram without a space in front": (unigram, "T5Tokenizer"),
    "byte-level in a Llama class": (split_by_hand, "LlamaTokenizer"),
    "no class": (split_by_hand, None),
}


@pytest.mark.parametrize("kind", JSONS)
def test_a_tokenizer_json_encodes_what_the_file_says(kind: str, tmp_path: Path) -> None:
    make, class_name = JSONS[kind]
    content = make().to_str().encode()
    files = folder_with(tmp_path, "tokenizer.json", content, {"tokenizer_class": class_name})
    stored, tokenizer = Tokenizer.from_str(content.decode()), files.load()
    for text in HARD_STRINGS:
        ids = stored.encode(text).ids
        assert tokenizer.encode(text) == ids
        shown = stored.decode(ids, skip_special_tokens=True)
        assert tokenizer.decode(ids) == shown
        assert streamed(files, ids).replace("\ufffd", "") == shown.replace("\ufffd", "")


def test_what_transformers_encodes_otherwise_is_said_in_a_line(tmp_path: Path) -> None:
    content = split_by_hand().to_str().encode()
    files = folder_with(tmp_path, "tokenizer.json", content, {"tokenizer_class": "GPT2Tokenizer"})
    original = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    stored = Tokenizer.from_str(content.decode())
    text = next(text for text in HARD_STRINGS if original(text).input_ids != stored.encode(text).ids)
    (note,) = notes_on(files, 400)
    for part in (
        "tokenizer.json",
        repr(text[:40]),
        str(stored.encode(text).ids[:8]),
        str(original(text).input_ids[:8]),
    ):
        assert part in note
    assert "\n" not in note


def test_a_tokenizer_that_transformers_cannot_load_is_followed_all_the_same(tmp_path: Path) -> None:
    table = {"tokenizer_class": "MyTokenizer", "auto_map": {"AutoTokenizer": ["mine.MyTokenizer", None]}}
    files = folder_with(tmp_path, "tokenizer.model", sentencepiece_model(), table)
    processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    assert files.load().encode("the cat") == [1, *processor.encode("the cat")]
    assert len(files.notes) <= 1


@pytest.mark.parametrize("setting", ["truncation", "padding"])
@pytest.mark.parametrize("chosen", [False, True])
def test_truncation_and_padding_of_the_file_are_off(setting: str, chosen: bool, tmp_path: Path) -> None:
    made = byte_level()
    if setting == "truncation":
        made.enable_truncation(4)
    else:
        made.enable_padding(pad_id=2, pad_token="</s>", length=24)
    files = folder_with(tmp_path, "tokenizer.json", made.to_str().encode(), {"eos_token": "</s>"})
    if chosen:
        files = chosen_tokenizer(tmp_path / "tokenizer.json")
    expected = byte_level()
    assert all(list(ids) == expected.encode(text).ids for text, ids in files.corpus)
    assert isinstance(files.file, bytes) and not files.notes
    written = json.loads(files.file)
    assert (written["truncation"], written["padding"]) == (None, None)


ADDED = {
    "330": {"content": "<|im_start|>", "special": True},
    "331": {"content": "<|im_end|>", "special": True, "rstrip": True},
    "332": {"content": "<tool>", "special": False, "lstrip": True, "normalized": False},
}


@pytest.mark.parametrize("place", ["tokenizer_config.json", "added_tokens.json"])
def test_tokens_added_beside_a_sentencepiece_model_are_not_split(place: str, tmp_path: Path) -> None:
    ids = {token["content"]: int(index) for index, token in ADDED.items()}
    table: dict[str, Any] = {"add_bos_token": True, "tokenizer_class": "LlamaTokenizer", "eos_token": "<|im_end|>"}
    if place == "added_tokens.json":
        (tmp_path / place).write_text(json.dumps(ids))
        named = {"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"}
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(named))
    else:
        table["added_tokens_decoder"] = ADDED
    files = folder_with(tmp_path, "tokenizer.model", sentencepiece_model(), table)
    tokenizer = files.load()
    processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    plain = processor.encode("\nthe cat")[1:]  # without the space that belongs in front of a text
    text = "<|im_start|>\nthe cat<|im_end|>"
    assert tokenizer.encode_rendered(text) == [330, *plain, 331]
    assert tokenizer.encode(text) == [1, 330, *plain, 331]
    assert tokenizer.encode_rendered("<tool>") == [332]
    strips = place == "tokenizer_config.json"
    assert (tokenizer.encode_rendered("<|im_end|>\n \n<|im_end|>") == [331, 331]) is strips
    assert (tokenizer.encode_rendered("<tool> <tool>") == [332, 332]) is strips
    assert tokenizer.decode([330, *plain, 332, *plain, 331]) == "\nthe cat<tool>\nthe cat"
    assert [tokenizer.is_hidden(i) for i in (330, 331, 332, 333)] == [True, True, False, True]
    assert (files.eos_token_id, tokenizer.special_token("<|im_end|>"), tokenizer.token_text(332)) == (
        331,
        331,
        "<tool>",
    )
    assert notes_on(files, 400)[: len(files.notes)] == list(files.notes)


def test_eos_is_appended_and_another_bos_is_prepended_where_the_config_says_so(tmp_path: Path) -> None:
    table = {
        "add_bos_token": True,
        "add_eos_token": True,
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<begin>",
        "added_tokens_decoder": {"330": {"content": "<begin>", "special": True}},
    }
    files = folder_with(tmp_path, "tokenizer.model", sentencepiece_model(), table)
    original = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert files.load().encode("the cat") == original("the cat").input_ids
    assert files.load().encode("the cat")[:1] == [330] and files.load().encode("the cat")[-1:] == [2]


def test_tokens_that_a_tokenizer_json_lacks_are_added_as_transformers_adds_them(tmp_path: Path) -> None:
    table = {"eos_token": "<|im_end|>", "pad_token": "<pad>", "additional_special_tokens": ["<a>"]}
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 345, "<|im_end|>": 346}))
    files = folder_with(tmp_path, "tokenizer.json", byte_level_json(), table)
    original = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    text = "<|im_start|>the cat<|im_end|><pad><a>"
    assert files.load().encode(text) == original(text).input_ids
    assert files.load().encode_rendered(text)[-3:] == [346, 347, 348]
    assert (files.eos_token_id, files.pad_token_id) == (346, 347)
    assert "345" not in "".join(files.notes)


def test_a_token_with_an_id_that_the_file_cannot_give_is_left_out_and_named(tmp_path: Path) -> None:
    table = {"added_tokens_decoder": {"500": {"content": "<far>", "special": True}}}
    files = folder_with(tmp_path, "tokenizer.json", byte_level_json(), table)
    assert "<far>" not in files.vocabulary
    assert any("'<far>' has id 500" in note for note in files.notes)


def test_added_tokens_beyond_the_models_ids_are_named_although_no_sample_text_holds_them(tmp_path: Path) -> None:
    table = {"added_tokens_decoder": {"345": {"content": "<odd one>", "special": True}}}
    files = folder_with(tmp_path, "tokenizer.json", byte_level_json(), table)
    (note,) = notes_on(files, 345)
    assert "'<odd one>' (345)" in note and "345 ids" in note
    assert not notes_on(files, 346)


def test_a_class_that_numbers_pieces_otherwise_is_followed(tmp_path: Path) -> None:
    """XLM-R's class (fairseq) puts four tokens of its own in front: the rows of a model follow the class."""
    model = pieces(**KEEP, vocab_size=340)
    files = folder_with(tmp_path, "sentencepiece.bpe.model", model, {"tokenizer_class": "XLMRobertaTokenizer"})
    original = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert files.kind == "tokenizer.json"
    assert files.load().encode("the cat") == original("the cat").input_ids


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"added_tokens_decoder": []}, "added_tokens_decoder is list"),
        ({"added_tokens_decoder": {"x": {"content": "<a>"}}}, "token id 'x'"),
        ({"added_tokens_decoder": {"345": 7}}, "special token that is 7"),
        ({"eos_token": {"text": "</s>"}}, "special token that is None"),
        ({"add_bos_token": "yes"}, "add_bos_token is 'yes'"),
    ],
)
def test_declarations_of_no_sense_are_refused(table: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=rf"tokenizer_config\.json: .*{message}"):
        folder_with(tmp_path, "tokenizer.json", byte_level_json(), table)


def folder_with(folder: Path, name: str, content: bytes, table: dict[str, Any]) -> TokenizerFiles:
    """The tokenizer of a folder with a stored file and a tokenizer_config.json, and a config of a Llama."""
    (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    config = {key: value for key, value in table.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    found = folder_tokenizer(folder)
    assert found is not None
    return found


def streamed(files: TokenizerFiles, ids: list[int]) -> str:
    """The text of ids, token by token."""
    detokenizer = IncrementalDetokenizer(files.load(), [])
    return "".join(map(detokenizer.add, ids)) + detokenizer.finish()


def test_a_text_that_the_library_cannot_encode_is_left_out_and_named(tmp_path: Path) -> None:
    made = Tokenizer(models.WordLevel({"a": 0, "Hello": 1, ",": 2, "world": 3, "!": 4}, unk_token="<absent>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    files = folder_with(tmp_path, "tokenizer.json", made.to_str().encode(), {})
    assert dict(files.corpus)["Hello, world!"] == (1, 2, 3, 4)
    assert len(files.corpus) < len(HARD_STRINGS)
    assert any("cannot encode" in note for note in files.notes)
    assert files.load().encode("a") == [0]
