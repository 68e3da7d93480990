"""Writes the graphs and weights of one rank."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from satchel.graphs.ir.weights import LazyWeight, stored
from satchel.graphs.shard.products import DERIVED_FILE
from satchel.graphs.shard.slices import DERIVED, key_of
from satchel.runtime.bundle.contract import WEIGHTS_NAME
from satchel.runtime.bundle.manifest import FileRecord

PAGE, LINE, LARGE = 4096, 64, 1 << 20
"""Alignment of weights in bytes: a memory page for those of `LARGE` bytes or more, else a cache line."""


@dataclasses.dataclass
class Places:
    """Where each weight lies: equal ones lie in one place, whatever graphs read them."""

    found: dict[tuple[object, ...], tuple[str, int, ir.TensorProtocol]] = dataclasses.field(default_factory=dict)
    ends: dict[str, int] = dataclasses.field(default_factory=dict)

    def of(self, tensor: ir.TensorProtocol) -> tuple[str, int]:
        """File and offset of a tensor."""
        file = file_of(tensor)
        key = (file, *key_of(tensor))
        if key not in self.found:
            alignment = PAGE if tensor.nbytes >= LARGE else LINE
            offset = -(-self.ends.get(file, 0) // alignment) * alignment
            self.found[key] = file, offset, tensor
            self.ends[file] = offset + tensor.nbytes
        return self.found[key][:2]


def file_of(tensor: ir.TensorProtocol) -> str:
    """The file that a graph names for a weight."""
    if isinstance(tensor, LazyWeight):
        return str(tensor.meta.get(DERIVED_FILE, WEIGHTS_NAME))
    location = str(tensor.location) if isinstance(tensor, ir.ExternalTensor) else WEIGHTS_NAME
    return location if location in DERIVED else WEIGHTS_NAME


def write_graphs(folder: Path, models: Mapping[str, ir.Model]) -> dict[str, FileRecord]:
    """Write the weights and graphs, by file name, into a folder. Returns the size and SHA-256 of each file.

    Raises:
        OSError: A file cannot be written.
    """
    places = Places()
    for model in models.values():
        for value in model.graph.initializers.values():
            if isinstance(value.const_value, LazyWeight | ir.ExternalTensor) and value.const_value.nbytes:
                places.of(value.const_value)
    records = {WEIGHTS_NAME: _write_weights(folder / WEIGHTS_NAME, places)}
    for name, model in models.items():
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if not isinstance(tensor, LazyWeight | ir.ExternalTensor):
                continue
            if not tensor.nbytes:
                value.const_value = ir.Tensor(tensor.numpy(), name=value.name)
                continue
            file, offset = places.of(tensor)
            value.const_value = ir.ExternalTensor(
                file, offset, tensor.nbytes, ir.DataType(tensor.dtype), shape=ir.Shape(tensor.shape),
                name=str(value.name), base_dir=str(folder),
            )  # fmt: skip
        ir.save(model, folder / name)
        records[name] = recorded(folder / name)
    return records


def recorded(path: Path) -> FileRecord:
    """The size and SHA-256 of a file. Raises OSError."""
    content = path.read_bytes()
    return FileRecord(len(content), hashlib.sha256(content).hexdigest())


def _write_weights(path: Path, places: Places) -> FileRecord:
    digest, end = hashlib.sha256(), 0
    with path.open("wb") as file:
        for name, offset, tensor in places.found.values():
            if name != WEIGHTS_NAME:
                continue
            content = stored(tensor.numpy()).tobytes() if isinstance(tensor, LazyWeight) else tensor.tobytes()
            for data in (bytes(offset - end), content):
                file.write(data)
                digest.update(data)
            end = offset + tensor.nbytes
    return FileRecord(end, digest.hexdigest())
