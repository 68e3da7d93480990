"""Converts a checkpoint's tokenizer to the form that the runner loads, and verifies that both encode alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import sentencepiece
import tokenizers
from transformers import AutoTokenizer

from satchel.export.checkpoint.hard_strings import HARD_STRINGS
from satchel.export.checkpoint.structure import one_line
from satchel.export.errors import ExportError

Encode = Callable[[str], list[int]]

_STORED = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
_REMEDY = "pass the model's tokenizer.json or SentencePiece .model with --tokenizer"


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer file and its expected behavior.

    Attributes:
        kind: The library that reads the file.
        file: The path of the file, or its contents.
        add_bos: Whether the BOS id is prepended to a text. For "tokenizer.json" the file's post-processor does so; for
            "sentencepiece" the caller must.
        corpus: Texts with their ids from the checkpoint's tokenizer, including special tokens.
        bos_token_id: The tokenizer's own id, used if no config defines one.
        eos_token_id: See `bos_token_id`.
        pad_token_id: See `bos_token_id`.
    """

    kind: Literal["tokenizer.json", "sentencepiece"]
    file: Path | bytes
    add_bos: bool
    corpus: tuple[tuple[str, tuple[int, ...]], ...]
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None


def folder_tokenizer(folder: Path) -> TokenizerFiles | None:
    """Return the tokenizer of a checkpoint folder as transformers loads it, or None if it has none.

    Raises:
        ExportError: If transformers cannot load it, or it has no equivalent tokenizer.json.
    """
    if not any((folder / name).is_file() for name in _STORED):
        return None
    stored = folder / "tokenizer.json"
    if stored.is_file():
        _load(stored.read_bytes(), str(stored))
    try:
        original = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError) as error:
        raise ExportError(f"{folder}: its tokenizer cannot be loaded: {one_line(error)}; {_REMEDY}") from None
    return transformers_tokenizer(original, str(folder))


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files of a folder that may belong to a tokenizer."""
    return [folder / name for name in (*_STORED, *_BESIDE) if (folder / name).is_file()]


def chosen_tokenizer(path: Path) -> TokenizerFiles:
    """Return the tokenizer at a path: a tokenizer.json, a SentencePiece `.model`, or a folder with either.

    Raises:
        ExportError: If `path` has none, or it cannot be read.
    """
    if path.is_dir():
        found = folder_tokenizer(path)
        if found is None:
            raise ExportError(f"{path}: no tokenizer in this folder; {_REMEDY}")
        return found
    if not path.is_file():
        raise ExportError(f"{path}: no such file; {_REMEDY}")
    if path.suffix == ".model":
        return _sentencepiece(path)
    if path.suffix == ".json":
        loaded = _load(path.read_bytes(), str(path))
        encode: Encode = lambda text: loaded.encode(text).ids  # noqa: E731
        return TokenizerFiles("tokenizer.json", path, _adds_bos(loaded), _corpus(encode))
    raise ExportError(f"{path}: not a supported tokenizer; {_REMEDY}")


def transformers_tokenizer(original: Any, source: str) -> TokenizerFiles:
    """Convert a transformers tokenizer to tokenizer.json, and verify both on the hard strings.

    Raises:
        ExportError: If it cannot be converted, or the result encodes a string differently.
    """
    backend = getattr(original, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(
            f"{source}: its {type(original).__name__} is Python-only and has no tokenizer.json form; {_REMEDY}"
        )
    content: bytes = backend.to_str(pretty=False).encode()
    corpus = _corpus(lambda text: original(text).input_ids)
    written = _load(content, source)
    for text, ids in corpus:
        found = tuple(written.encode(text).ids)
        if found != ids:
            raise ExportError(
                f"{source}: as tokenizer.json, its tokenizer encodes {text[:40]!r} as {list(found[:8])} instead of "
                f"{list(ids[:8])}; {_REMEDY}"
            )
    return TokenizerFiles(
        "tokenizer.json",
        content,
        _adds_bos(written),
        corpus,
        bos_token_id=original.bos_token_id,
        eos_token_id=original.eos_token_id,
        pad_token_id=original.pad_token_id,
    )


def check_vocabulary(tokenizer: TokenizerFiles, vocab_size: int, source: str) -> None:
    """Refuse a tokenizer with ids beyond the model's vocabulary."""
    highest = max(max(ids, default=0) for _, ids in tokenizer.corpus)
    if highest >= vocab_size:
        raise ExportError(
            f"{source}: the tokenizer has token id {highest}, but the model has only {vocab_size} ids; "
            "pass the tokenizer that belongs to this model with --tokenizer"
        )


def _corpus(encode: Encode) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((text, tuple(encode(text))) for text in HARD_STRINGS)


def _load(content: bytes, source: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # noqa: BLE001 - the library raises Exception itself, nothing narrower
        raise ExportError(
            f"{source}: not a tokenizer.json that the tokenizers library reads: {one_line(error)}"
        ) from None


def _adds_bos(tokenizer: tokenizers.Tokenizer) -> bool:
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    return bool(tokenizer.encode("a").ids[:1] != plain[:1])


def _sentencepiece(path: Path) -> TokenizerFiles:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(path.read_bytes())
    except (RuntimeError, OSError):
        raise ExportError(f"{path}: not a SentencePiece model; {_REMEDY}") from None
    bos, eos, pad = (i if i >= 0 else None for i in (processor.bos_id(), processor.eos_id(), processor.pad_id()))
    add_bos = bos is not None and _flag(path.with_name("tokenizer_config.json"), "add_bos_token", True)
    start = [bos] if add_bos else []
    corpus = _corpus(lambda text: [*start, *processor.EncodeAsIds(text)])
    return TokenizerFiles("sentencepiece", path, add_bos, corpus, bos, eos, pad)


def _flag(config: Path, name: str, default: bool) -> bool:
    if not config.is_file():
        return default
    try:
        return bool(json.loads(config.read_bytes()).get(name, default))
    except (ValueError, AttributeError):
        raise ExportError(f"{config}: not a JSON object; fix or remove it") from None
