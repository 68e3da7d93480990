"""GPTQ and AWQ: int32 words of four- or eight-bit values, along the inputs (GPTQ) or the outputs (AWQ).

Source: the layouts of AutoGPTQ and GPTQModel (`qlinear`), and of AutoAWQ (`packing_utils`, format GEMM).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from satchel.export.checkpoint.quantized.grids import Affine, Layer, Settings, affine_weight, unpacked
from satchel.export.errors import ExportError
from satchel.graphs.ir.weights import LazyWeight

BITS = (4, 8)
GPTQ_FORMATS = ("gptq", "gptq_v2")
AWQ_FORMATS = ("gemm",)

_AWQ_PLACES = {4: [0, 4, 1, 5, 2, 6, 3, 7], 8: [0, 2, 1, 3]}
"""Which value of a word belongs to each of its outputs, in order."""

_ONES = {4: 0x11111111, 8: 0x01010101}
"""One in each value of a word."""


def check_gptq(settings: Settings, place: str) -> None:
    """Refuse settings that the reader does not know.

    Raises:
        ExportError: The format or the number of bits is another one.
    """
    stored = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    _check(str(stored).lower(), GPTQ_FORMATS, settings.get("bits"), place, "GPTQ")


def check_awq(settings: Settings, place: str) -> None:
    """The same for AWQ."""
    stored = settings.get("version") or settings.get("format") or "gemm"
    _check(str(stored).lower(), AWQ_FORMATS, _bits(settings), place, "AWQ")


def read_gptq(layers: Mapping[str, Layer], settings: Settings) -> dict[str, LazyWeight]:
    """Return the weight of each layer, by the layer's name, [outputs, inputs] float32."""
    stored = str(settings.get("checkpoint_format") or settings.get("format") or "gptq").lower()
    return {name: _gptq(layer, settings, stored == "gptq") for name, layer in layers.items()}


def read_awq(layers: Mapping[str, Layer], settings: Settings) -> dict[str, LazyWeight]:
    """The same for AWQ."""
    return {name: _awq(layer, settings) for name, layer in layers.items()}


def _check(stored: str, formats: tuple[str, ...], bits: object, place: str, method: str) -> None:
    if stored not in formats:
        raise ExportError(
            f"{place}: {method} weights in format {stored!r} are not supported: save them as {' or '.join(formats)}"
        )
    if bits not in BITS:
        raise ExportError(
            f"{place}: {method} weights of {bits!r} bits have no kernel: use a checkpoint of 4 or 8 bits, or the "
            "original float one"
        )


def _bits(settings: Settings) -> object:
    return settings.get("bits", settings.get("w_bit"))


def _gptq(layer: Layer, settings: Settings, first_version: bool) -> LazyWeight:
    """qweight [inputs * bits / 32, outputs], qzeros [groups, outputs * bits / 32], scales [groups, outputs], and
    g_idx [inputs], the group of each input.

    The first version of the format stores zero points minus 1.
    """
    words = layer.get("qweight", "i", (None, None))
    found = layer.find("g_idx")
    bits = int(settings["bits"])
    if settings.get("dynamic") and found is not None:  # bits of its own, which the shapes show
        bits = 32 * words.dims[0] // max(1, found.dims[0])
        if bits not in BITS:
            raise layer.error(f"{layer.name} has {bits} bits, which have no kernel; use a checkpoint of 4 or 8 bits")
    inputs, outputs = 32 * words.dims[0] // bits, words.dims[1]
    groups = _groups(layer, inputs, settings)
    scales = layer.get("scales", "f", (groups, outputs))
    groups = scales.dims[0]
    zeros = layer.get("qzeros", "i", (groups, -(-outputs * bits // 32))).numpy()
    if first_version:
        zeros = (zeros.view(np.uint32) + np.uint32(_ONES[bits])).view(np.int32)
    group_of = _group_of(layer, inputs, groups) if found is not None else None
    return affine_weight(
        f"{layer.name}.weight",
        Affine(
            bits,
            inputs,
            lambda a, b: unpacked(words.columns(a, b), bits, 0).T,
            np.ascontiguousarray(scales.numpy().T),
            np.ascontiguousarray(unpacked(zeros, bits, 1)[:, :outputs].T),
            group_of,
        ),
    )


def _awq(layer: Layer, settings: Settings) -> LazyWeight:
    """qweight [inputs, outputs * bits / 32], qzeros [groups, outputs * bits / 32] and scales [groups, outputs]; the
    outputs of a word are interleaved."""
    bits = int(str(_bits(settings)))
    words = layer.get("qweight", "i", (None, None))
    inputs, each = words.dims[0], 32 // bits
    outputs = words.dims[1] * each
    scales = layer.get("scales", "f", (_groups(layer, inputs, settings), outputs))
    places = np.asarray(_AWQ_PLACES[bits])

    def in_order(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return np.ascontiguousarray(values.reshape(len(values), -1, each)[:, :, places].reshape(len(values), -1).T)

    def codes(start: int, stop: int) -> NDArray[np.uint8]:
        first = start // each
        part = in_order(unpacked(words.columns(first, -(-stop // each)), bits, 1))
        return part[start - first * each : stop - first * each]

    zeros: NDArray[np.uint8] = np.full((outputs, scales.dims[0]), 1 << bits - 1, np.uint8)
    if settings.get("zero_point", True) or layer.find("qzeros") is not None:
        zeros = in_order(unpacked(layer.get("qzeros", "i", (scales.dims[0], words.dims[1])).numpy(), bits, 1))
    return affine_weight(
        f"{layer.name}.weight", Affine(bits, inputs, codes, np.ascontiguousarray(scales.numpy().T), zeros)
    )


def _groups(layer: Layer, inputs: int, settings: Settings) -> int | None:
    """The number of groups that the settings say; None where layers may have sizes of their own."""
    size = settings.get("group_size", settings.get("q_group_size"))
    if settings.get("dynamic"):
        return None
    if not isinstance(size, int) or size == 0 or size < -1:
        raise layer.error(f"group_size is {size!r}; a group has at least one input, and -1 is all of them")
    return 1 if size == -1 else -(-inputs // size)


def _group_of(layer: Layer, inputs: int, groups: int) -> NDArray[np.int64]:
    group_of = layer.get("g_idx", "i", (inputs,)).numpy().astype(np.int64)
    if group_of.size and (group_of.min() < -groups or group_of.max() >= groups):
        raise layer.error(f"{layer.name}.g_idx names groups that {layer.name}.scales does not have")
    return group_of % groups
