"""The quantized formats that satchel reads, as data; which one a checkpoint has, and its tensors in float32."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from satchel.export.checkpoint.companions import read_json
from satchel.export.checkpoint.quantized.bitsandbytes import read_bitsandbytes
from satchel.export.checkpoint.quantized.compressed import check_compressed, follows_activations, read_compressed
from satchel.export.checkpoint.quantized.floats import check_fp8, read_fp8, read_mxfp4
from satchel.export.checkpoint.quantized.gptq import check_awq, check_gptq, read_awq, read_gptq
from satchel.export.checkpoint.quantized.grids import Layer, Settings
from satchel.export.errors import ExportError
from satchel.graphs.ir.weights import LazyWeight, transposed
from satchel.graphs.quant.stored import GRID, WIDENED

Read = Callable[[Mapping[str, Layer], Settings], dict[str, LazyWeight]]


@dataclasses.dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        marks: A layer is quantized if it has a tensor of one of these suffixes.
        suffixes: All suffixes of a quantized layer's tensors, which the float weight takes the place of.
        read: From the layers to their weights.
        check: Refuses settings before any tensor is read.
        keeps: Whether kernels read its values as they are.
        ending: What follows a layer's name in that of its weight, and `joint` what stands before a suffix.
    """

    marks: tuple[str, ...]
    suffixes: tuple[str, ...]
    read: Read
    check: Callable[[Settings, str], None] = lambda settings, place: None
    keeps: bool = True
    ending: str = ".weight"
    joint: str = "."


_GPTQ = ("qweight", "qzeros", "scales", "g_idx")
_COMPRESSED = (
    "weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx",
    "weight_global_scale", "input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point",
)  # fmt: skip
_FP8 = Format(
    ("weight_scale_inv", "weight_scale"),
    ("weight", "weight_scale_inv", "weight_scale", "activation_scale", "input_scale", "input_scale_ub"),
    read_fp8, check_fp8, keeps=False,
)  # fmt: skip
_BITSANDBYTES = Format(
    ("SCB", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4",
     "weight.quant_state.bitsandbytes__fp4"),
    ("weight", "SCB", "weight_format", "weight.absmax", "weight.quant_map", "weight.nested_absmax",
     "weight.nested_quant_map", "weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4"),
    read_bitsandbytes,
)  # fmt: skip

FORMATS: Mapping[str, Format] = {
    "gptq": Format(("qweight",), _GPTQ, read_gptq, check_gptq),
    "awq": Format(("qweight",), _GPTQ, read_awq, check_awq),
    "compressed-tensors": Format(("weight_packed", "weight_scale"), _COMPRESSED, read_compressed, check_compressed),
    "fp8": _FP8,
    "fbgemm_fp8": _FP8,
    "modelopt": _FP8,
    "mxfp4": Format(("blocks",), ("blocks", "scales"), read_mxfp4, keeps=False, ending="", joint="_"),
    "bitsandbytes": _BITSANDBYTES,
}
"""By the `quant_method` of the config."""

_PACKINGS = {"auto_round:auto_gptq": "gptq", "auto_round:auto_awq": "awq"}
"""AutoRound writes the layouts of others."""

