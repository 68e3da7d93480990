"""compressed-tensors: packed or plain integers and floats, by groups of layers in the config.

Source: the compressors of vllm-project/compressed-tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from satchel.export.checkpoint.quantized.floats import fp4_weight, scaled_fp8
from satchel.export.checkpoint.quantized.grids import Affine, Layer, Settings, affine_weight, unpacked
from satchel.export.errors import ExportError
from satchel.graphs.ir.weights import LazyWeight

BITS = (4, 8)
FORMATS = (
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mixed-precision", "dense",
)  # fmt: skip
ONLINE = ("input", "output", "q_attn", "k_cache")
"""Places of transforms that run with the model, rather than in its weights."""


def check_compressed(settings: Settings, place: str) -> None:
    """Refuse formats and number forms that the reader does not know.

    Raises:
        ExportError: There is one.
    """
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise ExportError(f"{place}: compressed-tensors without config_groups; download the config again")
    for stored in (settings.get("format", "dense"), *(g["format"] for g in groups.values() if g.get("format"))):
        if stored not in FORMATS:
            raise ExportError(
                f"{place}: compressed-tensors format {stored!r} is not supported: use {', '.join(FORMATS)}"
            )
    sparsity = settings.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        raise ExportError(f"{place}: sparse weights ({sparsity['format']}) are not supported: save them dense")
    for scheme in ((settings.get("transform_config") or {}).get("config_groups") or {}).values():
        places = {str(apply.get("location")) for apply in scheme.get("apply", ())}
        if places & set(ONLINE):
            raise ExportError(
                f"{place}: transforms of activations are not supported: export the original float checkpoint"
            )
    for group in groups.values():
        weights = group.get("weights") or {}
        if weights.get("type", "int") == "int" and weights.get("num_bits", 8) not in BITS:
            raise ExportError(
                f"{place}: integer weights of {weights['num_bits']!r} bits have no kernel: use a checkpoint of 4 or 8 "
                "bits, or the original float one"
            )


def read_compressed(layers: Mapping[str, Layer], settings: Settings) -> dict[str, LazyWeight]:
    """Return the weight of each layer, by the layer's name, [outputs, inputs] float32."""
    return {name: _read(layer, _group(layer, settings), settings) for name, layer in layers.items()}


def follows_activations(group: Mapping[str, Any]) -> bool:
    """Whether the inputs of a group's layers are rounded to int8, token by token, by scales found as the model runs.

    Only weights of 8 bits with one symmetric scale for each output have a kernel for that.
    """
    activations, weights = group.get("input_activations") or {}, group.get("weights") or {}
    return (
        activations.get("type", "int") == "int"
        and activations.get("num_bits") == 8
        and bool(activations.get("dynamic"))
        and weights.get("type", "int") == "int"
        and weights.get("num_bits", 8) == 8
        and weights.get("strategy") in ("channel", "tensor")
        and bool(weights.get("symmetric", True))
    )


def _group(layer: Layer, settings: Settings) -> dict[str, Any]:
    """The group that a layer belongs to: named, or by a pattern, or by its class."""
    name, groups = layer.name, list(settings["config_groups"].values())
    ways: tuple[Callable[[str], bool], ...] = (
        lambda target: target == name,
        lambda target: target.startswith("re:") and re.match(target[3:], name) is not None,
        lambda target: not target.startswith("re:") and "." not in target,
    )
    for fits in ways:
        for group in groups:
            if any(fits(str(target)) for target in group.get("targets") or ()):
                return dict(group)
    raise layer.error(f"{layer.name} is quantized, but belongs to none of config_groups; download the config again")


