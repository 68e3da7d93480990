"""The provenance of a bundle for its manifest: inputs, options and versions, with names and digests but no paths."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from satchel.export.checkpoint import Checkpoint
from satchel.export.checkpoint.adapters import read_adapter
from satchel.export.checkpoint.separate_adapters import split_name
from satchel.export.config import ExportConfig
from satchel.export.quantize.texts import calibration_file, certificate_file
from satchel.export.recipes import recipe_file, recipe_of
from satchel.export.user_passes import UserPass
from satchel.runtime.bundle.hash_cache import sha256_of
from satchel.runtime.bundle.manifest import FileRecord, NamedFile, Provenance
from satchel.runtime.util.cpu import machine_cores, processor_features

PACKAGES = (
    "satchel", "torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy", "safetensors", "gguf",
    "tokenizers", "sentencepiece",
)  # fmt: skip
"""Packages whose versions the manifest records."""

Sources = dict[str, FileRecord]
"""The checkpoint's files by name."""

SILENT = ("output", "append_precision", "force", "resume")
"""Options that do not affect the bytes of a bundle."""


def producer() -> dict[str, str]:
    """Return the versions of Python and of the packages that an export uses."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}


def source_records(checkpoint: Checkpoint, go_on: Callable[[int], object] = lambda read: None) -> Sources:
    """Return size and digest of each of the checkpoint's files; `go_on` is called with the bytes of each read.

    Raises:
        OSError: A file cannot be read.
    """
    return {path.name: FileRecord(path.stat().st_size, sha256_of(path, go_on)) for path in checkpoint.sources}


def provenance(checkpoint: Checkpoint, config: ExportConfig, sources: Sources) -> Provenance:
    """Return the provenance of a checkpoint's bundle; `sources` is what `source_records` returned.

    Raises:
        OSError: An input file no longer exists.
    """
    return Provenance(
        options=recorded_options(checkpoint, config),
        source=sources,
        processor=processor_features(),
        threads=machine_cores(),
    )


def recorded_options(checkpoint: Checkpoint, config: ExportConfig) -> dict[str, Any]:
    """Return the options that affect the bytes of a bundle, as JSON data, files by name and digest.

    Raises:
        OSError: An input file no longer exists.
    """
    recipe = recipe_of(config)
    files = {
        "recipe": recipe_file(config),
        "calibrate": calibration_file(checkpoint, config, recipe),
        "eval_text": certificate_file(checkpoint, config),
    }
    options = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)} | files
    options["adapters"] = [_adapter(text, config) for text in config.adapters]
    if config.tokenizer is not None and checkpoint.tokenizer is not None:
        options["tokenizer"] = _tokenizer(config.tokenizer, checkpoint.tokenizer.file)
    return {name: _as_data(value) for name, value in options.items() if name not in SILENT}


def named_file(path: Path) -> NamedFile:
    """Return a file's name and digest."""
    return NamedFile(path.name, sha256(path))


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, as 64 hex digits."""
    return sha256_of(path, lambda read: None)


def _tokenizer(path: Path, file: Path | bytes) -> NamedFile:
    content = file.read_bytes() if isinstance(file, Path) else file
    return NamedFile(path.name, hashlib.sha256(content).hexdigest())


def _adapter(text: str | Path, config: ExportConfig) -> dict[str, Any]:
    if config.separate_adapters:
        name, folder = split_name(text)
        return {**dataclasses.asdict(named_file(read_adapter(folder).file)), "name": name}
    adapter = read_adapter(text)
    return {**dataclasses.asdict(named_file(adapter.file)), "name": adapter.folder.name, "share": adapter.share}


def _as_data(value: Any) -> Any:
    """Convert an option to JSON data."""
    if isinstance(value, tuple):
        return [_as_data(item) for item in value]
    if isinstance(value, UserPass):
        return {"name": value.name, "sha256": None if value.file is None else sha256(value.file)}
    if isinstance(value, NamedFile):
        return dataclasses.asdict(value)
    return _as_data(named_file(value)) if isinstance(value, Path) else value
