"""Reads safetensors files: the header at once, each tensor as a view of the memory-mapped file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from satchel.export.errors import ExportError
from satchel.graphs.ir.weights import LazyWeight, cast, from_array

_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_LENGTH_BYTES = 8


def read_safetensors(path: Path) -> dict[str, LazyWeight]:
    """Return the tensors of a safetensors file (https://github.com/huggingface/safetensors#format).

    Floating point tensors are converted to float32 after slicing; integers and 8-bit floats keep their dtype. Only the
    header is read: the values are views of the memory-mapped file.

    Raises:
        ExportError: If the file is cut short, its header is damaged, or a tensor has an unsupported dtype.
    """
    size = path.stat().st_size
    header, start = _read_header(path, size)
    data = np.memmap(path, dtype=np.uint8, mode="r")
    weights = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        weights[name] = _tensor(path, name, entry, data[start:])
    return weights


def _read_header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
            raise ExportError(f"{path}: cut short: the file ends inside its header; download it again")
        text = file.read(length)
    try:
        header = json.loads(text)
    except ValueError:
        raise ExportError(
            f"{path}: the header is not JSON, so this is not a safetensors file; download it again"
        ) from None
    if not isinstance(header, dict):
        raise ExportError(f"{path}: the header is not a JSON object; download the file again")
    return header, _LENGTH_BYTES + length


def _tensor(path: Path, name: str, entry: Any, data: np.ndarray) -> LazyWeight:
    try:
        stored, shape = entry["dtype"], [int(d) for d in entry["shape"]]
        begin, end = (int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise ExportError(f"{path}: the header's entry for {name} is damaged; download the file again") from None
    if stored not in _DTYPES:
        raise ExportError(
            f"{path}: tensor {name} has unsupported dtype {stored}; export from the original float checkpoint"
        )
    dtype = np.dtype(_DTYPES[stored])
    if not 0 <= begin <= end <= data.size:
        raise ExportError(
            f"{path}: cut short: tensor {name} ends at byte {end} of {data.size} bytes of data; download it again"
        )
    if min(shape, default=0) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise ExportError(f"{path}: tensor {name} has {end - begin} bytes, which does not match its shape {shape}")
    array = from_array(name, np.asarray(data[begin:end]).view(dtype).reshape(shape))
    if stored in ("F64", "F16", "BF16"):
        return cast(array, ir.DataType.FLOAT, name)
    return array
