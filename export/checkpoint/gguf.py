"""Opens a GGUF file as a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from satchel.export.checkpoint.gguf_config import architecture_of, config_of
from satchel.export.checkpoint.gguf_parts import open_parts
from satchel.export.checkpoint.gguf_tokenizer import gguf_tokenizer
from satchel.export.checkpoint.gguf_vocabulary import Vocabulary, read_vocabulary
from satchel.export.checkpoint.gguf_weights import gguf_weights
from satchel.export.checkpoint.record import Checkpoint
from satchel.export.checkpoint.special_ids import special_ids
from satchel.export.checkpoint.structure import Implementations, build_structure
from satchel.export.checkpoint.templates import template_files
from satchel.export.checkpoint.ties import checked, tie
from satchel.export.checkpoint.tokenizer import check_vocabulary, chosen_tokenizer
from satchel.runtime.generation.templates.chat_template import DEFAULT

_TOKEN_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


_SAMPLING = "general.sampling."
_SAMPLING_NAMES = {"temp": "temperature", "penalty_repeat": "repetition_penalty"}
"""The settings of llama.cpp that a generation_config.json calls otherwise."""


def open_gguf(path: Path, implementations: Implementations, tokenizer: Path | None) -> Checkpoint:
    """Open a GGUF file, or any part of a split one; see `open_checkpoint` for the arguments.

    Raises:
        ExportError: If the file is damaged, or contains something that the export would have to drop.
    """
    file = open_parts(path)
    architecture = architecture_of(file)
    config = config_of(file)
    module = build_structure(config, implementations, str(path))
    weights = gguf_weights(module, file, architecture)
    tie(module, weights)
    weights = checked(module, weights, str(path))

    vocabulary, files = None, None
    if tokenizer is not None:
        files = chosen_tokenizer(tokenizer)
    else:
        vocabulary = read_vocabulary(file.metadata, path)
        files = None if vocabulary is None else gguf_tokenizer(vocabulary, path)
    if files is not None:
        check_vocabulary(files, config.vocab_size, str(path))
    generation = _sampling(file.metadata) | _generation_config(vocabulary)
    ids = special_ids([generation, {} if files is None else vars(files)])
    return Checkpoint(
        kind="gguf",
        name=path.name,
        model_type=config.model_type,
        module=module,
        weights=weights,
        vocab_size=config.vocab_size,
        max_context=config.max_position_embeddings,
        bos_token_id=ids.bos,
        eos_token_ids=ids.eos,
        pad_token_id=ids.pad,
        stored_bytes=file.stored_bytes,
        tokenizer=files,
        companions=_companions(file.metadata, vocabulary, path, generation),
        sources=file.parts,
    )


def _sampling(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sampling settings that a file recommends, by their names in a generation_config.json."""
    stored = {key.removeprefix(_SAMPLING): value for key, value in metadata.items() if key.startswith(_SAMPLING)}
    found = {_SAMPLING_NAMES.get(key, key): value for key, value in stored.items()}
    # llama.cpp samples unless the temperature is 0; a generation_config.json has to say so.
    return {**found, "do_sample": found.get("temperature") != 0} if found else {}


def _generation_config(vocabulary: Vocabulary | None) -> dict[str, Any]:
    """Return the special ids as a generation_config.json states them; all that end generation are `eos_token_id`."""
    if vocabulary is None:
        return {}
    ids = vocabulary.ids
    stored = {"bos_token_id": ids.get("bos_token_id"), "pad_token_id": ids.get("padding_token_id")}
    found: dict[str, Any] = {name: value for name, value in stored.items() if value is not None}
    if vocabulary.suppressed:
        found["suppress_tokens"] = list(vocabulary.suppressed)
    return {**found, "eos_token_id": list(vocabulary.ends)} if vocabulary.ends else found


def _companions(
    metadata: Mapping[str, Any], vocabulary: Vocabulary | None, path: Path, generation: dict[str, Any]
) -> dict[str, bytes | Path]:
    """Generate the files that a checkpoint folder would contain, from the metadata."""
    tokens = {name: vocabulary.token(key) for name, key in _TOKEN_KEYS.items()} if vocabulary else {}
    tokens = {name: token for name, token in tokens.items() if token is not None}
    found: dict[str, bytes | Path] = {}
    for name, table in (("generation_config.json", generation), ("tokenizer_config.json", tokens)):
        if table:
            found[name] = json.dumps(table, indent=2, ensure_ascii=False).encode()
    key = "tokenizer.chat_template"
    named = {name.removeprefix(f"{key}."): text for name, text in metadata.items() if name.startswith(f"{key}.")}
    found |= template_files(({DEFAULT: metadata[key]} if metadata.get(key) else {}) | named, str(path))
    license = metadata.get("general.license")
    if license:
        title = metadata.get("general.name", path.stem)
        found["README.md"] = f"---\nlicense: {license}\n---\n# {title}\n".encode()
    return found
