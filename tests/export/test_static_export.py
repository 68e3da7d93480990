"""Static bundles: weights in 8 bits, graphs in several parts, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support.command import Satchel
from support.exported import stored_weights
from support.families import FAMILIES, VOCABULARY, logits_of, reference, save
from support.static_graphs import Lowered, Stepper, graphs_of, in_float32, lowered, optimized, write_static

from satchel.export import ExportConfig, ExportError, export_bundle
from satchel.graphs.analysis.cut import INLINE_LIMIT
from satchel.runtime.evaluation.fidelity import log_softmax
from satchel.runtime.execution.engine import Engine
from satchel.runtime.ort.open_bundle import open_bundle

IDS = np.random.default_rng(1).integers(3, VOCABULARY, 24)
LENGTHS = (8,)


def realistic(name: str, place: Path) -> Path:
    """A checkpoint so wide, and of weights so small, that rounding does not drown its logits."""
    family = FAMILIES[name]
    options = {**family.options, "hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    return save(dataclasses.replace(family, options=options, deviation=0.1), place / "checkpoint")


def tiny_llama(place: Path) -> Lowered:
    checkpoint = save(FAMILIES["llama"], place / "checkpoint")
    return lowered(checkpoint, ExportConfig(place / "unused", target="cann", max_context=32))


def scored(stepper: Stepper) -> NDArray[np.float32]:
    stepper.reset()
    return np.concatenate([stepper.step("score", IDS[i : i + 8]) for i in range(0, len(IDS), 8)])


def stepped(stepper: Stepper) -> NDArray[np.float32]:
    stepper.reset()
    first = stepper.prefill(IDS[:13], 8)
    return np.stack([first, *(stepper.step("decode", token[None])[0] for token in IDS[13:])])


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_weights_in_8_bits_come_close_and_are_half_the_size(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "gemma2" if tied else "llama"
    family = FAMILIES[name]
    if tied:
        family = dataclasses.replace(family, options={**family.options, "tie_word_embeddings": True})
        monkeypatch.setitem(FAMILIES, name, family)
    checkpoint, sizes = realistic(name, tmp_path), {}
    for precision in ("fp16", "a16w8"):
        config = ExportConfig(
            tmp_path / precision, precision, 32, "cann", certificate=False, prefill_lengths=LENGTHS
        )  # fmt: skip
        manifest = export_bundle(checkpoint, config)
        sizes[precision] = manifest.files["weights.bin"].bytes
    assert sizes["a16w8"] < 0.56 * sizes["fp16"], "scales, norms and rotary tables are beside the codes"
    assert (manifest.recipe, manifest.precision) == ("a16w8-channel", "a16w8")
    assert {layer.block for layer in manifest.layers.values()} == {None}

    options = {**family.options, "hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    whole = dataclasses.replace(family, options=options, deviation=0.1)
    expected = logits_of(reference(whole, stored_weights(checkpoint)), IDS)
    stepper = Stepper(tmp_path / "a16w8", manifest)
    for found, wanted in ((scored(stepper), expected), (stepped(stepper), expected[12:])):
        assert np.sqrt(np.square(found - wanted).mean() / np.square(wanted).mean()) <= 0.07
        ours, theirs = (np.stack([log_softmax(r.astype(np.float64)) for r in rows]) for rows in (found, wanted))
        assert (np.exp(theirs) * (theirs - ours)).sum(-1).mean() <= 0.003
    for graph in graphs_of(manifest).values():
        seen = optimized(stepper.folder, graph.parts[0], tmp_path).graph
        assert not [node.op_type for node in seen.node if "uantize" in node.op_type]


def test_parts_give_what_the_whole_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32: the CPU leaves out roundings to float16 inside a graph, and cannot between two."""
    monkeypatch.setattr("satchel.export.writing.static_graphs.TARGETS", in_float32())
    found, model = list[NDArray[np.float32]](), tiny_llama(tmp_path)
    for count, limit in ((1, INLINE_LIMIT), (2, 125_000), (3, 90_000)):
        config = ExportConfig(tmp_path / str(count), target="cann", max_context=32, prefill_lengths=LENGTHS)
        manifest = write_static(model, config, limit)
        assert {len(graph.parts) for graph in graphs_of(manifest).values()} == {count}
        stepper = Stepper(config.output, manifest)
        found.append(np.concatenate([scored(stepper), stepped(stepper)]))
        files = [part.file for part in graphs_of(manifest)["decode"].parts]
        assert files == (["decode.onnx"] if count == 1 else [f"decode.part{i + 1}.onnx" for i in range(count)])
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], found[0])


