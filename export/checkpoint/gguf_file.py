"""Reads GGUF files: metadata and the tensor table at once, and the rows of each tensor on demand, dequantized.

The format is https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The file is parsed only once, since parsing the
tens of thousands of strings of a vocabulary takes time.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx_ir as ir

from satchel.export.checkpoint.gguf_blocks import mark_blocks
from satchel.export.errors import ExportError
from satchel.graphs.ir.weights import LazyWeight

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
_MAX_ELEMENTS = 1 << 24
"""Numbers in one array of the metadata; the largest that a model needs are the scores of its tokens."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufFile:
    """The content of a GGUF file, or of all parts of a split one.

    Attributes:
        path: The path of the file, or of its first part.
        metadata: All keys and values: numbers, booleans, strings, or lists of them.
        tensors: All tensors by name, float32, with dimensions in numpy order.
        types: The storage type of each tensor.
        stored_bytes: Total bytes of the tensors in the file.
        parts: The files that were read.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, LazyWeight]
    types: Mapping[str, gguf.GGMLQuantizationType]
    stored_bytes: int
    parts: tuple[Path, ...]


def read_gguf(path: Path) -> GgufFile:
    """Read one GGUF file except for the values of its tensors, which stay memory-mapped.

    Raises:
        ExportError: If it is not a GGUF file, is cut short, has an unsupported version, has tensors of a type that the
            gguf library cannot dequantize, or says something about itself that cannot be.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ExportError(f"{path}: not a GGUF file; pass a .gguf file or a checkpoint folder")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    cursor = _Cursor(path, mapped, len(_MAGIC))
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise ExportError(
            f"{path}: GGUF version {version}; satchel reads versions 2 and 3 (little-endian): convert it again"
        )
    tensor_count, key_count = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.name()
        if key in metadata:
            raise _damaged(path, f"has the key {key[:80]} twice")
        metadata[key] = cursor.value(cursor.number("I"))
    entries = [cursor.tensor() for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise _damaged(path, f"has general.alignment {alignment!r}, which is not a power of 2")
    start = -(-cursor.position // alignment) * alignment

    data = np.frombuffer(mapped, dtype=np.uint8)
    tensors: dict[str, LazyWeight] = {}
    for entry in entries:
        begin = start + entry.offset
        if entry.name in tensors:
            raise _damaged(path, f"has the tensor {entry.name[:80]} twice")
        if entry.offset % alignment:
            raise _damaged(
                path, f"has tensor {entry.name[:80]} at offset {entry.offset}, not a multiple of {alignment}"
            )
        if begin + entry.nbytes > size:
            raise ExportError(
                f"{path}: cut short: tensor {entry.name[:80]} ends beyond the file's {size} bytes; download it again"
            )
        tensors[entry.name] = dequantized(entry.name, entry.shape, entry.type, data[begin : begin + entry.nbytes])
    types = {entry.name: entry.type for entry in entries}
    return GgufFile(path, metadata, tensors, types, sum(entry.nbytes for entry in entries), (path,))


def _damaged(path: Path, what: str) -> ExportError:
    return ExportError(f"{path}: the file is damaged: it {what}; download it again")


def dequantized(
    name: str, shape: tuple[int, ...], quantization: gguf.GGMLQuantizationType, data: np.ndarray
) -> LazyWeight:
    """Return a weight over the bytes of a tensor; only the requested blocks, along the last axis, are dequantized.

    It is marked with the grid that its blocks lie on, or with the reason that no kernel reads them.

    Args:
        name: The tensor's name.
        shape: Its shape, in numpy order.
        quantization: Its storage type.
        data: Its bytes, uint8, one-dimensional.
    """
    block, block_bytes = gguf.GGML_QUANT_SIZES[quantization]
    if len(shape) < 2:
        # A vector is one row of blocks, so its rows are the columns of a one-row matrix.
        vector = dequantized(name, (1, math.prod(shape)), quantization, data)
        return LazyWeight(name, shape, ir.DataType.FLOAT, lambda a, b: vector.columns(a, b)[0])
    stored = data.reshape(*shape[:-1], shape[-1] // block * block_bytes)

    def rows(start: int, stop: int) -> np.ndarray:
        return _dequantize(stored[start:stop], quantization)

    def columns(start: int, stop: int) -> np.ndarray:
        if len(shape) > 2:
            return _dequantize(stored[:, start:stop], quantization)
        low, high = start // block, -(-stop // block)
        values = _dequantize(stored[:, low * block_bytes : high * block_bytes], quantization)
        return values[:, start - low * block : stop - low * block]

    weight = LazyWeight(name, shape, ir.DataType.FLOAT, rows, columns)
    mark_blocks(weight, quantization, stored)
    return weight


def _dequantize(stored: np.ndarray, quantization: gguf.GGMLQuantizationType) -> np.ndarray:
    if quantization == gguf.GGMLQuantizationType.F32:
        return np.ascontiguousarray(stored).view(np.float32)
    if quantization == gguf.GGMLQuantizationType.F16:
        return np.ascontiguousarray(stored).view(np.float16).astype(np.float32)
    return gguf.quants.dequantize(np.ascontiguousarray(stored), quantization)


@dataclass(frozen=True)
class _Entry:
    name: str
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    offset: int
    nbytes: int


class _Cursor:
    """A read position in the mapped file; every read is bounds-checked."""

    def __init__(self, path: Path, mapped: mmap.mmap, position: int) -> None:
        self.position = position
        self._path, self._mapped = path, mapped

    def take(self, length: int) -> bytes:
        end = self.position + length
        if end > len(self._mapped):
            raise ExportError(f"{self._path}: cut short: the file ends inside its metadata; download it again")
        taken = self._mapped[self.position : end]
        self.position = end
        return taken

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", errors="replace")

    def name(self) -> str:
        """Read the name of a key or tensor, as it can stand in a message."""
        found = self.text()
        if not found.isprintable():
            raise _damaged(self._path, f"has the name {found[:40]!r}")
        return found

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise _damaged(self._path, f"has metadata of unknown type {kind}")
        kind, count = self.number("I"), self.number("Q")
        if kind == _ARRAY:
            raise _damaged(self._path, "has an array of arrays")
        if count > _MAX_ELEMENTS:
            raise _damaged(self._path, f"has an array of {count} elements")
        if kind in _SCALARS:
            code = f"<{count}{_SCALARS[kind]}"
            return list(struct.unpack(code, self.take(count * struct.calcsize("<" + _SCALARS[kind]))))
        return [self.value(kind) for _ in range(count)]

    def tensor(self) -> _Entry:
        name, dimensions = self.name(), self.number("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise _damaged(self._path, f"has tensor {name[:80]} with {dimensions} dimensions")
        shape = tuple(reversed([self.number("Q") for _ in range(dimensions)]))
        if 0 in shape:
            raise _damaged(self._path, f"has tensor {name[:80]} with a dimension of 0")
        kind, offset = self.number("I"), self.number("Q")
        try:
            quantization = gguf.GGMLQuantizationType(kind)
            block, block_bytes = gguf.GGML_QUANT_SIZES[quantization]
            _dequantize(np.zeros(block_bytes, np.uint8), quantization)
        except (ValueError, KeyError, NotImplementedError):
            raise ExportError(
                f"{self._path}: tensor {name[:80]} has type {_type_name(kind)}, which the gguf library cannot "
                "dequantize; export a file of another type"
            ) from None
        if shape and shape[-1] % block:
            raise ExportError(
                f"{self._path}: tensor {name[:80]} has rows of {shape[-1]}, but its type needs multiples of {block}"
            )
        return _Entry(name, shape, quantization, offset, math.prod(shape) // block * block_bytes)


def _type_name(kind: int) -> str:
    names = {t.value: t.name for t in gguf.GGMLQuantizationType}
    return names.get(kind, str(kind))
