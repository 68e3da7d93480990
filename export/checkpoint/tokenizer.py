"""The tokenizer as the runner will load it, and the proof that it is the checkpoint's own."""

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
    """One tokenizer file and what it must do.

    Attributes:
        kind: Which library reads the file.
        file: The file, or its content.
        add_bos: Whether the BOS id goes before a text. For "tokenizer.json" the file's own post-processor puts it
            there; for "sentencepiece" whoever encodes must.
        corpus: Texts with the ids that the checkpoint's tokenizer gives them, special tokens as it adds them.
        bos_token_id: The tokenizer's own ids, which count where no config names any.
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
    """The tokenizer of a checkpoint folder as transformers loads it; None if the folder has none.

    Raises:
        ExportError: If transformers cannot load it, or it cannot be written as a tokenizer.json that encodes the same.
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
    """The files of a folder that a tokenizer may be read from."""
    return [folder / name for name in (*_STORED, *_BESIDE) if (folder / name).is_file()]


def chosen_tokenizer(path: Path) -> TokenizerFiles:
    """The tokenizer that the user names: a tokenizer.json, a SentencePiece `.model`, or a folder with either.

    Raises:
        ExportError: If there is none at `path`, or it cannot be read.
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
    raise ExportError(f"{path}: not a tokenizer that satchel knows; {_REMEDY}")


def transformers_tokenizer(original: Any, source: str) -> TokenizerFiles:
    """A loaded transformers tokenizer as a tokenizer.json, proven to encode the hard strings alike.

    Raises:
        ExportError: If it has no tokenizer.json form, or that form encodes a string differently.
    """
    backend = getattr(original, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(
            f"{source}: its {type(original).__name__} runs in Python only and has no tokenizer.json form; {_REMEDY}"
        )
    content: bytes = backend.to_str(pretty=False).encode()
    corpus = _corpus(lambda text: original(text).input_ids)
    written = _load(content, source)
    for text, ids in corpus:
        found = tuple(written.encode(text).ids)
        if found != ids:
            raise ExportError(
                f"{source}: as a tokenizer.json its tokenizer encodes {text[:40]!r} as {list(found[:8])} instead of "
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
    """Refuse a tokenizer that gives ids beyond the model's vocabulary."""
    highest = max(max(ids, default=0) for _, ids in tokenizer.corpus)
    if highest >= vocab_size:
        raise ExportError(
            f"{source}: the tokenizer gives token id {highest}, the model has {vocab_size} ids; "
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
        raise ExportError(f"{config}: not a JSON table; mend it or move it away") from None
