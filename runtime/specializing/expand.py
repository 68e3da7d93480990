"""Makes int8 weights with a scale per output of those in blocks, 4 bits or 8, that a bundle stores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.bundle import Bundle
from satchel.runtime.errors import BundleError
from satchel.runtime.manifest import MANIFEST_NAME
from satchel.runtime.onnx_wire import Tensor, external_tensors

EXPANDED_NAME = "int8.bin"
"""The file in which the prefill_int8 graph says that its weights are; no bundle has it."""

CODES, SCALES = ".int8", ".int8_scales"
STORED_CODES, STORED_SCALES, STORED_ZERO_POINTS = ".codes", ".scales", ".zero_points"
"""Ends of the names of what is made, and of what it is made of."""

# numbers of TensorProto.DataType -> bits, and whether codes are signed.
CODE_TYPES = {2: (8, False), 3: (8, True), 21: (4, False), 22: (4, True)}

LEVELS = 127
SMALLEST_RANGE = np.float32(1e-10)
VALUES_AT_ONCE = 1 << 22
"""Weights that are in float32 at a time."""


@dataclass(frozen=True)
class _Stored:
    """Codes [inputs, outputs] in blocks of inputs, scales and zero points [blocks, outputs], mapped from a file."""

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None

    def values(self, content: NDArray[np.uint8], start: int, stop: int) -> NDArray[np.float32]:
        """What the codes of the outputs from `start` to `stop`, both even, stand for: [inputs, outputs] float32."""
        steps = _numbers(content, self.codes, start, stop)
        scales = _numbers(content, self.scales, start, stop)
        block = len(steps) // len(scales)
        if self.zero_points is not None:
            steps -= np.repeat(_numbers(content, self.zero_points, start, stop), block, axis=0)
        steps *= np.repeat(scales, block, axis=0)
        return steps


def expand_weights(bundle: Bundle, path: Path) -> None:
    """Write the file that the bundle's prefill_int8 graph reads its int8 weights from.

    A weight is the nearest multiple of its output's scale, which is the output's largest magnitude / 127. Both are
    worked out in float32, a few outputs at a time.

    Raises BundleError where the graphs do not belong together.
    """
    made = external_tensors(bundle.graph_path("prefill_int8").read_bytes())
    stored = external_tensors(bundle.graph_path("prefill").read_bytes())
    names = [name.removesuffix(CODES) for name, t in made.items() if _expanded(t) and name.endswith(CODES)]
    with path.open("wb") as file:
        for name in names:
            try:
                source = _Stored(
                    stored[name + STORED_CODES], stored[name + STORED_SCALES], stored.get(name + STORED_ZERO_POINTS)
                )
                codes, scales = made[name + CODES], made[name + SCALES]
                location = source.codes.place["location"]
                rows, columns = source.codes.dims
            except (KeyError, ValueError):
                raise BundleError(
                    f"{bundle.folder / MANIFEST_NAME}: graphs.prefill_int8 has a weight {name} that prefill has not: "
                    "export the bundle again"
                ) from None
            step = max(VALUES_AT_ONCE // rows // 2 * 2, 2)
            content = np.memmap(bundle.path(location), np.uint8, "r")
            whole, scale = np.empty((rows, columns), np.int8), np.empty(columns, np.float32)
            for start in range(0, columns, step):
                part = slice(start, min(start + step, columns))
                values = source.values(content, part.start, part.stop)
                scale[part] = np.maximum(np.abs(values).max(axis=0), SMALLEST_RANGE) / np.float32(LEVELS)
                whole[:, part] = np.rint(values / scale[part])
            for tensor, data in ((codes, whole.data), (scales, scale.data)):
                file.seek(int(tensor.place["offset"]))
                file.write(data)


def _expanded(tensor: Tensor) -> bool:
    return tensor.place.get("location") == EXPANDED_NAME


def _numbers(content: NDArray[np.uint8], tensor: Tensor, start: int, stop: int) -> NDArray[np.float32]:
    """Columns `start` to `stop` of a tensor [rows, columns], or of one row, as float32."""
    columns = tensor.dims[-1]
    offset, length = int(tensor.place["offset"]), int(tensor.place["length"])
    raw = content[offset : offset + length]
    if tensor.dtype not in CODE_TYPES:
        return np.array(raw.view(np.float32).reshape(-1, columns)[:, start:stop])
    bits, signed = CODE_TYPES[tensor.dtype]
    if bits == 8:
        codes = raw.view(np.int8 if signed else np.uint8).reshape(-1, columns)[:, start:stop]
        return codes.astype(np.float32)
    if columns % 2:  # rows begin in the middle of a byte
        return _nibbles(raw, signed)[: int(np.prod(tensor.dims))].reshape(-1, columns)[:, start:stop]
    return _nibbles(raw.reshape(-1, columns // 2)[:, start // 2 : stop // 2], signed).reshape(-1, stop - start)


def _nibbles(raw: NDArray[np.uint8], signed: bool) -> NDArray[np.float32]:
    """Two numbers of a byte, the low half first."""
    halves = np.stack((raw & 15, raw >> 4), axis=-1).astype(np.int8).ravel()
    return ((halves ^ 8) - 8 if signed else halves).astype(np.float32)
