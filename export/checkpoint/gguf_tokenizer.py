"""Builds a tokenizer.json from the vocabulary of a GGUF file, which encodes as llama.cpp does."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from satchel.export.checkpoint.gguf_vocabulary import REMEDY, Kind, Vocabulary
from satchel.export.checkpoint.structure import one_line
from satchel.export.checkpoint.tokenizer import Encode, TokenizerFiles, json_tokenizer
from satchel.export.errors import ExportError

_SPACE = "▁"


def gguf_tokenizer(vocabulary: Vocabulary, path: Path) -> TokenizerFiles:
    """Return the tokenizer of a vocabulary; one of SentencePiece is compared with the sentencepiece library.

    Raises:
        ExportError: If it cannot be built, or encodes a text differently from sentencepiece.
    """
    build = {"llama": _sentencepiece_bpe, "gpt2": _byte_level_bpe}[vocabulary.model]
    try:
        tokenizer = build(vocabulary)
        tokenizer.add_tokens(_added(vocabulary))
        tokenizer.post_processor = _start_and_end(vocabulary)
        content = tokenizer.to_str(pretty=False).encode()
    except Exception as error:  # noqa: BLE001 - the tokenizers library raises Exception itself, nothing narrower
        raise ExportError(f"{path}: its tokenizer cannot be rebuilt: {one_line(error)}; {REMEDY}") from None
    files = json_tokenizer(content, str(path))
    if vocabulary.model == "llama":
        _compare(files.corpus, _reference(vocabulary, path), path)
    bos, eos, pad = (vocabulary.ids.get(key) for key in ("bos_token_id", "eos_token_id", "padding_token_id"))
    return dataclasses.replace(
        files, bos_token_id=bos, eos_token_id=eos, pad_token_id=pad, notes=(*files.notes, *vocabulary.notes)
    )


def _byte_level_bpe(vocabulary: Vocabulary) -> Tokenizer:
    """Byte-level BPE: words by regular expressions, whose bytes are merged; bytes without a token are dropped."""
    if vocabulary.split is None:
        raise ValueError("a byte-level vocabulary needs a pre-tokenizer")
    known = {token: index for index, token in enumerate(vocabulary.tokens)}
    merges = [(a, b) for a, b in vocabulary.merges if a in known and b in known and a + b in known]
    tokenizer = Tokenizer(models.BPE(known, merges, ignore_merges=vocabulary.split.whole_words))
    splits = [pre_tokenizers.Split(Regex(each), "isolated") for each in vocabulary.split.expressions]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_bpe(vocabulary: Vocabulary) -> Tokenizer:
    """SentencePiece's BPE: of all neighbors that make a token together, those of the best score are merged first."""
    known = {token: index for index, token in enumerate(vocabulary.tokens)}
    found = []
    for token, index in known.items():
        if vocabulary.kinds[index] in (Kind.NORMAL, Kind.USER_DEFINED, Kind.UNUSED):
            pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
            found += [(-vocabulary.scores[index], index, a, b) for a, b in pairs if a in known and b in known]
    merges = [(a, b) for _, _, a, b in sorted(found)]
    tokenizer = Tokenizer(
        models.BPE(
            known,
            merges,
            unk_token=vocabulary.token("unknown_token_id"),
            fuse_unk=True,
            byte_fallback=Kind.BYTE in vocabulary.kinds,
        )
    )
    steps = [normalizers.Prepend(_SPACE)] if vocabulary.add_space else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    tokenizer.decoder = _sentencepiece_decoder(vocabulary)
    return tokenizer


def _sentencepiece_decoder(vocabulary: Vocabulary) -> Any:
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if vocabulary.add_space else steps)


def _added(vocabulary: Vocabulary) -> list[AddedToken]:
    """Return the tokens that are found in a text as a whole, before all else; what a user sees is not special."""
    return [
        AddedToken(
            vocabulary.tokens[index],
            normalized=False,
            special=vocabulary.kinds[index] != Kind.USER_DEFINED,
            rstrip=vocabulary.tokens[index] in vocabulary.strip_right,
        )
        for index in vocabulary.special()
    ]