_OLDER = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files in which AutoGPTQ and AutoAWQ once wrote their settings."""


def settings_of(folder: Path, table: Mapping[str, Any]) -> dict[str, Any] | None:
    """The quantization settings of a checkpoint folder, with the `quant_method` of the layout; None without any.

    Args:
        folder: The checkpoint.
        table: Its config.json.

    Raises:
        ExportError: The method is one that satchel does not read, or a setting is.
    """
    found = table.get("quantization_config") or table.get("compression_config")
    place = folder / "config.json"
    if not found:
        place = next((folder / name for name in _OLDER if (folder / name).is_file()), place)
        found = read_json(place) | {"quant_method": _OLDER[place.name]} if place.name in _OLDER else None
    if not found:
        return None
    method = found.get("quant_method", "an unnamed method") if isinstance(found, dict) else found
    if method == "auto-round" and isinstance(found, dict):
        method = _PACKINGS.get(str(found.get("packing_format")), method)
    if not isinstance(found, dict) or method not in FORMATS:
        raise ExportError(
            f"{place}: the weights are quantized by {method}, which satchel does not read (it reads "
            f"{', '.join(FORMATS)}): export from the original float checkpoint"
        )
    FORMATS[method].check(found, str(place))
    return dict(found) | {"quant_method": method}


def read_quantized(stored: Mapping[str, LazyWeight], settings: Settings | None, source: str) -> dict[str, LazyWeight]:
    """Return the tensors of a checkpoint with one float32 weight in place of the tensors of each quantized layer.

    The weights are marked with the grid on which they lie, `GRID`, or with the reason that no kernel reads it,
    `WIDENED`. Nothing is read of them before they are asked for, but scales and zero points.

    Raises:
        ExportError: Tensors are missing, or of another shape or type than the settings say.
    """
    if settings is None:
        _check_floats(stored, source)
        return dict(stored)
    method = str(settings["quant_method"])
    form = FORMATS[method]
    names = {
        name.removesuffix(form.joint + mark)
        for name in stored
        for mark in form.marks
        if name.endswith(form.joint + mark)
    }
    if not names:
        raise ExportError(
            f"{source}: the config says {method}, but no tensor is called ...{form.joint}{form.marks[0]}: "
            "use the config that belongs to these weights"
        )
    _check_activations(stored, source)
    layers = {name: Layer(name, stored, source, form.joint) for name in sorted(names)}
    weights = form.read(layers, settings)
    taken = {f"{name}{form.joint}{suffix}" for name in names for suffix in form.suffixes}
    rest = {name: weight for name, weight in stored.items() if name not in taken}
    _check_floats(rest, source)
    return rest | {f"{name}{form.ending}": weight for name, weight in weights.items()}


def turned(module: torch.nn.Module, weights: Mapping[str, LazyWeight]) -> dict[str, LazyWeight]:
    """The weights, those of quantized layers that hold [inputs, outputs], as GPT-2's do, transposed: formats store all
    layers the other way round."""
    found = dict(weights)
    for path, layer in module.named_modules():
        weight = found.get(f"{path}.weight")
        if isinstance(layer, Conv1D) and weight is not None and (GRID in weight.meta or WIDENED in weight.meta):
            found[f"{path}.weight"] = transposed(weight, weight.name)
    return found


def not_followed(settings: Settings | None) -> list[str]:
    """What the settings say about anything but weights and is not followed, in lines for the user."""
    if settings is None:
        return []
    places: dict[str, list[Any]] = {"activations": [], "outputs": [], "the KV cache": [settings.get("kv_cache_scheme")]}
    if settings.get("activation_scheme") or settings["quant_method"] == "fbgemm_fp8":
        places["activations"] = [
            {"type": "float", "num_bits": 8, "dynamic": settings.get("activation_scheme") != "static"}
        ]
    groups = settings.get("config_groups") or {}
    for group in groups.values() if settings["quant_method"] == "compressed-tensors" else ():
        if not follows_activations(group):
            places["activations"].append(group.get("input_activations"))
        places["outputs"].append(group.get("output_activations"))
    return [
        f"the rounding of {place} that the checkpoint declares ({_described(scheme)}) is not followed"
        for place, schemes in places.items()
        for scheme in [next((scheme for scheme in schemes if isinstance(scheme, dict)), None)]
        if scheme is not None
    ]


def _described(scheme: Mapping[str, Any]) -> str:
    static = "" if scheme.get("dynamic") else ", static scales"
    return f"{scheme.get('num_bits', 8)}-bit {'floats' if scheme.get('type') == 'float' else 'integers'}{static}"


def _check_floats(stored: Mapping[str, LazyWeight], source: str) -> None:
    """Refuse 8-bit floats without scales, which are not weights by themselves."""
    for name, weight in stored.items():
        if weight.dtype.name.startswith("FLOAT8") and not name.endswith(("k_scale", "v_scale")):
            raise ExportError(
                f"{source}: tensor {name} has unsupported dtype {weight.dtype.name.replace('FLOAT8', 'F8_')} without "
                "scales; export from the original float checkpoint"
            )


def _check_activations(stored: Mapping[str, LazyWeight], source: str) -> None:
    """Refuse AWQ's scales of activation functions, which a float model has no place for."""
    name = next((name for name in stored if name.endswith(".act.scales")), None)
    if name is not None:
        raise ExportError(
            f"{source}: {name} scales an activation, which satchel does not support; export from the original float "
            "checkpoint"
        )
