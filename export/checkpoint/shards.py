"""Which files of a folder hold its tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from satchel.export.checkpoint.safetensors_file import read_safetensors
from satchel.export.checkpoint.torch_file import read_torch
from satchel.export.errors import ExportError
from satchel.graphs.ir.weights import LazyWeight

_Reader = Callable[[Path], dict[str, LazyWeight]]

_LAYOUTS: tuple[tuple[str, _Reader], ...] = (
    ("model.safetensors", read_safetensors),
    ("model.safetensors.index.json", read_safetensors),
    ("pytorch_model.bin", read_torch),
    ("pytorch_model.bin.index.json", read_torch),
)
"""The file names that `save_pretrained` gives, in the order in which transformers looks for them."""


def read_folder(folder: Path) -> tuple[dict[str, LazyWeight], int]:
    """All tensors of a checkpoint folder by their stored names, and the bytes of the files that hold them.

    Raises:
        ExportError: If there is no weight file, or a shard is missing or damaged.
    """
    for name, reader in _LAYOUTS:
        path = folder / name
        if not path.is_file():
            continue
        files = _shards(path) if path.suffix == ".json" else [path]
        tensors: dict[str, LazyWeight] = {}
        for file in files:
            tensors.update(reader(file))
        if path.suffix == ".json":
            _check_index(path, tensors)
        return tensors, sum(file.stat().st_size for file in files)
    raise ExportError(
        f"{folder}: no weights found; looked for {', '.join(name for name, _ in _LAYOUTS)}{_hint(folder)}"
    )


def weight_files(folder: Path) -> list[Path]:
    """The files that `read_folder` reads, an index first."""
    path = next(folder / name for name, _ in _LAYOUTS if (folder / name).is_file())
    return [path, *_shards(path)] if path.suffix == ".json" else [path]


def _hint(folder: Path) -> str:
    gguf = sorted(folder.glob("*.gguf"))
    return f"; pass the file {gguf[0]} to export the GGUF" if gguf else ""


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        files = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ExportError(f'{index}: not an index of shards (no "weight_map"); download it again') from None
    for file in files:
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise ExportError(f"{index}: names {file!r}, which is not a file of this folder; mend the index")
    return dict(weight_map)


def _shards(index: Path) -> list[Path]:
    files = [index.parent / name for name in sorted(set(_weight_map(index).values()))]
    for file in files:
        if not file.is_file():
            raise ExportError(f"{index}: names {file.name}, which is not there; download the missing shard")
    return files


def _check_index(index: Path, tensors: dict[str, LazyWeight]) -> None:
    for name, file in _weight_map(index).items():
        if name not in tensors:
            raise ExportError(f"{index}: says that {file} holds {name}, but it does not; download both again")
