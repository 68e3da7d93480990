"""Rebuilds the tokenizer that a GGUF file's metadata describes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers
from transformers import TokenizersBackend
from transformers.integrations.gguf.gguf_tokenizer_mapping import (
    GGUF_PRE_TOKENIZER_SPLITS,
    GGUF_TOKENIZER_MAPPING,
    convert_gguf_tokenizer,
)

from satchel.export.checkpoint.structure import one_line
from satchel.export.checkpoint.tokenizer import TokenizerFiles, transformers_tokenizer
from satchel.export.errors import ExportError

_REMEDY = "pass the tokenizer.json of the original model with --tokenizer"
_PLAIN_SPLITS = frozenset({"gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion"})
_SINGLE_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"})
_WHOLE_WORDS = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken"})
"""Pre-tokenizers that skip merges for whole words in the vocabulary, and add BOS unless the file disables it."""

_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def gguf_tokenizer(metadata: Mapping[str, Any], path: Path) -> TokenizerFiles | None:
    """Return the tokenizer in the metadata, or None if the file has none.

    Raises:
        ExportError: If its type or pre-tokenizer is not supported.
    """
    kind = metadata.get("tokenizer.ggml.model", "none")
    if kind in ("none", "no_vocab"):
        return None
    tables = {
        group: {name: metadata[f"tokenizer.{key}"] for key, name in renames.items() if f"tokenizer.{key}" in metadata}
        for group, renames in GGUF_TOKENIZER_MAPPING.items()
    }
    split = metadata.get("tokenizer.ggml.pre")
    _check_split(kind, split, metadata, path)
    try:
        backend, _ = convert_gguf_tokenizer(metadata["general.architecture"], tables["tokenizer"])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ExportError(f"{path}: its tokenizer cannot be rebuilt: {one_line(error)}; {_REMEDY}") from None
    if kind == "gpt2" and split in _SINGLE_DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if kind == "gpt2" and split in _WHOLE_WORDS:
        backend.model.ignore_merges = True
    options = {"add_bos_token": kind == "llama" or split in _WHOLE_WORDS} | tables["tokenizer_config"]
    build: Any = TokenizersBackend  # untyped in transformers
    original = build(tokenizer_object=backend, **options, **special_tokens(metadata, path))
    return transformers_tokenizer(original, str(path))


def special_tokens(metadata: Mapping[str, Any], path: Path) -> dict[str, str | None]:
    """Return the text of each special token by transformers' name; None if the file does not define it."""
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    found: dict[str, str | None] = {}
    for name, key in _SPECIAL.items():
        index = metadata.get(f"tokenizer.ggml.{key}")
        if index is not None and not index < len(tokens):
            raise ExportError(f"{path}: tokenizer.ggml.{key} is {index}, but there are {len(tokens)} tokens; {_REMEDY}")
        found[name] = None if index is None else tokens[index]
    return found


def _check_split(kind: str, split: str | None, metadata: Mapping[str, Any], path: Path) -> None:
    """Refuse a tokenizer that would be rebuilt incorrectly."""
    known = _PLAIN_SPLITS | _SINGLE_DIGITS | GGUF_PRE_TOKENIZER_SPLITS.keys()
    if kind == "gpt2" and split not in known:
        raise ExportError(f"{path}: its pre-tokenizer {split!r} is not supported; {_REMEDY}")
    gemma = metadata["general.architecture"].startswith("gemma")
    if kind == "llama" and not gemma and metadata.get("tokenizer.ggml.add_space_prefix") is False:
        raise ExportError(
            f"{path}: its SentencePiece tokenizer adds no space prefix, which is not supported; {_REMEDY}"
        )
