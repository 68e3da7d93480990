"""The vocabulary of a GGUF file encodes as llama.cpp does, and ends generation where it does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from support.checkpoints import write_gguf
from support.llama_cpp_ids import ALPHABET, IDS, MERGES, TEXT, TOKENS
from support.tiny_tokenizers import sentencepiece_model

from satchel.export.checkpoint.gguf_file import read_gguf
from satchel.export.checkpoint.gguf_splits import SPLITS
from satchel.export.checkpoint.gguf_tokenizer import gguf_tokenizer
from satchel.export.checkpoint.gguf_vocabulary import Vocabulary, read_vocabulary
from satchel.export.checkpoint.hard_strings import HARD_STRINGS
from satchel.export.errors import ExportError

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
Pieces = sentencepiece.SentencePieceProcessor


def write(path: Path, model: str, tokens: list[str], kinds: list[int], facts: dict[str, Any], name: str = "") -> Path:
    """A file with nothing but a vocabulary."""
    vocabulary = {"model": model, "tokens": tokens, "token_type": kinds, **facts}
    metadata = {"general.name": name} if name else {}
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()}
    return write_gguf(path, "llama", {}, {}, metadata=metadata)


def byte_level(path: Path, *special: str, kind: int = CONTROL, **facts: Any) -> Path:
    tokens = [*ALPHABET, "ab", *special]
    kinds = [NORMAL] * (len(ALPHABET) + 1) + [kind] * len(special)
    return write(path, "gpt2", tokens, kinds, {"pre": "qwen2", "merges": ["a b"], **facts})


def vocabulary(path: Path) -> Vocabulary:
    found = read_vocabulary(read_gguf(path).metadata, path)
    assert found is not None
    return found


def tokenizer(path: Path) -> tokenizers.Tokenizer:
    content = gguf_tokenizer(vocabulary(path), path).file
    assert isinstance(content, bytes)
    return tokenizers.Tokenizer.from_str(content.decode())


def ends(path: Path) -> set[str]:
    found = vocabulary(path)
    return {found.tokens[index] for index in found.ends}


@pytest.mark.parametrize("pre", IDS)
def test_words_are_those_of_llama_cpp(pre: str, tmp_path: Path) -> None:
    last = len(TOKENS) - 1
    facts = {"pre": pre, "merges": MERGES, "bos_token_id": last, "eos_token_id": last}
    path = write(tmp_path / "v.gguf", "gpt2", TOKENS, [NORMAL] * last + [CONTROL], facts)
    assert tokenizer(path).encode(TEXT).ids == IDS[pre]


def test_every_pre_tokenizer_is_compared_with_llama_cpp() -> None:
    assert set(SPLITS.values()) == {SPLITS[pre] for pre in IDS}


def test_without_the_name_of_a_pre_tokenizer_text_is_split_by_default_and_a_line_says_so(tmp_path: Path) -> None:
    last = len(TOKENS) - 1
    path = write(tmp_path / "v.gguf", "gpt2", TOKENS, [NORMAL] * last + [CONTROL], {"merges": MERGES})
    assert tokenizer(path).encode(TEXT).ids == IDS["default"]
    (note,) = vocabulary(path).notes
    assert "tokenizer.ggml.pre" in note and "--tokenizer" in note
    assert gguf_tokenizer(vocabulary(path), path).notes == (note,)


END_TEXTS = [
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "[e~[",
    "<\N{FULLWIDTH VERTICAL LINE}end▁of▁sentence\N{FULLWIDTH VERTICAL LINE}>",
]  # fmt: skip


@pytest.mark.parametrize("kind", [CONTROL, NORMAL])
@pytest.mark.parametrize("text", END_TEXTS)
def test_tokens_end_generation_by_their_text(text: str, kind: int, tmp_path: Path) -> None:
    path = byte_level(tmp_path / "v.gguf", "<stop>", text, kind=kind, eos_token_id=257)
    assert ends(path) == {"<stop>", text}
    assert vocabulary(path).ends[0] == 257
    # Whatever type the file gives it, it is found as a whole, and is not shown.
    found = tokenizer(path)
    assert found.encode(f"a{text}a").ids == [ALPHABET.index("a"), 258, ALPHABET.index("a")]
    assert found.get_added_tokens_decoder()[258].special


def test_tokens_end_generation_by_their_ids(tmp_path: Path) -> None:
    path = byte_level(tmp_path / "v.gguf", "<x>", "<y>", "<z>", eos_token_id=257, eot_token_id=258, eom_token_id=259)
    assert ends(path) == {"<x>", "<y>", "<z>"}


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ("<|fim_pad|> <|repo_name|> <|file_sep|> <|fim_prefix|>", "<|fim_pad|> <|repo_name|> <|file_sep|>"),
        ("<|return|> <|call|> <|end|> <|channel|>", "<|return|> <|call|>"),
        ("<|calls|> <|flush|> <|end|>", "<|calls|> <|flush|>"),
        ("<|call|> <|end|>", "<|call|> <|end|>"),
        ("</s> <|tool_response> <turn|>", "<|tool_response> <turn|>"),
    ],
)
def test_families_in_which_a_text_means_something_else(tokens: str, expected: str, tmp_path: Path) -> None:
    assert ends(byte_level(tmp_path / "v.gguf", *tokens.split())) == set(expected.split())


ALPHABETS = ("<\N{FULLWIDTH VERTICAL LINE}User\N{FULLWIDTH VERTICAL LINE}>", "конец", "[终]", "«fin»", "\t\t", "🛑")


@pytest.mark.parametrize("text", ALPHABETS)
@pytest.mark.parametrize("kind", [CONTROL, USER])
def test_special_tokens_of_any_alphabet_stay_whole(text: str, kind: int, tmp_path: Path) -> None:
    found = tokenizer(byte_level(tmp_path / "v.gguf", text, kind=kind))
    assert found.encode(f"ab{text}ab").ids == [256, 257, 256]
    assert found.get_added_tokens_decoder()[257].special == (kind == CONTROL)
    plain = tokenizer(byte_level(tmp_path / "w.gguf", text, kind=NORMAL))
    assert 257 not in plain.encode(f"ab{text}ab").ids


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, [256]),
        ({"add_bos_token": True, "bos_token_id": 257}, [257, 256]),
        ({"add_bos_token": True, "add_eos_token": True, "bos_token_id": 257, "eos_token_id": 258}, [257, 256, 258]),
        ({"pre": "llama-bpe", "bos_token_id": 257}, [257, 256]),
        ({"pre": "llama-bpe", "bos_token_id": 257, "add_bos_token": False}, [256]),
    ],
)
def test_flags_say_what_surrounds_a_text(facts: dict[str, Any], expected: list[int], tmp_path: Path) -> None:
    assert tokenizer(byte_level(tmp_path / "v.gguf", "<a>", "<b>", **facts)).encode("ab").ids == expected


def test_whole_words_are_not_merged_from_parts_where_the_pre_tokenizer_says_so(tmp_path: Path) -> None:
    tokens = [*ALPHABET, "abc"]
    for pre, count in (("llama-bpe", 1), ("qwen2", 3)):
        path = write(tmp_path / f"{pre}.gguf", "gpt2", tokens, [NORMAL] * 257, {"pre": pre, "merges": ["x y"]})
        assert len(tokenizer(path).encode("abc").ids) == count


def pieces() -> Pieces:
    return Pieces(model_proto=sentencepiece_model())


def of_pieces(path: Path, processor: Pieces, *special: str, user: tuple[str, ...] = (), name: str = "",
              **facts: Any) -> Path:  # fmt: skip
    size, more = processor.get_piece_size(), len(special) + len(user)
    kinds = [
        UNKNOWN if processor.is_unknown(i) else CONTROL if processor.is_control(i)
        else BYTE if processor.is_byte(i) else NORMAL for i in range(size)
    ]  # fmt: skip
    tokens = [*(processor.id_to_piece(i) for i in range(size)), *special, *user]
    scores = [*(processor.get_score(i) for i in range(size)), *[-1000.0] * more]
    kinds += [CONTROL] * len(special) + [USER] * len(user)
    return write(path, "llama", tokens, kinds, {"scores": scores, **facts}, name)


def parts(text: str, special: dict[str, int], processor: Pieces, prefix: bool) -> list[int]:
    """Ids by sentencepiece, with special tokens taken out; what follows one starts with a space, as in llama.cpp."""
    found: list[int] = []
    pattern = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
    for part in re.split(f"({pattern})", text):
        if part in special:
            found.append(special[part])
        elif part:
            ids = processor.encode(part if prefix else f"\N{WHITE SQUARE}{part}")
            found += ids if prefix else ids[len(processor.encode("\N{WHITE SQUARE}")) :]
    return found


def test_a_sentencepiece_vocabulary_encodes_as_sentencepiece_does(tmp_path: Path) -> None:
    processor = pieces()
    size = processor.get_piece_size()
    path = of_pieces(tmp_path / "v.gguf", processor, "<|im_end|>", user=("<think>", "   "))
    found = tokenizer(path)
    special = {"<unk>": 0, "<s>": 1, "</s>": 2, "<|im_end|>": size, "<think>": size + 1, "   ": size + 2}
    for text in (*HARD_STRINGS, " the cat", "the<think> cat<|im_end|>the", "    a   b", "<|im_end|> <|im_end|>"):
        assert found.encode(text).ids == [1, *parts(text, special, processor, prefix=True)], text
        ids = found.encode(text, add_special_tokens=False).ids
        assert found.decode([i for i in ids if i not in (0, 1, 2, size)], skip_special_tokens=False) is not None


def test_a_vocabulary_may_add_no_space(tmp_path: Path) -> None:
    processor = pieces()
    found = tokenizer(of_pieces(tmp_path / "v.gguf", processor, add_space_prefix=False, add_bos_token=False))
    special = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for text in ("the cat", " the cat", "a</s>b", "日本"):
        assert found.encode(text).ids == parts(text, special, processor, prefix=False), text
    assert found.decode(found.encode(" the").ids) == " the"


def test_ids_that_a_sentencepiece_file_omits_are_those_of_sentencepiece(tmp_path: Path) -> None:
    found = vocabulary(of_pieces(tmp_path / "v.gguf", pieces()))
    assert [found.token(key) for key in ("bos_token_id", "eos_token_id", "unknown_token_id")] == [
        "<s>",
        "</s>",
        "<unk>",
    ]
    assert (found.ends, found.add_bos, found.add_space) == ((2,), True, True)


def test_phi_3_drops_the_spaces_after_its_special_tokens(tmp_path: Path) -> None:
    processor = pieces()
    size = processor.get_piece_size()
    for name, dropped in (("Phi-3 mini", True), ("Other", False)):
        path = of_pieces(tmp_path / f"{dropped}.gguf", processor, "<|user|>", "<|end|>", "<|endoftext|>", name=name)
        ids = tokenizer(path).encode("<|user|>\nthe<|endoftext|>\nthe").ids
        newline = processor.encode("\nthe")
        expected = processor.encode("the") if dropped else newline
        assert ids == [1, size, *expected, size + 2, *newline]


def test_pieces_of_equal_scores_cannot_be_told_apart_and_are_refused(tmp_path: Path) -> None:
    processor = pieces()
    path = of_pieces(tmp_path / "v.gguf", processor, scores=[0.0] * processor.get_piece_size())
    with pytest.raises(ExportError, match=r"v\.gguf.* encodes .*--tokenizer"):
        tokenizer(path)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown pre-tokenizer": ({"pre": "strange"}, r"'strange'"),
    "id beyond the vocabulary": ({"eot_token_id": 9999}, "eot_token_id is 9999"),
    "no merges": ({"merges": 3}, "merges"),
    "types cut short": ({"token_type": [1, 2]}, "token_type"),
    "text as a flag": ({"add_bos_token": "yes"}, "add_bos_token"),
    "number as a name": ({"pre": 7}, "pre-tokenizer 7"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_vocabulary_that_cannot_be_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    facts, part = BAD[case]
    metadata = read_gguf(byte_level(tmp_path / "v.gguf", "<x>")).metadata
    changed = {**metadata, **{f"tokenizer.ggml.{key}": value for key, value in facts.items()}}
    with pytest.raises(ExportError, match=part) as caught:
        read_vocabulary(changed, tmp_path / "v.gguf")
    assert "\n" not in str(caught.value) and "v.gguf" in str(caught.value)


@pytest.mark.parametrize("model", ["t5", "bert", "rwkv", "plamo2", 5])
def test_other_vocabularies_are_refused_by_name(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=rf"{model}.*--tokenizer"):
        read_vocabulary({"tokenizer.ggml.model": model, "tokenizer.ggml.tokens": ["a"]}, tmp_path)


def test_a_token_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="'aa' twice"):
        read_vocabulary(
            {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": ["aa", "b", "aa"]},
            tmp_path,
        )