def _start_and_end(vocabulary: Vocabulary) -> Any:
    bos, eos = vocabulary.ids.get("bos_token_id"), vocabulary.ids.get("eos_token_id")
    start = bos if vocabulary.add_bos else None
    end = eos if vocabulary.add_eos else None
    special = {vocabulary.tokens[i]: i for i in (start, end) if i is not None}
    if not special:
        return None
    single: list[Any] = [vocabulary.tokens[start]] if start is not None else []
    single += ["$A", *([vocabulary.tokens[end]] if end is not None else [])]
    return processors.TemplateProcessing(single=single, special_tokens=list(special.items()))


def _reference(vocabulary: Vocabulary, path: Path) -> Encode:
    """Return how a text is encoded by the sentencepiece library with the same pieces and scores.

    Special tokens are taken out of the text first, longest first; what is left starts with a space after each.
    """
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=_model(vocabulary))
    except (RuntimeError, OSError, UnicodeDecodeError) as error:
        raise ExportError(f"{path}: sentencepiece cannot read its vocabulary: {one_line(error)}; {REMEDY}") from None
    ids = {vocabulary.tokens[index]: index for index in vocabulary.special()}
    longest_first = sorted(ids, key=lambda token: len(token.encode()), reverse=True)
    pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})" if longest_first else "(?!)()")
    start = [vocabulary.ids["bos_token_id"]] if vocabulary.add_bos and "bos_token_id" in vocabulary.ids else []
    end = [vocabulary.ids["eos_token_id"]] if vocabulary.add_eos and "eos_token_id" in vocabulary.ids else []

    def encode(text: str) -> list[int]:
        found, last = list(start), ""
        for part in pattern.split(text):
            plain = part.lstrip() if last in vocabulary.strip_right else part
            found += [ids[part]] if part in ids else processor.encode(plain) if plain else []
            last = part
        return found + end

    return encode


def _model(vocabulary: Vocabulary) -> bytes:
    """Return the vocabulary as a SentencePiece model; it needs an unknown piece, which is added if there is none."""
    messages: Any = sentencepiece_model_pb2  # its classes are made at run time
    proto = messages.ModelProto()
    piece = proto.SentencePiece
    types = {Kind.UNKNOWN: piece.CONTROL, Kind.CONTROL: piece.CONTROL, Kind.BYTE: piece.BYTE}
    unknown = vocabulary.ids.get("unknown_token_id")
    for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=True)):
        # SentencePiece has one unknown piece; what llama.cpp never makes of a text may be any control piece.
        kind = piece.UNKNOWN if index == unknown else types.get(Kind(kind), piece.NORMAL)
        proto.pieces.add(piece=token, score=vocabulary.scores[index], type=kind)
    if unknown is None:
        proto.pieces.add(piece="\N{REPLACEMENT CHARACTER}unknown", score=0.0, type=piece.UNKNOWN)
    spec = proto.trainer_spec
    spec.model_type = spec.BPE
    spec.byte_fallback = sum(kind == Kind.BYTE for kind in vocabulary.kinds) == 256
    rules = proto.normalizer_spec
    rules.name, rules.add_dummy_prefix = "identity", vocabulary.add_space
    rules.escape_whitespaces, rules.remove_extra_whitespaces = True, False
    serialized: bytes = proto.SerializeToString()
    return serialized


def _compare(corpus: tuple[tuple[str, tuple[int, ...]], ...], reference: Encode, path: Path) -> None:
    for text, ids in corpus:
        expected = tuple(reference(text))
        if ids != expected:
            raise ExportError(
                f"{path}: as tokenizer.json, its tokenizer encodes {text[:40]!r} as {list(ids[:8])} instead of "
                f"{list(expected[:8])}; {REMEDY}"
            )
