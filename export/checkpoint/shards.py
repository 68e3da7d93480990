"""Finds and reads the weight files of a checkpoint folder."""

from __future__ import annotations

import json
from pathlib import Path

from satchel.export.checkpoint.safetensors_file import read_safetensors
from satchel.export.checkpoint.torch_file import read_torch
from satchel.export.errors import ExportError
from satchel.graphs.ir.weights import LazyWeight

NAMED = "transformers_weights"
"""The key of config.json that names the file with the weights, or its index."""

_LAYOUTS = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"
)  # fmt: skip
"""The file names that `save_pretrained` writes, in transformers' lookup order."""

_TORCH = "pytorch_model"
_SAFETENSORS = (".safetensors", ".safetensors.index.json")

_OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pth", "*.pt", "*.ckpt", "*.h5", "*.msgpack")
_ADVICE = "rename it to model.safetensors if it has transformers' names, or convert it with the model's script"


def read_folder(folder: Path, named: object = None) -> tuple[dict[str, LazyWeight], int]:
    """Return all tensors of a checkpoint folder by name, and the total bytes of their files.

    Args:
        folder: The folder.
        named: What `NAMED` of its config.json says: a file to read in place of those of the usual names. None for none.

    Raises:
        ExportError: If there is no weight file, the named one is no safetensors file in the folder or has one of the
            usual names beside it, or a shard is missing or damaged.
    """
    path = _first(folder, named)
    reader = read_torch if path.name.startswith(_TORCH) and not named else read_safetensors
    files = _shards(path) if path.suffix == ".json" else [path]
    tensors: dict[str, LazyWeight] = {}
    for file in files:
        tensors.update(reader(file))
    if path.suffix == ".json":
        _check_index(path, tensors)
    return tensors, sum(file.stat().st_size for file in files)


def weight_files(folder: Path, named: object = None) -> list[Path]:
    """Return the files that `read_folder` reads, an index first."""
    path = _first(folder, named)
    return [path, *_shards(path)] if path.suffix == ".json" else [path]


def _first(folder: Path, named: object) -> Path:
    """Return the file with the weights, or their index."""
    found = next((folder / name for name in _LAYOUTS if (folder / name).is_file()), None)
    if named is None:
        if found is None:
            raise ExportError(f"{folder}: no weights found; looked for {', '.join(_LAYOUTS)}{_hint(folder)}")
        return found
    where = f"{folder / 'config.json'}: {NAMED} {str(named)[:60]!r}"
    if not isinstance(named, str) or not named.endswith(_SAFETENSORS):
        raise ExportError(f"{where}: not the name of a file in safetensors or of its index: correct or remove the key")
    if Path(named).name != named:
        raise ExportError(f"{where}: must be in the same folder: move it there, and correct the key")
    if not (folder / named).is_file():
        raise ExportError(f"{where}: there is no such file: download it, or remove the key")
    if found is not None and found.name != named:
        raise ExportError(
            f"{where}: {found.name} lies beside it, with other weights: move that away to export those that are named, "
            "or remove the key"
        )
    return folder / named


def _hint(folder: Path) -> str:
    gguf = sorted(folder.glob("*.gguf"))
    if gguf:
        return f"; pass the file {gguf[0]} to export the GGUF"
    if (folder / "adapter_config.json").is_file():
        return f"; it holds an adapter: merge it while exporting its base: satchel export BASE --adapter {folder}"
    other = sorted(path.name for pattern in _OTHER_WEIGHTS for path in folder.glob(pattern))
    return f"; {other[0]} is in another layout or variant: {_ADVICE}" if other else ""


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        files = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ExportError(f'{index}: not a shard index (no "weight_map"); download it again') from None
    for file in files:
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise ExportError(f"{index}: names {file!r}, which is not a file name in this folder; fix the index")
    return dict(weight_map)


def _shards(index: Path) -> list[Path]:
    files = [index.parent / name for name in sorted(set(_weight_map(index).values()))]
    for file in files:
        if not file.is_file():
            raise ExportError(f"{index}: names {file.name}, which does not exist; download the missing shard")
    return files


def _check_index(index: Path, tensors: dict[str, LazyWeight]) -> None:
    for name, file in _weight_map(index).items():
        if name not in tensors:
            raise ExportError(f"{index}: lists {name} in {file}, which does not contain it; download both again")
