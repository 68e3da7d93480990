"""Eight- and four-bit floats with scales: FP8 of several writers, MXFP4 and NVFP4.

Source: transformers' `integrations/finegrained_fp8.py` and `integrations/mxfp4.py`, compressed-tensors' compressors.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from satchel.export.checkpoint.quantized.grids import Affine, Layer, Settings, affine_weight, lazy_weight
from satchel.export.errors import ExportError
from satchel.graphs.ir.weights import LazyWeight
from satchel.graphs.quant.stored import WIDENED

FP8_REASON = "no kernel reads 8-bit floats"

TWICE_FP4 = np.asarray([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
"""Twice the values of four-bit floats (e2m1), which are integers: 8 bits hold them exactly."""


def scaled_fp8(layer: Layer, weight: LazyWeight, scale: LazyWeight, block: tuple[int, int] | None) -> LazyWeight:
    """The float32 weight [.., outputs, inputs] of 8-bit floats times their scales.

    Args:
        layer: For errors.
        weight: The 8-bit floats.
        scale: One for all, one for each output ([outputs] or [outputs, 1]), or [.., blocks, blocks].
        block: Outputs and inputs of a block; None where there are no blocks.

    Raises:
        ExportError: The scales have another shape.
    """
    dims, values = weight.dims, scale.numpy().astype(np.float32)
    outputs, inputs = dims[-2:]
    if values.size == 1:
        values, block = values.reshape([1] * len(dims)), None
    elif values.size == np.prod(dims[:-1]) and (values.shape[-1] == 1 or values.shape == dims[:-1]):
        values, block = values.reshape(*dims[:-1], 1), None
    elif block is None or values.shape != (*dims[:-2], -(-outputs // block[0]), -(-inputs // block[1])):
        raise layer.error(
            f"{scale.name} has shape {list(values.shape)}, which does not fit {list(dims)} in blocks of "
            f"{list(block) if block else 'one output'}; download the checkpoint again"
        )

    def rows(start: int, stop: int) -> NDArray[np.float32]:
        part = weight.rows(start, stop).astype(np.float32)
        if block is None:
            part *= values if values.shape[0] == 1 else values[start:stop]
            return part
        whole = len(dims) > 2
        index = slice(None) if whole else np.arange(start, stop) // block[0]
        factors = values[start:stop] if whole else values[index]
        if whole:
            factors = factors.repeat(block[0], axis=-2)[..., :outputs, :]
        part *= factors.repeat(block[1], axis=-1)[..., :inputs]
        return part

    found = lazy_weight(weight.name, dims, rows)
    found.meta[WIDENED] = FP8_REASON
    return found


def read_fp8(layers: Mapping[str, Layer], settings: Settings) -> dict[str, LazyWeight]:
    """Return the weights of layers in 8-bit floats by the layers' names, [.., outputs, inputs] float32."""
    block = settings.get("weight_block_size")
    sizes = (int(block[0]), int(block[1])) if isinstance(block, list) and len(block) == 2 and min(block) > 0 else None
    made = {}
    for name, layer in layers.items():
        weight = layer.get("weight", "f", (None, None))
        scale = layer.find("weight_scale_inv") or layer.get("weight_scale", "fu")
        made[name] = scaled_fp8(layer, weight, scale, sizes)
    return made


def check_fp8(settings: Settings, place: str) -> None:
    """Refuse what is no 8-bit float.

    Raises:
        ExportError: The experts are stored in another form, or the algorithm is another one.
    """
    for key, known in (("expert_dtype", "fp8"), ("quant_algo", "FP8")):
        if settings.get(key, known) not in (known, known.upper()):
            raise ExportError(f"{place}: {key} {settings[key]!r} is not supported: only {known} is")


def read_mxfp4(layers: Mapping[str, Layer], settings: Settings) -> dict[str, LazyWeight]:
    """Return stacks of experts as gpt-oss stores them, [experts, inputs, outputs] float32.

    `_blocks` [experts, outputs, groups, 16] holds two values in a byte, the first in the low half; `_scales` [experts,
    outputs, groups] are powers of two plus 127.
    """
    made = {}
    for name, layer in layers.items():
        blocks = layer.get("blocks", "u", (None, None, None, 16))
        scales = layer.get("scales", "u", blocks.dims[:3])
        made[name] = _experts(name, blocks, scales)
    return made


def _experts(name: str, blocks: LazyWeight, scales: LazyWeight) -> LazyWeight:
    experts, outputs, groups, _ = blocks.dims

    def rows(start: int, stop: int) -> NDArray[np.float32]:
        values = twice_fp4(blocks.rows(start, stop)).astype(np.float32)
        exponents = scales.rows(start, stop).astype(np.int32)[..., None] - 128
        whole = np.ldexp(values, exponents).reshape(stop - start, outputs, groups * 32)
        return np.ascontiguousarray(whole.swapaxes(1, 2))

    made = lazy_weight(name, (experts, groups * 32, outputs), rows)
    made.meta[WIDENED] = "stacks of experts in four-bit floats are not kept"
    return made


def fp4_weight(name: str, packed: LazyWeight, scales: NDArray[np.float32]) -> LazyWeight:
    """A weight [outputs, inputs] of four-bit floats, two in a byte [outputs, inputs / 2], with scales by group."""

    def codes(start: int, stop: int) -> NDArray[np.int8]:
        return twice_fp4(packed.rows(start, stop))

    return affine_weight(name, Affine(8, 2 * packed.dims[1], codes, scales * np.float32(0.5)))


def twice_fp4(packed: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Twice the values of bytes [.., n] of four-bit floats, [.., 2 n]."""
    pairs = np.stack([packed & 15, packed >> 4], axis=-1)
    return TWICE_FP4[pairs].reshape(*packed.shape[:-1], -1)
