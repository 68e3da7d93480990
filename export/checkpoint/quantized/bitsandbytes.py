"""bitsandbytes: four-bit code books (nf4, fp4) with scales for blocks, and int8 with a scale for each output.

Source: bitsandbytes' `functional.QuantState`, `dequantize_4bit` and `int8_vectorwise_dequant`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from satchel.export.checkpoint.quantized.grids import Affine, Layer, Settings, affine_weight, lazy_weight
from satchel.graphs.ir.weights import LazyWeight
from satchel.graphs.quant.stored import WIDENED

STATE = "weight.quant_state.bitsandbytes__"
TYPES = ("nf4", "fp4")


def read_bitsandbytes(layers: Mapping[str, Layer], settings: Settings) -> dict[str, LazyWeight]:
    """Return the weight of each layer, by the layer's name, [outputs, inputs] float32."""
    return {
        name: _int8(layer) if layer.find("SCB") is not None else _four_bits(layer) for name, layer in layers.items()
    }


def _int8(layer: Layer) -> LazyWeight:
    """Rows of int8 with the largest magnitude of each."""
    weight = layer.get("weight", "i", (None, None))
    stored = layer.find("weight_format")
    if stored is not None and bool(np.any(stored.numpy())):
        raise layer.error(f"{layer.name}.weight is stored in tiles for one GPU, not in rows: save it again")
    largest = layer.get("SCB", "f", (weight.dims[0],)).numpy()
    scales = np.asarray(largest / np.float32(127), np.float32)[:, None]
    return affine_weight(f"{layer.name}.weight", Affine(8, weight.dims[1], weight.rows, scales))


def _four_bits(layer: Layer) -> LazyWeight:
    """Two values in a byte, the first in the high half; each is an entry of a code book times its block's scale."""
    kind = next((kind for kind in TYPES if layer.find(STATE + kind) is not None), None)
    if kind is None:
        raise layer.error(f"{layer.name} has no {STATE}nf4 or ...fp4: its quantization state is missing")
    state = _state(layer, kind)
    outputs, inputs = state["shape"]
    block, count = state["blocksize"], outputs * inputs
    data = layer.get("weight", "u").numpy().reshape(-1)
    book = layer.get("weight.quant_map", "f", (16,)).numpy()
    largest = _block_scales(layer, state, -(-count // block))
    if data.size != -(-count // 2):
        raise layer.error(f"{layer.name}.weight has {data.size} bytes, which are not {outputs} x {inputs} values")

    def rows(start: int, stop: int) -> NDArray[np.float32]:
        low, high = start * inputs, stop * inputs
        values = np.stack([data[low // 2 : -(-high // 2)] >> 4, data[low // 2 : -(-high // 2)] & 15], axis=1)
        first = low - low // 2 * 2
        codes = values.reshape(-1)[first : first + high - low]
        factors = largest[np.arange(low, high) // block]
        return np.asarray(book[codes] * factors, np.float32).reshape(stop - start, inputs)

    weight = lazy_weight(f"{layer.name}.weight", (outputs, inputs), rows)
    weight.meta[WIDENED] = f"no kernel reads {kind} code books"
    return weight


def _state(layer: Layer, kind: str) -> dict[str, Any]:
    """The numbers that bitsandbytes stores as JSON in a tensor.

    Raises:
        ExportError: They are damaged.
    """
    text = bytes(layer.get(STATE + kind, "u").numpy().astype(np.uint8))
    try:
        state = json.loads(text)
        outputs, inputs = (int(n) for n in state["shape"])
        state |= {"shape": (outputs, inputs), "blocksize": int(state["blocksize"])}
        sound = outputs > 0 and inputs > 0 and state["blocksize"] > 0
        if "nested_blocksize" in state:
            state |= {
                "nested_blocksize": int(state["nested_blocksize"]),
                "nested_offset": float(state["nested_offset"]),
            }
            sound = sound and state["nested_blocksize"] > 0
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise layer.error(f"{layer.name}.{STATE}{kind} is damaged; download the checkpoint again")
    return dict(state)


def _block_scales(layer: Layer, state: Mapping[str, Any], blocks: int) -> NDArray[np.float32]:
    """The scale of each block; with double quantization it is an 8-bit entry of a code book, scaled by block."""
    if "nested_blocksize" not in state:
        return np.asarray(layer.get("weight.absmax", "f", (blocks,)).numpy(), np.float32)
    codes = layer.get("weight.absmax", "u", (blocks,)).numpy()
    size = state["nested_blocksize"]
    largest = layer.get("weight.nested_absmax", "f", (-(-blocks // size),)).numpy()
    book = layer.get("weight.nested_quant_map", "f", (256,)).numpy()
    scales = book[codes] * largest[np.arange(blocks) // size] + np.float32(state["nested_offset"])
    return np.asarray(scales, np.float32)
