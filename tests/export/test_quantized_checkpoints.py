"""Checkpoints that are quantized already: their values are kept, and the bundle computes with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoints import save_tiny, tiny_model
from support.command import Satchel
from support.quantized import Writer, awq, gptq, logits, save_experts, save_quantized
from support.quantized_floats import fp4, fp8, int8, llm_int8, nf4, packed

from satchel.export import ExportConfig, ExportError, export_bundle
from satchel.export.checkpoint import open_checkpoint
from satchel.export.quantize.keeping import resolve, stored_grids, widened
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


def compressed(stored: str, activations: dict[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, **weights},
        "input_activations": activations,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": stored,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


@pytest.mark.parametrize(("flags", "name"), [((), "mine-stored"), (("-p", "fp32"), "mine-fp32")], ids=str)
def test_without_a_name_the_folder_is_called_after_what_is_in_it(
    satchel: Satchel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], name: str
) -> None:
    save_quantized(tmp_path / "mine", *KEPT["gptq"])
    monkeypatch.chdir(tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    found = satchel.json("export", "mine", *flags, "--no-certificate", "--quiet")
    assert {path.name for path in tmp_path.iterdir()} - before == {name} == {found["bundle"]}
    assert f"{name} already exists" in satchel.refuses("export", "mine", *flags, "--no-certificate", "--quiet")


CHANNEL: dict[str, Any] = {"strategy": "channel", "group_size": None}
DYNAMIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
KEPT |= {
    "pack-quantized": (compressed("pack-quantized"), packed(4, 32)),
    "pack-quantized, zero points": (compressed("pack-quantized", symmetric=False), packed(4, 32, symmetric=False)),
    "pack-quantized, act-order": (compressed("pack-quantized", actorder="group"), packed(4, 32, act_order=True)),
    "pack-quantized, 8 bits": (compressed("pack-quantized", num_bits=8, **CHANNEL), packed(8, -1)),
    "int-quantized, float activations": (compressed("int-quantized", num_bits=8, **CHANNEL), int8()),
    "int-quantized, zero points": (
        compressed("int-quantized", num_bits=8, symmetric=False, **CHANNEL),
        int8(symmetric=False),
    ),
    "mxfp4": (compressed("mxfp4-pack-quantized", type="float"), fp4(32, nv=False)),
    "nvfp4": (compressed("nvfp4-pack-quantized", type="float", group_size=16), fp4(16, nv=True)),
    "bitsandbytes int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, llm_int8()),
}
W8A8 = (compressed("int-quantized", DYNAMIC, num_bits=8, **CHANNEL), int8())
WIDENED: dict[str, tuple[Mapping[str, Any], Writer]] = {
    "fp8, blocks": ({"quant_method": "fp8", "weight_block_size": [32, 40]}, fp8((32, 40))),
    "fp8, one scale": ({"quant_method": "fp8", "weight_block_size": None}, fp8((1 << 20, 1 << 20))),
    "fbgemm_fp8": ({"quant_method": "fbgemm_fp8"}, fp8((1, 1 << 20), "weight_scale")),
    "float-quantized": (
        compressed("float-quantized", num_bits=8, type="float", **CHANNEL),
        fp8((1, 1 << 20), "weight_scale"),
    ),
    "float-quantized, blocks": (
        compressed("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[32, 40]),
        fp8((32, 40), "weight_scale"),
    ),
    "nf4": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, nf4()),
    "nf4, nested": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, nf4(nested=True)),
}
ALL = KEPT | WIDENED | {"w8a8": W8A8}
BUNDLES = ("gptq, act-order", "awq", "nvfp4")
"""One for each way through the export; the others, which are slow, differ in what is read."""
OTHERS = tuple(pytest.param(name, marks=pytest.mark.slow) for name in KEPT if name not in BUNDLES)


@pytest.mark.parametrize("name", ALL)
def test_the_values_are_read_as_the_format_says(name: str, tmp_path: Path) -> None:
    settings, write = ALL[name]
    model = save_quantized(tmp_path, settings, write)
    checkpoint = open_checkpoint(tmp_path)
    weights, linear = checkpoint.weights, 14
    assert len(stored_grids(checkpoint)) == (0 if name in WIDENED else linear)
    assert len(widened(checkpoint)) == (linear if name in WIDENED else 0)
    for key, expected in model.state_dict().items():
        np.testing.assert_array_equal(weights[key].numpy(), expected.numpy(), key)
        if expected.dim() == 2:
            np.testing.assert_array_equal(weights[key].columns(3, 9), expected[:, 3:9].numpy(), key)
            np.testing.assert_array_equal(weights[key].rows(5, 14), expected[5:14].numpy(), key)


def bits_of(settings: Mapping[str, Any]) -> int:
    """The bits in which a bundle keeps a format's values."""
    if "config_groups" in settings:
        weights = settings["config_groups"]["group_0"]["weights"]
        return 8 if weights["type"] == "float" else int(weights["num_bits"])
    return int(settings.get("bits", 8))


