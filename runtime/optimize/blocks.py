"""Makes int8 weights in blocks of inputs of those with a scale per output that a bundle stores: the same numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from satchel.runtime.bundle.manifest import MANIFEST_NAME
from satchel.runtime.bundle.onnx_wire import Tensor, external_tensors
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import BundleError
from satchel.runtime.optimize import stored as stored_parts

BLOCKS_NAME = "blocks.bin"
"""The file in which the decode_blocks graph says that its weights are; no bundle has it."""

CODES, SCALES = ".block_codes", ".block_scales"
"""Ends of the names of what is made."""

ZERO = 128
"""What MatMulNBits takes off each code: signed codes get it added."""

CODES_AT_ONCE = 1 << 22


def make_blocks(bundle: Bundle, path: Path) -> None:
    """Write the file that the bundle's decode_blocks graph reads its weights from.

    Codes [inputs, outputs] int8 become [outputs, blocks, block] uint8, with 128 added and 128 where the last block is
    longer than the inputs. The scale of an output is that of each of its blocks.

    Raises BundleError where the graphs do not belong together.
    """
    made = external_tensors(bundle.graph_path("decode_blocks").read_bytes())
    stored = external_tensors(bundle.graph_path("decode").read_bytes())
    names = [name.removesuffix(CODES) for name, t in made.items() if _made(t) and name.endswith(CODES)]
    with path.open("wb") as file:
        for name in names:
            try:
                source, source_scales = stored[name + stored_parts.CODES], stored[name + stored_parts.SCALES]
                codes, scales = made[name + CODES], made[name + SCALES]
                inputs, outputs = source.dims
                _, count, block = codes.dims
                columns = _mapped(bundle, source).view(np.int8).reshape(inputs, outputs)
                steps = _mapped(bundle, source_scales).view(np.float32).reshape(outputs, 1)
                if codes.dims != (outputs, -(-inputs // block), block) or scales.dims != (outputs, count):
                    raise ValueError(f"{codes.dims} and {scales.dims} for {source.dims}")
            except (KeyError, ValueError):
                raise BundleError(
                    f"{bundle.folder / MANIFEST_NAME}: graphs.decode_blocks has a weight {name} that decode has not: "
                    "export the bundle again"
                ) from None
            file.seek(int(codes.place["offset"]))
            rows = max(CODES_AT_ONCE // (count * block), 1)
            for start in range(0, outputs, rows):
                part = columns[:, start : start + rows].T
                whole = np.full((len(part), count * block), ZERO, np.uint8)
                whole[:, :inputs] = part.view(np.uint8) ^ ZERO  # as adding 128
                file.write(whole.data)
            file.seek(int(scales.place["offset"]))
            file.write(np.repeat(steps, count, axis=1).data)


def _made(tensor: Tensor) -> bool:
    return tensor.place.get("location") == BLOCKS_NAME


def _mapped(bundle: Bundle, tensor: Tensor) -> np.memmap[tuple[int], np.dtype[np.uint8]]:
    """The bytes of a tensor in a file of the bundle."""
    path, offset = bundle.path(tensor.place["location"]), int(tensor.place["offset"])
    return np.memmap(path, np.uint8, "r", offset, (int(tensor.place["length"]),))
