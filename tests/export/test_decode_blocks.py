"""Decode by blocks: the same int8 weights in another order, made on the device, kept where they are faster."""

from __future__ import annotations

import functools
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from support.checkpoints import save_tiny
from support.command import Satchel
from support.families import by_family

from satchel.export import ExportConfig, export_bundle
from satchel.runtime.bundle import layouts
from satchel.runtime.bundle.contract import Layout
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import BundleError, SatchelWarning
from satchel.runtime.execution.engine import Engine
from satchel.runtime.optimize import specialize, trials
from satchel.runtime.optimize.derived import make_weights
from satchel.runtime.ort.open_bundle import open_bundle

BLOCKS_NAME = layouts.file_name(Layout.GROUPS)
IDS = list(range(4, 28))
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
WIDE = {"hidden_size": 128, "intermediate_size": 256, **HEADS}
NARROW = {"hidden_size": 96, "intermediate_size": 176, "head_dim": 32, **HEADS}  # no multiples of 64
FORMS = {
    "int8": (WIDE, "int8", "float"),
    "filled up": (NARROW, "int8", "float"),
    "per token": (WIDE, "a8w8", "float"),
    "int8 cache": (WIDE, "int8", "int8"),
}
BLOCKS = ("--layout", "groups", "--threads", 1, "--quiet")


