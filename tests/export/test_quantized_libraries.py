"""Checkpoints that a format's own library wrote or reads: its logits are those of the bundle.

Written and read by compressed-tensors and bitsandbytes; packed by GPTQModel and AutoAWQ, in files of `tests/data`;
written from the format's definition and read by transformers (FP8, MXFP4).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from support.checkpoints import change_json
from support.quantized import logits, save_quantized
from support.quantized_by_library import IDS, PLACE, VOCABULARY, wide_model
from support.quantized_floats import fp8

from satchel.export import ExportConfig, export_bundle
from satchel.export.checkpoint import open_checkpoint
from satchel.runtime.execution.engine import Engine
from satchel.runtime.ort.open_bundle import open_bundle

TOLERANCES = {4: 1e-5, 8: 5e-4}
"""By bits, as a share of the largest logit. For 8 bits the kernel rounds its input to int8, in two parts."""

ROUNDING = 2e-6
"""Of logits that torch computed on another processor, whose sums have another order; as a share of the largest."""

KL = 1e-4


def exported(source: Path, folder: Path, **options: Any) -> tuple[Any, NDArray[np.float32]]:
    """The manifest of a checkpoint's bundle, and its logits for `IDS`."""
    manifest = export_bundle(source, ExportConfig(folder / "bundle", **options))
    return manifest, Engine.open(open_bundle(folder / "bundle"), threads=1).score(IDS)


def loaded(model: torch.nn.Module, source: Path) -> torch.nn.Module:
    """The model with the weights that satchel reads from a checkpoint."""
    weights = open_checkpoint(source).weights
    model.load_state_dict({name: torch.from_numpy(np.array(weight.numpy())) for name, weight in weights.items()})
    return model


@pytest.mark.parametrize("name", ["gptq", "gptq_v2", "awq"])
def test_layers_that_gptqmodel_and_autoawq_packed_are_read_as_they_read_them(name: str) -> None:
    model, expected = loaded(wide_model(vocab_size=VOCABULARY), PLACE / name), np.load(PLACE / name / "logits.npy")
    assert np.abs(logits(model, IDS) - expected).max() <= ROUNDING * np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.usefixtures("portable")
@pytest.mark.parametrize("name", ["gptq", "gptq_v2", "awq"])
def test_their_bundles_have_the_logits_of_the_library(name: str, tmp_path: Path) -> None:
    manifest, found = exported(PLACE / name, tmp_path)
    assert manifest.precision == "stored" and len(manifest.layers) == 8
    assert max(manifest.certificate.prefill.kl_mean, manifest.certificate.decode.kl_mean) < KL
    expected = np.load(PLACE / name / "logits.npy")
    (bits,) = {layer.bits for layer in manifest.layers.values()}
    assert np.abs(found - expected).max() < TOLERANCES[bits] * np.abs(expected).max()


def test_a_row_in_another_place_would_be_noticed() -> None:
    expected = np.load(PLACE / "awq" / "logits.npy")
    model = loaded(wide_model(vocab_size=VOCABULARY), PLACE / "awq")
    weight: Any = model.get_parameter("model.layers.0.self_attn.q_proj.weight")
    weight.data[[0, 1]] = weight.data[[1, 0]]
    assert np.abs(logits(model, IDS) - expected).max() > 10 * TOLERANCES[8] * np.abs(expected).max()


SCHEMES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "W4A16": ("W4A16", "pack-quantized", {"group_size": 32}),
    "W4A16, zero points": ("W4A16_ASYM", "pack-quantized", {"group_size": 32}),
    "W8A16": ("W8A16", "pack-quantized", {"group_size": 32}),
    "W8A8": ("W8A8", "int-quantized", {}),
    "MXFP4": ("MXFP4A16", "mxfp4-pack-quantized", {}),
    "NVFP4": ("NVFP4A16", "nvfp4-pack-quantized", {}),
    "FP8": ("FP8_DYNAMIC", "float-quantized", {}),
    "FP8, blocks": ("FP8_BLOCK", "float-quantized", {"block_structure": [32, 32]}),
}
"""The library's name of a scheme, the format, and what is changed in how weights are quantized."""