@pytest.mark.usefixtures("portable")
@pytest.mark.parametrize("name", [*BUNDLES, *OTHERS])
def test_a_bundle_keeps_the_values(name: str, tmp_path: Path) -> None:
    settings, write = KEPT[name]
    model = save_quantized(tmp_path / "checkpoint", settings, write)
    manifest = export_bundle(tmp_path / "checkpoint", ExportConfig(tmp_path / "bundle"))
    assert manifest.precision == "stored"
    assert {layer.bits for layer in manifest.layers.values()} == {bits_of(settings)}
    assert len(manifest.layers) == 8  # of two decoder layers: joined as without quantization
    assert manifest.certificate is not None
    assert max(manifest.certificate.prefill.kl_mean, manifest.certificate.decode.kl_mean) < 1e-6
    engine = Engine.open(open_bundle(tmp_path / "bundle"), threads=1)
    np.testing.assert_allclose(engine.score(IDS), logits(model, IDS), rtol=0, atol=TOLERANCE)


def test_int8_activations_are_kept_too(tmp_path: Path) -> None:
    model = save_quantized(tmp_path / "checkpoint", *W8A8)
    manifest = export_bundle(tmp_path / "checkpoint", ExportConfig(tmp_path / "bundle", certificate=False))
    layers = manifest.layers.values()
    assert {(layer.bits, layer.block, layer.prefill_activations) for layer in layers} == {(8, None, "token")}
    found = Engine.open(open_bundle(tmp_path / "bundle"), threads=1).score(IDS)
    expected = logits(model, IDS)
    assert TOLERANCE < np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


@pytest.mark.slow
def test_square_layers_of_gpt2_are_turned(tmp_path: Path) -> None:
    settings, write = KEPT["gptq, zero points"]
    model = save_quantized(tmp_path / "checkpoint", settings, write, tiny_model("gpt2"))
    weights = open_checkpoint(tmp_path / "checkpoint").weights
    for key in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        name = f"transformer.h.1.{key}.weight"
        np.testing.assert_array_equal(weights[name].numpy(), model.get_parameter(name).detach().numpy())
    manifest = export_bundle(tmp_path / "checkpoint", ExportConfig(tmp_path / "bundle", certificate=False))
    assert {layer.bits for layer in manifest.layers.values()} == {4}
    engine = Engine.open(open_bundle(tmp_path / "bundle"), threads=1)
    np.testing.assert_allclose(engine.score(IDS), logits(model, IDS), rtol=0, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.usefixtures("portable")
def test_experts_are_kept(tmp_path: Path) -> None:
    model = save_experts(tmp_path / "checkpoint", *KEPT["gptq"])
    manifest = export_bundle(tmp_path / "checkpoint", ExportConfig(tmp_path / "bundle"))
    assert len(manifest.layers) == 4 and {layer.bits for layer in manifest.layers.values()} == {4}
    assert manifest.certificate is not None and manifest.certificate.prefill.kl_mean < 1e-6
    engine = Engine.open(open_bundle(tmp_path / "bundle"), threads=1)
    np.testing.assert_allclose(engine.score(IDS), logits(model, IDS), rtol=0, atol=TOLERANCE)


STATIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
FLOATS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}


@pytest.mark.parametrize(
    ("settings", "write", "says"),
    [
        (compressed("int-quantized", STATIC, num_bits=8, **CHANNEL), int8(), ("activations", "8-bit integers, static")),
        (
            compressed("float-quantized", FLOATS, num_bits=8, type="float", **CHANNEL),
            fp8((1, 1 << 20), "weight_scale"),
            ("activations", "8-bit floats)"),
        ),
        (compressed("pack-quantized") | {"kv_cache_scheme": FLOATS | {"dynamic": False}}, packed(4, 32), ("KV cache",)),
        (WIDENED["fp8, blocks"][0] | {"activation_scheme": "static"}, fp8((32, 40)), ("activations", "static scales")),
    ],
)  # fmt: skip
def test_what_is_not_followed_is_named(
    settings: Mapping[str, Any], write: Writer, says: tuple[str, ...], tmp_path: Path
) -> None:
    save_quantized(tmp_path, settings, write)
    (note,) = open_checkpoint(tmp_path).notes
    assert "not followed" in note and all(part in note for part in says), note


@pytest.mark.parametrize("name", ["gptq", "pack-quantized", "mxfp4"])
def test_nothing_is_named_where_all_is_followed(name: str, tmp_path: Path) -> None:
    save_quantized(tmp_path, *KEPT[name])
    assert not open_checkpoint(tmp_path).notes


@pytest.mark.parametrize(("target", "reason"), [("cuda", "float16 scales"), ("cann", "folded into float16")])
def test_a_device_that_cannot_keep_the_values_says_why(target: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=f"--precision stored is not supported by --target {target}.*{reason}"):
        ExportConfig(tmp_path / "bundle", "stored", target=target)


def test_a_widened_format_is_rounded_as_a_float_model_is(tmp_path: Path) -> None:
    save_quantized(tmp_path, *WIDENED["fp8, blocks"])
    config, notes = resolve(ExportConfig(tmp_path / "bundle"), open_checkpoint(tmp_path))
    assert config.precision == "int8"
    assert "no kernel reads" in notes[0]


@pytest.mark.slow
def test_the_tolerance_would_notice_another_rounding(tmp_path: Path) -> None:
    model = save_quantized(tmp_path / "checkpoint", *KEPT["gptq"])
    export_bundle(tmp_path / "checkpoint", ExportConfig(tmp_path / "bundle", "a16w8", certificate=False))
    engine = Engine.open(open_bundle(tmp_path / "bundle"), threads=1)
    assert np.abs(engine.score(IDS) - logits(model, IDS)).max() > 10 * TOLERANCE


@pytest.mark.slow
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