@pytest.fixture(autouse=True)
def kernels_of_onnx_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where satchel's own kernels are not built: "auto" is between the forms of ONNX Runtime's."""
    monkeypatch.setenv("SATCHEL_KERNELS", "off")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """The bundle of a form, exported once."""

    @functools.cache
    def export(form: str) -> Bundle:
        folder = tmp_path_factory.mktemp("decode-blocks")
        widths, precision, cache = FORMS[form]
        checkpoint = save_tiny(folder / "checkpoint", **widths)
        export_bundle(checkpoint, ExportConfig(folder / "bundle", precision, max_context=64, kv_cache=cache))
        return open_bundle(folder / "bundle")

    return export


@pytest.fixture(params=by_family(FORMS, {"int8", "filled up"}.__contains__))
def made(exported: Callable[[str], Bundle], request: pytest.FixtureRequest) -> Bundle:
    return exported(request.param)


@pytest.fixture
def bundle(exported: Callable[[str], Bundle], tmp_path: Path) -> Bundle:
    """One bundle for each test to change."""
    shutil.copytree(exported("int8").folder, tmp_path / "bundle")
    return open_bundle(tmp_path / "bundle")


def files(bundle: Bundle) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in bundle.folder.iterdir()}


def products(bundle: Bundle, phase: str) -> set[str]:
    """What the specialized graph of a phase multiplies quantized weights with, the head apart."""
    assert bundle.specialized is not None
    graph = onnx.load(bundle.folder / bundle.specialized.graphs[phase].file, load_external_data=False).graph
    kinds = {"MatMulNBits", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
    return {node.op_type for node in graph.node if node.op_type in kinds and "head" not in node.name}


def timed(monkeypatch: pytest.MonkeyPatch, stored: float, in_blocks: float) -> None:
    monkeypatch.setattr(specialize, "step_seconds", lambda *_: [stored, in_blocks])


@pytest.mark.slow
def test_decode_by_blocks_rounds_activations_otherwise_and_nothing_else(satchel: Satchel, made: Bundle) -> None:
    folder = made.folder
    before = files(made)
    satchel("specialize", folder, *BLOCKS)
    special = open_bundle(folder)
    assert special.specialized is not None
    assert "decode_blocks" in special.specialized.variants
    assert products(special, "decode") == {"MatMulNBits"}
    assert products(special, "prefill") == {"MatMulIntegerToFloat"}
    portable, engine = Engine.open(Bundle(folder, made.manifest), threads=1), Engine.open(special, threads=1)
    states = portable.new_state(32), engine.new_state(32)
    first = [e.prefill(s, IDS).copy() for e, s in zip((portable, engine), states, strict=True)]
    np.testing.assert_allclose(first[1], first[0], rtol=0, atol=1e-4)
    for token in IDS[:4]:
        wanted, found = portable.decode(states[0], token).copy(), engine.decode(states[1], token).copy()
        error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        assert 1e-5 < error < 0.1, "activations are rounded in blocks, and not left as they are"
    satchel("verify", folder, "--threads", 1)
    satchel("specialize", folder, "--remove")
    after = files(made)
    after.pop("manifest.json")
    assert after == {name: content for name, content in before.items() if name != "manifest.json"}


@pytest.mark.parametrize(("in_blocks", "kept"), [(0.94, True), (0.96, False), (1.5, False)])
def test_the_faster_form_is_kept_and_nothing_of_the_other(
    satchel: Satchel, bundle: Bundle, in_blocks: float, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(monkeypatch, 1.0, in_blocks)
    before = files(bundle).keys()
    said = satchel("specialize", bundle.folder, "--threads", 1).err
    special = open_bundle(bundle.folder).specialized
    assert special is not None
    assert ("decode_blocks" in special.variants) is kept
    assert files(bundle).keys() - before == special.files.keys()
    assert products(open_bundle(bundle.folder), "decode") == {"MatMulNBits" if kept else "DynamicQuantizeMatMul"}
    assert "1000.0 ms with the portable graphs" in said
    assert f"{1e3 * in_blocks:.1f} ms with decode_blocks" in said


def test_where_both_phases_share_a_session_blocks_are_for_those_who_ask(
    exported: Callable[[str], Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(exported("per token").folder, tmp_path / "bundle")
    shared = open_bundle(tmp_path / "bundle")
    monkeypatch.setattr(specialize, "step_seconds", lambda *_: pytest.fail("timed"))
    for decode, own in (("auto", False), ("groups", True)):
        made = specialize.specialize(shared, layout=decode, threads=1).specialized
        assert made is not None
        assert ("decode_blocks" in made.variants) is own
        assert ("decode" in made.graphs) is own


def spoilt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts.np, "repeat", lambda scales, count, axis: -np.tile(scales, (1, count)))


def test_blocks_that_are_wrong_are_not_kept(satchel: Satchel, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    spoilt(monkeypatch)
    before = files(bundle)
    assert "differ from the portable ones" in satchel("specialize", bundle.folder, *BLOCKS, code=2).err
    assert files(bundle) == before


def test_by_itself_it_says_so_and_keeps_the_stored_ones(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    spoilt(monkeypatch)
    before = files(bundle).keys()
    with pytest.warns(SatchelWarning, match="decode_blocks"):
        made = specialize.specialize(bundle, threads=1).specialized
    assert made is not None
    assert "decode_blocks" not in made.variants
    assert files(bundle).keys() - before == made.files.keys()


def test_blocks_of_another_shape_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    path = bundle.graph_path("decode_blocks")
    graph = onnx.load(path, load_external_data=False)
    for tensor in graph.graph.initializer:
        if tensor.name.endswith(".block_codes"):
            tensor.dims[1] += 1
    path.write_bytes(graph.SerializeToString())
    with pytest.raises(BundleError, match=r"the weight .* of decode_blocks"):
        make_weights(bundle, bundle.manifest.variant("decode_blocks"), tmp_path / BLOCKS_NAME)


def test_what_the_certificate_does_not_allow_is_not_kept(
    satchel: Satchel, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "check_certificate", lambda *_: ["prompt 1: KL 2 where 1 was recorded"])
    before = files(bundle)
    said = satchel("specialize", bundle.folder, *BLOCKS, code=2).err
    assert "decode_blocks is less accurate than the certificate allows (prompt 1: KL 2" in said
    assert "--layout stored" in said
    assert files(bundle) == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        specialize.specialize(bundle, layout="stored", threads=1)
