"""Quantized checkpoints that cannot be read are refused in one line, before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import change_json
from support.quantized import Writer, awq, gptq, save_quantized
from support.quantized_floats import fp8, nf4, packed

from satchel.export import ExportConfig, ExportError, export_bundle

Change = Callable[[dict[str, torch.Tensor]], object]

GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
PACKED: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group", "group_size": 32}}
    },
}
Q = "model.layers.0.self_attn.q_proj"

SETTINGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "an unknown method": ({"quant_method": "exl9"}, ("config.json", "exl9", "gptq, awq")),
    "no method": ({"bits": 4}, ("config.json", "unnamed")),
    "gptq of 3 bits": (GPTQ | {"bits": 3}, ("config.json", "3 bits", "4 or 8")),
    "gptq of an unknown version": (GPTQ | {"checkpoint_format": "gptq_v9"}, ("gptq_v9", "gptq_v2")),
    "gptq for one kernel": (GPTQ | {"checkpoint_format": "marlin"}, ("marlin",)),
    "gptq without a group size": (GPTQ | {"group_size": 0}, ("group_size is 0",)),
    "awq of 3 bits": (AWQ | {"bits": 3}, ("3 bits",)),
    "awq of an unknown version": (AWQ | {"version": "gemv_fast"}, ("gemv_fast", "gemm")),
    "an unknown compressed format": (PACKED | {"format": "marlin-24"}, ("marlin-24", "pack-quantized")),
    "sparse weights": (PACKED | {"sparsity_config": {"format": "sparse-24-bitmask"}}, ("sparse-24-bitmask",)),
    "packed values of 3 bits": (
        PACKED | {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 3}}}},
        ("3 bits",),
    ),
    "no groups": (PACKED | {"config_groups": None}, ("config_groups",)),
    "settings of another format": (AWQ | {"quant_method": "fp8"}, ("fp8", "weight_scale")),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_are_not_known_are_refused(name: str, tmp_path: Path) -> None:
    settings, parts = SETTINGS[name]
    save_quantized(tmp_path / "checkpoint", GPTQ, gptq(4, 32))
    change_json(tmp_path / "checkpoint" / "config.json", quantization_config=settings)
    refused(tmp_path, parts)


def without(name: str) -> Change:
    return lambda tensors: tensors.pop(name)


def cut(name: str) -> Change:
    return lambda tensors: tensors.update({name: tensors[name][:-1].clone()})


def retyped(name: str) -> Change:
    return lambda tensors: tensors.update({name: tensors[name].float()})


NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}
FP8 = {"quant_method": "fp8", "weight_block_size": [32, 32]}
TENSORS: dict[str, tuple[dict[str, Any], Writer, Change, str]] = {
    "gptq without scales": (GPTQ, gptq(4, 32), without(f"{Q}.scales"), f"{Q}.scales is missing"),
    "gptq without zero points": (GPTQ, gptq(4, 32), without(f"{Q}.qzeros"), f"{Q}.qzeros is missing"),
    "gptq, scales of another shape": (GPTQ, gptq(4, 32), cut(f"{Q}.scales"), f"{Q}.scales has shape"),
    "gptq, values of another shape": (GPTQ, gptq(4, 32), cut(f"{Q}.qweight"), f"{Q}"),
    "gptq, values of another type": (GPTQ, gptq(4, 32), retyped(f"{Q}.qweight"), f"{Q}.qweight has type float32"),
    "gptq, a group that is not there": (
        GPTQ,
        gptq(4, 32),
        lambda tensors: tensors[f"{Q}.g_idx"].fill_(9),
        f"{Q}.g_idx names groups",
    ),
    "gptq of another group size": (GPTQ | {"group_size": 16}, gptq(4, 32), lambda tensors: None, "scales has shape"),
    "awq without scales": (AWQ, awq(4, 32), without(f"{Q}.scales"), f"{Q}.scales is missing"),
    "awq without zero points": (AWQ, awq(4, 32), without(f"{Q}.qzeros"), f"{Q}.qzeros is missing"),
    "packed without scales": (PACKED, packed(4, 32), without(f"{Q}.weight_scale"), f"{Q}.weight_scale is missing"),
    "packed without a shape": (PACKED, packed(4, 32), without(f"{Q}.weight_shape"), f"{Q}.weight_shape is missing"),
    "packed of another shape": (
        PACKED,
        packed(4, 32),
        lambda tensors: tensors[f"{Q}.weight_shape"].fill_(72),
        f"{Q}.weight_packed has shape",
    ),
    "fp8 without scales": (FP8, fp8((32, 32)), without(f"{Q}.weight_scale_inv"), f"{Q}.weight"),
    "fp8, scales of other blocks": (
        FP8 | {"weight_block_size": [64, 64]},
        fp8((32, 32)),
        lambda tensors: None,
        "weight_scale_inv",
    ),
    "nf4 without scales": (NF4, nf4(), without(f"{Q}.weight.absmax"), f"{Q}.weight.absmax is missing"),
    "nf4 with a damaged state": (
        NF4,
        nf4(),
        lambda tensors: tensors[f"{Q}.weight.quant_state.bitsandbytes__nf4"].fill_(0),
        f"{Q}.weight.quant_state.bitsandbytes__nf4 is damaged",
    ),
    "a group size that no kernel has": (GPTQ | {"group_size": 8}, gptq(4, 8), lambda tensors: None, "group size 8"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_do_not_fit_the_format_are_refused(name: str, tmp_path: Path) -> None:
    settings, write, change, says = TENSORS[name]
    save_quantized(tmp_path / "checkpoint", settings, write)
    path = tmp_path / "checkpoint" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    refused(tmp_path, (says,))


def refused(folder: Path, parts: tuple[str, ...]) -> None:
    with pytest.raises(ExportError) as caught:
        export_bundle(folder / "checkpoint", ExportConfig(folder / "bundle"))
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    assert not (folder / "bundle").exists()