def compressed(folder: Path, name: str) -> None:
    """Save the tiny model as compressed-tensors quantizes it by one of its own schemes."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
        preset_name_to_scheme,
    )
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    preset, stored, changes = SCHEMES[name]
    scheme = preset_name_to_scheme(preset, ["Linear"])
    args = scheme.weights.model_copy(update=changes)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=scheme.input_activations)
    config = QuantizationConfig(config_groups={"group_0": scheme}, format=stored, ignore=["lm_head"])
    model = wide_model()
    apply_quantization_config(model, config)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is None:
            continue
        weight: Any = module.weight.data
        if args.block_structure:
            rows, columns = args.block_structure
            parts = weight.unfold(0, rows, rows).unfold(1, columns, columns).flatten(2)
        else:
            parts = weight.unflatten(1, (-1, args.group_size or weight.shape[1]))
        whole = generate_gparam(weight.min(), weight.max()) if hasattr(module, "weight_global_scale") else None
        scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), args, global_scale=whole)
        module.weight_scale.data = scale
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data = zero.to(module.weight_zero_point.dtype)
        if whole is not None:
            module.weight_global_scale.data = whole.reshape(1)
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))


def same_weights(folder: Path, read: Mapping[str, torch.Tensor], rounded: str = "nothing") -> None:
    """Check that satchel reads the weights that the library does; it rounds those whose name has a part to bfloat16."""
    weights = open_checkpoint(folder).weights
    assert weights.keys() == read.keys()
    for name, weight in weights.items():
        found = torch.from_numpy(np.array(weight.numpy()))
        if rounded in name:
            found = found.bfloat16().float()
        torch.testing.assert_close(
            found, read[name].float(), rtol=1e-6, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.filterwarnings("ignore:You passed .quantization_config")
@pytest.mark.parametrize("name", SCHEMES)
def test_what_compressed_tensors_writes_is_read_as_it_reads_it(name: str, tmp_path: Path) -> None:
    compressed(tmp_path, name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=transformers.CompressedTensorsConfig(dequantize=True)
    )
    same_weights(tmp_path, model.state_dict(), "proj" if "FP4" in name else "nothing")


def widened_by_transformers(folder: Path, config: Any) -> torch.nn.Module:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config, attn_implementation="eager"
    )
    return model.train(False)


@pytest.mark.filterwarnings("ignore:You passed .quantization_config")
def test_fp8_blocks_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    settings = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
    save_quantized(tmp_path, settings, fp8((32, 32)))
    read = widened_by_transformers(
        tmp_path, transformers.FineGrainedFP8Config(weight_block_size=(32, 32), dequantize=True)
    )
    same_weights(tmp_path, read.state_dict())


@pytest.mark.parametrize("nested", [False, True])
def test_nf4_that_bitsandbytes_writes(nested: bool, tmp_path: Path) -> None:
    """Its weights: its layers compute in bfloat16 on processors that have it."""
    from bitsandbytes.functional import dequantize_4bit

    sizes = {"intermediate_size": 128}  # the kernel for the CPU wants inputs of whole blocks
    wide_model(**sizes).save_pretrained(tmp_path / "float")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    model = widened_by_transformers(tmp_path / "float", config)
    model.save_pretrained(tmp_path / "nf4")
    weights = open_checkpoint(tmp_path / "nf4").weights
    packed = {name: part.weight for name, part in model.named_modules() if hasattr(part, "quant_state")}
    assert packed
    for name, weight in packed.items():
        wide = dequantize_4bit(weight.data, weight.quant_state)
        np.testing.assert_allclose(weights[f"{name}.weight"].numpy(), wide.float(), rtol=1e-6, atol=1e-8)


def test_int8_that_bitsandbytes_writes(tmp_path: Path) -> None:
    from bitsandbytes.functional import int8_vectorwise_dequant

    wide_model().save_pretrained(tmp_path / "float")
    model = widened_by_transformers(tmp_path / "float", transformers.BitsAndBytesConfig(load_in_8bit=True))
    model.save_pretrained(tmp_path / "int8")
    weights = open_checkpoint(tmp_path / "int8").weights
    for name, module in model.named_modules():
        if hasattr(getattr(module, "weight", None), "SCB"):
            wide = int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
            np.testing.assert_allclose(weights[f"{name}.weight"].numpy(), wide.float(), rtol=1e-6)


GPT_OSS = {
    "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "hidden_size": 64, "intermediate_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 448,
    "max_position_embeddings": 128, "sliding_window": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:You passed .quantization_config")
def test_mxfp4_experts_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model("gpt_oss", **GPT_OSS)
    torch.manual_seed(5)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    random = np.random.default_rng(6)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.from_numpy(random.integers(0, 256, (*shape, 16), np.uint8))
        tensors[f"{name}_scales"] = torch.from_numpy(random.integers(118, 124, shape).astype(np.uint8))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    change_json(tmp_path / "config.json", quantization_config={"quant_method": "mxfp4"})
    read = widened_by_transformers(tmp_path, transformers.Mxfp4Config(dequantize=True))
    same_weights(tmp_path, read.state_dict())
