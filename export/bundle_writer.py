"""Writes a bundle's files into a folder: one weight file, three graphs that point into it, and what travels along."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import onnx_ir as ir

from satchel.export.errors import ExportError
from satchel.graphs.values import weight
from satchel.graphs.weights import LazyWeight
from satchel.runtime.manifest import FileRecord, TensorSpec

WEIGHTS_NAME = "weights.bin"
ALIGNMENT = 4096
"""Bytes at whose multiples each weight starts: a memory page, so that it can be mapped by itself."""

DTYPE_NAMES = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16", ir.DataType.INT64: "int64"}
Advance = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a weight lies in the weight file, in bytes."""

    weight: LazyWeight
    offset: int


def lay_out(models: Iterable[ir.Model]) -> dict[str, Place]:
    """Give each weight of the graphs its place, once: graphs that read a weight of the same name share its bytes.

    Raises:
        ValueError: Two graphs have different weights of one name.
    """
    places: dict[str, Place] = {}
    end = 0
    for model in models:
        for value in model.graph.initializers.values():
            lazy = weight(value)
            if lazy is None:
                continue
            there = places.get(lazy.name)
            if there is not None:
                if (there.weight.dims, there.weight.dtype) != (lazy.dims, lazy.dtype):
                    raise ValueError(f"two weights are called {lazy.name}: {there.weight} and {lazy}")
                continue
            offset = -(-end // ALIGNMENT) * ALIGNMENT
            places[lazy.name] = Place(lazy, offset)
            end = offset + lazy.nbytes
    return places


def write_weights(folder: Path, places: Mapping[str, Place], advance: Advance) -> FileRecord:
    """Write the weight file, block by block, and hash it on the way; `advance` hears of each block's bytes."""
    digest, position = hashlib.sha256(), 0
    with (folder / WEIGHTS_NAME).open("wb") as file:

        def put(data: bytes | memoryview) -> None:
            nonlocal position
            file.write(data)
            digest.update(data)
            position += len(data)

        for place in places.values():
            put(bytes(place.offset - position))
            for block in place.weight.blocks():
                data = memoryview(block.reshape(-1).view("u1"))
                put(data)
                advance(len(data))
    return FileRecord(position, digest.hexdigest())


def write_graph(folder: Path, name: str, model: ir.Model, places: Mapping[str, Place]) -> None:
    """Write one graph, its weights as external data in the weight file."""
    model = model.clone()
    for value in model.graph.initializers.values():
        lazy = weight(value)
        if lazy is None:
            continue
        value.const_value = ir.ExternalTensor(
            WEIGHTS_NAME,
            places[lazy.name].offset,
            lazy.nbytes,
            lazy.dtype,
            shape=lazy.shape,
            name=str(value.name),
            base_dir=str(folder),
        )
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        for output in node.outputs:
            output.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.producer_name, model.producer_version = "satchel", None
    ir.save(model, folder / name)


def write_companions(folder: Path, files: Mapping[str, bytes | Path]) -> None:
    """Copy or write further files under their names in the bundle."""
    for name, content in files.items():
        if isinstance(content, Path):
            shutil.copyfile(content, folder / name)
        else:
            (folder / name).write_bytes(content)


def write_json(path: Path, document: object) -> None:
    """Write a JSON document for people and programs: indented, UTF-8, one newline at its end."""
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def record(path: Path) -> FileRecord:
    """Size and hash of a small file."""
    with path.open("rb") as file:
        return FileRecord(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def tensor_specs(values: Iterable[ir.Value]) -> tuple[TensorSpec, ...]:
    """Graph inputs or outputs as the manifest declares them.

    Raises:
        ExportError: A shape or type is not known.
    """
    specs = []
    for value in values:
        if value.shape is None or value.dtype not in DTYPE_NAMES:
            raise ExportError(
                f"the graph's {value.name} has no shape or an unexpected type {value.dtype}: "
                "report this model to satchel"
            )
        shape = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape.dims)
        specs.append(TensorSpec(str(value.name), DTYPE_NAMES[value.dtype], shape))
    return tuple(specs)
