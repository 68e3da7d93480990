"""Quantized blocks of GGUF files are kept to the last bit where a kernel reads them, and named where none does."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from support.checkpoints import write_gguf
from support.exported import difference
from support.families import HEAD_DIM, TOLERANCE, logits_of
from support.gguf_families import (
    GGUF_FAMILIES,
    GgufFamily,
    facts_of,
    fused,
    gguf_model,
    loaded,
    some_ids,
    tensors_of,
)

from satchel.export import ExportConfig, export_bundle
from satchel.export.checkpoint import Checkpoint, open_checkpoint
from satchel.export.checkpoint.gguf_file import dequantized
from satchel.export.quantize.keeping import resolve, stored_grids, widened
from satchel.graphs.ir.weights import LazyWeight
from satchel.graphs.quant.stored import GRID, WIDENED, StoredGrid
from satchel.runtime.bundle.manifest import Manifest
from satchel.runtime.execution.engine import Engine
from satchel.runtime.ort.open_bundle import open_bundle

Q = gguf.GGMLQuantizationType
WIDE = GgufFamily(
    "llama", "llama", {"head_dim": HEAD_DIM, "intermediate_size": 96, "tie_word_embeddings": True}, permuted=True
)
"""Every dimension is a multiple of 32."""


def on_grid(weight: LazyWeight) -> NDArray[np.float32]:
    """Quantized values of a marked weight, after a check that they give its values back to the last bit."""
    grid = weight.meta[GRID]
    assert isinstance(grid, StoredGrid)
    scale = np.repeat(grid.scales.numpy(), grid.scheme.block, -1)
    values = weight.numpy()
    codes = np.rint(np.divide(values, scale, out=np.zeros_like(values), where=scale != 0))
    np.testing.assert_array_equal(codes * scale, values)
    low = -(1 << grid.scheme.bits - 1)
    assert codes.min() >= low and codes.max() < low + (1 << grid.scheme.bits)
    return codes


def random_blocks(kind: gguf.GGMLQuantizationType, rows: int, columns: int) -> LazyWeight:
    """A weight of random blocks; bytes below 60 keep every scale a finite number."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(3).integers(0, 60, rows * columns // block * size, np.uint8)
    return dequantized("w", (rows, columns), kind, data)


@pytest.mark.parametrize(
    ("kind", "bits", "block"), [(Q.Q4_0, 4, 32), (Q.Q5_0, 8, 32), (Q.Q8_0, 8, 32), (Q.Q6_K, 8, 16)]
)
def test_blocks_without_minimums_lie_on_a_grid(kind: gguf.GGMLQuantizationType, bits: int, block: int) -> None:
    weight = random_blocks(kind, 5, 512)
    assert len(np.unique(on_grid(weight))) > 8
    grid: Any = weight.meta[GRID]
    assert (grid.scheme.bits, grid.scheme.block, grid.scheme.symmetric) == (bits, block, True)
    assert grid.scales.dims == (5, 512 // block)
    np.testing.assert_array_equal(grid.scales.rows(1, 3), grid.scales.numpy()[1:3])


@pytest.mark.parametrize("kind", [Q.Q4_1, Q.Q4_K, Q.Q5_K, Q.Q5_1, Q.Q2_K, Q.Q3_K, Q.IQ4_NL])
def test_blocks_that_no_kernel_reads_are_named(kind: gguf.GGMLQuantizationType) -> None:
    weight = random_blocks(kind, 2, 512)
    assert GRID not in weight.meta and kind.name in str(weight.meta[WIDENED])


@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.BF16])
def test_floats_are_not_marked(kind: gguf.GGMLQuantizationType) -> None:
    assert random_blocks(kind, 2, 64).meta == {}


def quantized(path: Path, types: dict[str, gguf.GGMLQuantizationType], family: GgufFamily = WIDE, join: bool = False,
              **changes: Any) -> Path:  # fmt: skip
    """The file of a model whose tensors are of a type by the end of their names; `join` fuses what llama.cpp can."""
    model = gguf_model(dataclasses.replace(family, options={**family.options, **changes}))
    tensors, facts = tensors_of(family, model), facts_of(family, model)
    if join:
        tensors = fused(tensors)
    chosen = {name: kind for name, array in tensors.items() if array.ndim > 1
              for end, kind in types.items() if name.endswith(f"{end}.weight")}  # fmt: skip
    facts.pop("feed_forward_length")  # found by the tensors
    return write_gguf(path, family.architecture, facts, tensors, types=chosen)


