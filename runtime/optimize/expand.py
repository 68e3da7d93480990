"""Makes int8 weights with a scale per output of those in blocks, 4 bits or 8, that a bundle stores."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from satchel.runtime.bundle.manifest import MANIFEST_NAME
from satchel.runtime.bundle.onnx_wire import Tensor, external_tensors
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import BundleError
from satchel.runtime.optimize.stored import Stored

EXPANDED_NAME = "int8.bin"
"""The file in which the prefill_int8 graph says that its weights are; no bundle has it."""

CODES, SCALES = ".int8", ".int8_scales"
"""Ends of the names of what is made."""

LEVELS = 127
SMALLEST_RANGE = np.float32(1e-10)
VALUES_AT_ONCE = 1 << 22
"""Weights that are in float32 at a time."""


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
                source = Stored.of(stored, name)
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