def _read(layer: Layer, group: Mapping[str, Any], settings: Settings) -> LazyWeight:
    scheme = group.get("weights") or {}
    if scheme.get("type", "int") == "float":
        if int(scheme.get("num_bits", 8)) == 4:
            return _fp4(layer, scheme)
        block = scheme.get("block_structure")
        sizes = (int(block[0]), int(block[1])) if isinstance(block, list) else None
        return scaled_fp8(layer, layer.get("weight", "f", (None, None)), layer.get("weight_scale", "fu"), sizes)
    bits = int(scheme.get("num_bits", 8))
    packed = layer.find("weight_packed")
    if packed is not None:
        words = layer.get("weight_packed", "i", (None, None))
        outputs, inputs = (int(n) for n in layer.get("weight_shape", "iu", (2,)).numpy())
        layer.get("weight_packed", "i", (outputs, -(-inputs * bits // 32)))

        def codes(start: int, stop: int) -> NDArray[np.uint8]:
            return unpacked(words.rows(start, stop), bits, 1)[:, :inputs]
    else:
        plain = layer.get("weight", "i", (None, None))
        outputs, inputs = plain.dims

        def codes(start: int, stop: int) -> NDArray[np.uint8]:
            return (plain.rows(start, stop).astype(np.int16) + (1 << bits - 1)).astype(np.uint8)

    scales = _scales(layer, scheme, outputs, inputs)
    zeros = _zero_points(layer, scheme, bits, scales.shape)
    return affine_weight(
        f"{layer.name}.weight",
        Affine(
            bits, inputs, codes, scales, zeros, _group_of(layer, inputs, scales.shape[1]),
            token_activations=follows_activations(group),
        ),
    )  # fmt: skip


def _scales(layer: Layer, scheme: Mapping[str, Any], outputs: int, inputs: int) -> NDArray[np.float32]:
    """The scales [outputs, groups]; those of the strategy "tensor" are repeated."""
    strategy = scheme.get("strategy") or "tensor"
    size = int(scheme.get("group_size") or 0)
    if strategy == "tensor":
        values = layer.get("weight_scale", "f").numpy()
        if values.size != 1:
            raise layer.error(f"{layer.name}.weight_scale has {values.size} scales, where the config says one")
        return np.full((outputs, 1), np.float32(values.reshape(-1)[0]))
    if strategy not in ("channel", "group") or (strategy == "group" and size < 1):
        raise layer.error(f"weights with strategy {strategy!r} and group_size {size} are not supported")
    groups = 1 if strategy == "channel" else -(-inputs // size)
    return np.ascontiguousarray(layer.get("weight_scale", "f", (outputs, groups)).numpy())


def _zero_points(layer: Layer, scheme: Mapping[str, Any], bits: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """The zero points [outputs, groups] of unsigned values; the middle of the range where weights are symmetric.

    They are packed along the outputs, or plain in files of earlier versions.
    """
    middle, (outputs, groups) = 1 << bits - 1, shape
    if scheme.get("symmetric", True):
        return np.full(shape, middle, np.uint8)
    found = layer.get("weight_zero_point", "if")
    if found.dims == shape or scheme.get("strategy") == "tensor":
        return np.broadcast_to((found.numpy().astype(np.int16) + middle).astype(np.uint8), shape)
    words = layer.get("weight_zero_point", "i", (-(-outputs * bits // 32), groups)).numpy()
    return np.ascontiguousarray(unpacked(words, bits, 0)[:outputs])


def _group_of(layer: Layer, inputs: int, groups: int) -> NDArray[np.int64] | None:
    found = layer.find("weight_g_idx")
    if found is None:
        return None
    group_of = layer.get("weight_g_idx", "i", (inputs,)).numpy().astype(np.int64)
    if group_of.size and group_of.min() < 0:  # never set
        return None
    if group_of.size and group_of.max() >= groups:
        raise layer.error(f"{layer.name}.weight_g_idx names groups that its scales do not have")
    return group_of


def _fp4(layer: Layer, scheme: Mapping[str, Any]) -> LazyWeight:
    """NVFP4 (scales in 8-bit floats over one scale for all) and MXFP4 (scales that are powers of two)."""
    packed = layer.get("weight_packed", "u", (None, None))
    size = int(scheme.get("group_size") or 0)
    if size < 1 or 2 * packed.dims[1] % size:
        raise layer.error(f"{layer.name}: group_size {size} does not divide its {2 * packed.dims[1]} inputs")
    stored = layer.get("weight_scale", "fu", (packed.dims[0], 2 * packed.dims[1] // size)).numpy()
    if layer.find("weight_global_scale") is None:
        exponents = stored.view(np.uint8).astype(np.int32) - 127
        scales = np.ldexp(np.float32(1), exponents)
    else:
        whole = layer.get("weight_global_scale", "f", (1,)).numpy().astype(np.float32)
        scales = stored.astype(np.float32) / whole[0]
    return fp4_weight(f"{layer.name}.weight", packed, scales.astype(np.float32))