@pytest.mark.parametrize("join", [False, True])
def test_moved_rows_keep_their_scales(join: bool, tmp_path: Path) -> None:
    weights = open_checkpoint(quantized(tmp_path / "m.gguf", {"": Q.Q8_0}, join=join)).weights
    marked = [name for name, weight in weights.items() if len(weight.dims) > 1]
    assert len(marked) == 16
    for name in marked:
        on_grid(weights[name])


def test_experts_and_joined_tensors_keep_their_scales(tmp_path: Path) -> None:
    weights = open_checkpoint(
        quantized(tmp_path / "m.gguf", {"_exps": Q.Q4_0}, GGUF_FAMILIES["mixtral"], intermediate_size=64)
    ).weights
    for name in ("gate_up_proj", "down_proj"):
        assert on_grid(weights[f"model.layers.1.mlp.experts.{name}"]).ndim == 3


def test_tensors_of_different_types_that_are_joined_are_widened(tmp_path: Path) -> None:
    path = quantized(
        tmp_path / "m.gguf", {"gate_exps": Q.Q4_0, "up_exps": Q.Q8_0}, GGUF_FAMILIES["mixtral"], intermediate_size=64
    )
    weight = open_checkpoint(path).weights["model.layers.0.mlp.experts.gate_up_proj"]
    assert GRID not in weight.meta and "different types" in str(weight.meta[WIDENED])


@pytest.mark.slow
def test_stacks_of_a_mixture_that_are_stored_in_two_forms_are_rounded(tmp_path: Path) -> None:
    family = dataclasses.replace(GGUF_FAMILIES["mixtral"], options={**GGUF_FAMILIES["mixtral"].options,
                                                                    "intermediate_size": 64})  # fmt: skip
    types = {"gate_exps": Q.Q4_0, "up_exps": Q.Q4_0, "down_exps": Q.Q8_0, "attn_output": Q.Q4_0}
    path = quantized(tmp_path / "m.gguf", types, family)
    manifest, apart, checkpoint = exported(path, ExportConfig(tmp_path / "b", "stored", max_context=64))
    assert len(stored_grids(checkpoint)) == 2 and len(widened(checkpoint)) == 4
    bits = {name: layer.bits for name, layer in manifest.layers.items()}
    assert len(bits) == 6 and all(found == (8 if "experts" in name else 4) for name, found in bits.items()), bits
    assert apart < 0.1


def exported(path: Path, config: ExportConfig) -> tuple[Manifest, float, Checkpoint]:
    """Export a file; returns the manifest, the largest difference of logits from the widened weights', the file."""
    manifest = export_bundle(path, config)
    checkpoint = open_checkpoint(path)
    found = Engine.open(open_bundle(config.output), threads=1).score(some_ids(), chunk=60)
    return manifest, difference(found, logits_of(loaded(checkpoint), some_ids())), checkpoint


@pytest.mark.slow
@pytest.mark.usefixtures("portable")
@pytest.mark.parametrize("kind", [Q.Q4_0, Q.Q8_0])
def test_a_bundle_of_kept_blocks_gives_the_logits_of_the_widened_weights(
    kind: gguf.GGMLQuantizationType, tmp_path: Path
) -> None:
    path = quantized(tmp_path / "m.gguf", {"": kind})
    manifest, apart, _ = exported(path, ExportConfig(tmp_path / "b", "stored", max_context=64))
    assert manifest.precision == "stored"
    assert manifest.certificate is not None and manifest.certificate.prefill.kl_mean < 1e-4
    assert apart < 10 * TOLERANCE


def test_what_no_kernel_reads_is_rounded_to_8_bits_beside_what_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = quantized(tmp_path / "m.gguf", {"": Q.Q8_0, "ffn_down": Q.Q4_1})
    export_bundle(path, ExportConfig(tmp_path / "b", "stored", max_context=64, certificate=False), progress=True)
    said = capsys.readouterr().err
    assert "Q4_1" in said and "2 layers are rounded to 8 bits" in said and "14 layers are kept" in said
    floats = sum(entry.bytes for name, entry in open_bundle(tmp_path / "b").manifest.files.items() if "weights" in name)
    assert floats < sum(w.size for w in open_checkpoint(path).weights.values()) * 2


def test_blocks_are_kept_only_where_that_is_asked_for(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(quantized(tmp_path / "m.gguf", {"": Q.Q8_0}))
    config, notes = resolve(ExportConfig(tmp_path / "b"), checkpoint)
    assert config.precision == "int8"
    assert "rounded to int8" in notes[0] and "--precision stored keeps 16 layers" in notes[0]