def test_one_weight_larger_than_a_part_is_an_error(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path)
    with pytest.raises(ExportError, match="alone reads"):
        write_static(model, ExportConfig(tmp_path / "bundle", target="cann", max_context=32), 1000)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"precision": "fp32"}, "fp32 .*--target cann.* fp16 or a16w8"),
        ({"precision": "int4"}, "int4 .*--target cann.* fp16 or a16w8"),
        ({"precision": "a8w8"}, "a8w8 .*--target cann.* fp16 or a16w8"),
        ({"kv_cache": "int8"}, "--kv-cache int8 .*--target cann.* float"),
        ({"prefill_lengths": (32, 16)}, "--prefill-lengths 32,16"),
        ({"prefill_lengths": (8, 8)}, "--prefill-lengths 8,8"),
        ({"prefill_lengths": (0, 8)}, "--prefill-lengths 0,8"),
        ({"target": "cpu", "prefill_lengths": (8,)}, "--prefill-lengths does not go with --target cpu"),
    ],
)
def test_options_that_have_no_form_are_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(ExportError, match=says):
        ExportConfig(Path("bundle"), **({"target": "cann"} | options))  # type: ignore[arg-type]


def test_the_target_chooses_the_precision_and_the_context_the_lengths() -> None:
    config = ExportConfig(Path("bundle"), target="cann")
    assert (config.precision, config.static) == ("fp16", True)
    assert [config.lengths(context) for context in (4096, 512, 511, 20)] == [(32, 128, 512)] * 2 + [(32, 128), (20,)]
    with pytest.raises(ExportError, match=r"--prefill-lengths 64 .* 32 positions"):
        ExportConfig(Path("bundle"), target="cann", prefill_lengths=(8, 64)).lengths(32)


def test_the_flag_takes_numbers_with_commas(satchel: Satchel, tmp_path: Path) -> None:
    command = ("export", tmp_path, "-o", tmp_path / "bundle", "--target", "cann", "--prefill-lengths")
    assert "8,many" in satchel.refuses(*command, "8,many")
    assert "--prefill-lengths 16,8" in satchel.refuses(*command, "16,8")


def test_an_export_is_checked_and_measured_as_any_other(tmp_path: Path) -> None:
    config = ExportConfig(tmp_path / "bundle", target="cann", max_context=64, prefill_lengths=LENGTHS)
    manifest = export_bundle(save(FAMILIES["llama"], tmp_path / "checkpoint"), config)
    assert manifest.certificate is not None
    assert manifest.certificate.prefill.kl_mean < 1e-4
    assert manifest.certificate.decode.kl_mean < 1e-4
    bundle = open_bundle(config.output)
    engine, stepper = Engine.open(bundle, threads=1), Stepper(config.output, manifest)
    state = engine.new_state(len(IDS))
    found = [engine.prefill(state, IDS[:13]).copy(), *(engine.decode(state, int(t)).copy() for t in IDS[13:])]
    np.testing.assert_allclose(np.stack(found), stepped(stepper), atol=0.02 * np.abs(found).max())


def test_a_recipe_with_blocks_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint = realistic("llama", tmp_path)
    recipe = tmp_path / "blocks.toml"
    recipe.write_text('[[rule]]\nkinds = ["linear"]\nbits = 8\nblocks = [32]\nrounding = "nearest"\n')
    config = ExportConfig(
        tmp_path / "bundle", "a16w8", 64, "cann", certificate=False, prefill_lengths=LENGTHS, recipe=recipe
    )
    with pytest.raises(ExportError, match=r"blocks = \[.channel.\]"):
        export_bundle(checkpoint, config)
    assert not (tmp_path / "bundle").exists()
