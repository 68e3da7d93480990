"""Checkpoints that are quantized already: their values are kept, and the bundle computes with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoints import save_tiny
from support.quantized import Writer, awq, gptq, logits, save_quantized

from satchel.export import ExportConfig, ExportError, export_bundle
from satchel.export.checkpoint import open_checkpoint
from satchel.export.quantize.keeping import resolve
from satchel.runtime.execution.engine import Engine
from satchel.runtime.ort.open_bundle import open_bundle

TOLERANCE = 1e-4
"""Of logits that are about 1 in size; both sides compute in float32."""

IDS = np.random.default_rng(3).integers(3, 448, 24)


def gptq_settings(bits: int = 4, size: int = 32, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": False, "sym": True, **more}


def awq_settings(bits: int = 4, size: int = 32) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": bits, "group_size": size, "zero_point": True, "version": "gemm"}


KEPT: dict[str, tuple[Mapping[str, Any], Writer]] = {
    "gptq": (gptq_settings(), gptq(4, 32)),
    "gptq, zero points": (gptq_settings(sym=False), gptq(4, 32, symmetric=False)),
    "gptq v2, zero points": (
        gptq_settings(sym=False, checkpoint_format="gptq_v2"),
        gptq(4, 32, symmetric=False, version=2),
    ),
    "gptq, 8 bits": (gptq_settings(8), gptq(8, 32)),
    "gptq, per channel": (gptq_settings(size=-1), gptq(4, -1)),
    "gptq, act-order": (gptq_settings(desc_act=True), gptq(4, 32, act_order=True)),
    "awq": (awq_settings(), awq(4, 32)),
    "awq, 8 bits": (awq_settings(8), awq(8, 32)),
}


@pytest.mark.parametrize("name", KEPT)
def test_the_values_are_read_as_the_format_says(name: str, tmp_path: Path) -> None:
    settings, write = KEPT[name]
    model = save_quantized(tmp_path, settings, write)
    weights = open_checkpoint(tmp_path).weights
    for key, expected in model.state_dict().items():
        np.testing.assert_array_equal(weights[key].numpy(), expected.numpy(), key)
        if expected.dim() == 2:
            np.testing.assert_array_equal(weights[key].columns(3, 9), expected[:, 3:9].numpy(), key)
            np.testing.assert_array_equal(weights[key].rows(5, 14), expected[5:14].numpy(), key)


@pytest.mark.parametrize("name", KEPT)
def test_a_bundle_keeps_the_values(name: str, tmp_path: Path) -> None:
    settings, write = KEPT[name]
    model = save_quantized(tmp_path / "checkpoint", settings, write)
    manifest = export_bundle(tmp_path / "checkpoint", ExportConfig(tmp_path / "bundle"))
    assert manifest.precision == "stored"
    assert {layer.bits for layer in manifest.layers.values()} == {settings["bits"]}
    assert len(manifest.layers) == 8  # of two decoder layers: joined as without quantization
    assert manifest.certificate is not None
    assert max(manifest.certificate.prefill.kl_mean, manifest.certificate.decode.kl_mean) < 1e-6
    engine = Engine.open(open_bundle(tmp_path / "bundle"), threads=1)
    np.testing.assert_allclose(engine.score(IDS), logits(model, IDS), rtol=0, atol=TOLERANCE)


def test_the_tolerance_would_notice_another_rounding(tmp_path: Path) -> None:
    model = save_quantized(tmp_path / "checkpoint", *KEPT["gptq"])
    export_bundle(tmp_path / "checkpoint", ExportConfig(tmp_path / "bundle", "a16w8", certificate=False))
    engine = Engine.open(open_bundle(tmp_path / "bundle"), threads=1)
    assert np.abs(engine.score(IDS) - logits(model, IDS)).max() > 10 * TOLERANCE


def test_fp32_widens_the_values(tmp_path: Path) -> None:
    model = save_quantized(tmp_path / "checkpoint", *KEPT["gptq, act-order"])
    manifest = export_bundle(tmp_path / "checkpoint", ExportConfig(tmp_path / "bundle", "fp32", certificate=False))
    assert not manifest.layers
    engine = Engine.open(open_bundle(tmp_path / "bundle"), threads=1)
    np.testing.assert_allclose(engine.score(IDS), logits(model, IDS), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, ("14 layers are kept", "4 bits, group size 32")),
        ({"precision": "fp32"}, ("widened to float",)),
        ({"precision": "int8"}, ("warning", "--precision int8 rounds them again", "stored")),
    ],
)
def test_the_export_says_what_it_does_with_the_values(
    options: dict[str, Any], says: tuple[str, ...], tmp_path: Path
) -> None:
    save_quantized(tmp_path, *KEPT["gptq"])
    _, notes = resolve(ExportConfig(tmp_path / "bundle", **options), open_checkpoint(tmp_path))
    assert len(notes) == 1
    assert all(part in notes[0] for part in says), notes


def test_a_recipe_may_round_the_layers_that_are_stored_in_float(tmp_path: Path) -> None:
    save_quantized(tmp_path / "checkpoint", *KEPT["gptq"])
    (tmp_path / "head.toml").write_text('[[rule]]\nkinds = ["head"]\nbits = 8\nblocks = [32]\n')
    config = ExportConfig(
        tmp_path / "bundle", "stored", recipe=tmp_path / "head.toml", effort="quick", certificate=False
    )
    layers = export_bundle(tmp_path / "checkpoint", config).layers
    assert layers["lm_head"].bits == 8
    assert len(layers) == 9


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"precision": "stored"}, "not quantized"),
        ({"precision": "stored", "recipe": "int8"}, "transforms"),
    ],
)
def test_stored_is_refused_where_nothing_can_be_kept(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    if "recipe" in options:
        save_quantized(tmp_path / "checkpoint", *KEPT["gptq"])
    else:
        save_tiny(tmp_path / "checkpoint")
    with pytest.raises(ExportError, match=says):
        export_bundle(tmp_path / "checkpoint", ExportConfig(tmp_path / "bundle", **options))
    assert not (tmp_path / "bundle").exists()
