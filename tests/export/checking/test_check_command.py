"""`satchel check`: what it says of a bundle, on a terminal, as JSON and as a page, and what it refuses."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.command import Satchel
from support.custom_ops import LIBRARY
from support.tiny_bundle import change_manifest, replace_file, write_bundle
from support.tiny_custom_bundle import write_custom_bundle
from support.tiny_hybrid import write_hybrid


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


def put_graph(bundle: Path, phase: str, model: onnx.ModelProto, session: dict[str, str] | None = None) -> None:
    """Put another graph in the place of a phase's, with session entries."""
    replace_file(bundle, f"{phase}.onnx", model.SerializeToString())
    change_manifest(bundle, "graphs", phase, "session", to=session or {})


def product(*nodes: onnx.NodeProto, name: str = "g") -> onnx.ModelProto:
    """A graph from x, float16 [1, 8], to y, float16 [1, 4], with int8 codes `w` [8, 4] and scales `s` [4]."""
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT16, [1, size]) for n, size in (("x", 8), ("y", 4)))
    codes = np.arange(32, dtype=np.int8).reshape(8, 4)
    constants = [numpy_helper.from_array(codes, "w"), numpy_helper.from_array(np.ones(4, np.float32), "s")]
    graph = helper.make_graph(list(nodes), name, [x], [y], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


DEQUANTIZED = (
    helper.make_node("DequantizeLinear", ["w", "s"], ["f"], "codes", axis=1),
    helper.make_node("Cast", ["f"], ["h"], "half", to=TensorProto.FLOAT16),
    helper.make_node("MatMul", ["x", "h"], ["y"], "product"),
)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def decode_of(found: dict) -> dict:
    return next(graph for graph in found["graphs"] if graph["graph"] == "decode")


def test_a_bundle_for_the_cpu_is_ready_for_it(satchel: Satchel, bundle: Path) -> None:
    output = satchel("check", bundle, "--provider", "cpu", "--quiet").out
    assert output.splitlines()[-1] == "ready for cpu"
    assert "decode.onnx" in output


STATEFUL = ("com.microsoft::CausalConvWithState", "com.microsoft::LinearAttention")


@pytest.mark.parametrize(
    ("provider", "flags", "refused"),
    [("cpu", (), ()), ("cuda", (), ()), ("cuda", ("--ort-version", "1.24.4"), STATEFUL), ("cann", (), STATEFUL)],
)
def test_operators_with_states_are_refused_by_name_where_there_is_no_kernel(
    satchel: Satchel, tmp_path: Path, provider: str, flags: tuple[str, ...], refused: tuple[str, ...]
) -> None:
    bundle = write_hybrid(tmp_path / "bundle")
    found = satchel.json("check", bundle, "--provider", provider, *flags, "--quiet", code=0 if provider == "cpu" else 1)
    for graph in found["graphs"]:
        assert set(STATEFUL) & set(graph["refused"]) == set(refused)
        assert set(refused) <= {each["operator"] for each in graph["findings"] if each["severity"] == "error"}


@pytest.mark.parametrize(("write", "told"), [(write_hybrid, True), (write_bundle, False)])
def test_where_no_target_helps_it_is_told(
    satchel: Satchel, tmp_path: Path, write: Callable[[Path], Path], told: bool
) -> None:
    bundle = write(tmp_path / "bundle")
    assert (
        "exported for the CPU only" in satchel("check", bundle, "--provider", "cann", "--quiet", code=1).out
    ) is told
    assert "CPU only" not in satchel("check", bundle, "--provider", "cpu", "--quiet").out


def test_the_graph_is_judged_as_it_is_handed_over(satchel: Satchel, bundle: Path) -> None:
    put_graph(bundle, "decode", product(*DEQUANTIZED), {"session.disable_quant_qdq": "1"})
    graph = decode_of(satchel.json("check", bundle, "--provider", "cann", "--quiet", code=1))
    assert graph["optimized"]
    assert (graph["nodes"], graph["taken"]) == (1, 1)
    assert (graph["refused"], graph["findings"]) == ({}, [])
    assert graph["settled"] == {"C04": 1}
    output = satchel("check", bundle, "--provider", "cann", "--quiet", code=1).out
    assert "decode: fixed by ONNX Runtime before" in output
    assert "C04 (1)" in output


@pytest.mark.parametrize(("provider", "nodes"), [("cann", 2), ("cuda", 2), ("cpu", 6)])
def test_an_operator_that_the_cpu_has_to_expand_is_whole_for_other_providers(
    satchel: Satchel, bundle: Path, provider: str, nodes: int
) -> None:
    softmax = helper.make_node("Softmax", ["a"], ["y"], "softmax", axis=-1)
    weight = numpy_helper.from_array(np.ones((8, 4), np.float16), "v")
    model = product(helper.make_node("MatMul", ["x", "v"], ["a"], "scores"), softmax)
    model.graph.initializer.append(weight)
    put_graph(bundle, "decode", model)
    graph = decode_of(satchel.json("check", bundle, "--provider", provider, "--quiet", code=int(provider != "cpu")))
    assert graph["optimized"]
    assert graph["nodes"] == nodes
    if provider != "cpu":
        assert [place["rule"] for place in graph["findings"]] == []


def test_warnings_count_when_they_are_asked_to(satchel: Satchel, bundle: Path) -> None:
    model = product(*DEQUANTIZED)
    put_graph(bundle, "decode", model, {"session.disable_quant_qdq": "1"})
    command = ("check", bundle, "--provider", "cpu", "--quiet")
    assert satchel(*command).out.splitlines()[-1] == "ready for cpu, with 1 warning"
    assert satchel(*command, "--strict", code=1).out.splitlines()[-1] == "not ready for cpu: 1 warning"
    assert not satchel.json(*command, "--strict", code=1)["ready"]


def test_a_graph_that_does_not_open_is_judged_as_its_file_is(satchel: Satchel, bundle: Path) -> None:
    unknown = helper.make_node("NoSuchOperator", ["x"], ["y"], "odd")
    put_graph(bundle, "decode", product(unknown))
    graph = decode_of(satchel.json("check", bundle, "--provider", "cpu", "--quiet", code=1))
    assert not graph["optimized"]
    assert "NoSuchOperator" in graph["note"]
    assert [(place["rule"], place["node"]) for place in graph["findings"]] == [("P01", "odd")]


def test_the_bundle_is_left_as_it_is(satchel: Satchel, bundle: Path) -> None:
    before = contents(bundle)
    for provider in ("cann", "cuda", "cpu"):
        satchel("check", bundle, "--provider", provider, "--quiet", code=int(provider != "cpu"))
    assert contents(bundle) == before


def test_a_page_holds_every_place_and_loads_nothing(satchel: Satchel, bundle: Path, tmp_path: Path) -> None:
    put_graph(bundle, "decode", product(*DEQUANTIZED[:2], helper.make_node("MatMul", ["x", "h"], ["y"], "<b>&")))
    page = tmp_path / "check.html"
    output = satchel("check", bundle, "--provider", "cpu", "--html", page).out
    text = page.read_text(encoding="utf-8")
    assert "ready for cpu, with 1 warning" in output
    assert "&lt;b&gt;&amp;" in text
    assert "<b>" not in text
    assert "default-src 'none'" in text
    assert "<script" not in text
    assert "http" not in text.replace("http-equiv", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--provider", "tpu"], "--provider tpu: unknown: choose one of cann, cuda, cpu"),
        (["--provider", "cuda", "--ort-version", "1.20"], "--ort-version 1.20: unknown: choose one of 1.24.4, 1.30"),
        (["--provider", "cuda", "--ort-version", "new"], "--ort-version new: unknown"),
        (["--provider", "cann", "--ort-version", "2.0"], "--ort-version 2.0: unknown"),
        (["--provider", "cpu", "--ort-version", "1.24.4"], "installed ONNX Runtime"),
    ],
)
def test_wrong_options_are_refused(satchel: Satchel, bundle: Path, arguments: list[str], message: str) -> None:
    assert message in satchel.refuses("check", bundle, *arguments)


@pytest.mark.parametrize(
    ("asked", "tables"),
    [
        ("1.24.4", "ONNX Runtime 1.24.4"),
        ("1.24.1", "ONNX Runtime 1.24.4, nearest to 1.24.1"),
        ("1.27.0", "ONNX Runtime 1.24.4, nearest to 1.27.0"),
        ("1.28.0", "ONNX Runtime 1.30, nearest to 1.28.0"),
        ("1.31.1", "ONNX Runtime 1.30, nearest to 1.31.1"),
    ],
)
def test_the_nearest_table_is_taken(satchel: Satchel, bundle: Path, asked: str, tables: str) -> None:
    command = ("check", bundle, "--provider", "cuda", "--ort-version", asked, "--quiet")
    assert satchel.json(*command, code=1)["tables"] == tables


def damaged_graphs() -> dict[str, bytes]:
    whole = product(*DEQUANTIZED).SerializeToString()
    return {
        "text": b"no graph at all",
        "cut short": whole[: len(whole) // 2],
        "a name that is no text": whole.replace(b"product", b"prod\xffct"),
        "a type that there is none of": product(*DEQUANTIZED).SerializeToString().replace(b"\x08\x0a", b"\x08\x7a"),
    }


@pytest.mark.parametrize("name", damaged_graphs())
def test_a_file_that_is_no_graph_is_refused(satchel: Satchel, bundle: Path, name: str) -> None:
    replace_file(bundle, "decode.onnx", damaged_graphs()[name])
    assert "not a valid ONNX graph" in satchel.refuses("check", bundle, "--provider", "cpu", "--quiet")


def test_a_session_entry_that_is_not_for_a_bundle_is_refused(satchel: Satchel, bundle: Path) -> None:
    put_graph(bundle, "decode", product(*DEQUANTIZED), {"session.optimized_model_external_initializers_file_name": "x"})
    said = satchel.refuses("check", bundle, "--provider", "cpu", "--quiet")
    assert "session.optimized_model_external_initializers_file_name" in said


def test_a_page_that_cannot_be_written_is_refused_first(satchel: Satchel, bundle: Path, tmp_path: Path) -> None:
    assert "this is a folder" in satchel.refuses("check", bundle, "--provider", "cpu", "--html", tmp_path)


@pytest.mark.parametrize("package", ["onnx", "onnx_ir"])
def test_a_missing_package_says_what_to_install(
    satchel: Satchel, bundle: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith(("satchel.export.checking", "satchel.graphs"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    said = satchel.refuses("check", bundle, "--provider", "cpu", "--quiet")
    assert "is not installed: pip install 'onnx" in said


def test_operators_of_a_library_are_told_apart(bundle: Path, tmp_path: Path, satchel: Satchel) -> None:
    custom = write_custom_bundle(tmp_path / "custom", bundle)
    out, err = satchel("check", custom, "--provider", "cpu", "--strict", "--quiet")
    assert err == ""
    assert "P06 info: " in out and "(3 in prefill, decode, score)" in out
    assert "P01" not in out
    assert f"(it needs {LIBRARY.name})" in out
    for provider, rule in (("cuda", "U18"), ("cann", "C02")):
        result = satchel.json("check", custom, "--provider", provider, "--quiet", code=1)
        found = [place for graph in result["graphs"] for place in graph["findings"] if place["node"] == "cut"]
        assert rule in {place["rule"] for place in found}
        assert "U01" not in {place["rule"] for place in found}
    change_manifest(custom, "custom_ops", to=[])  # then nobody knows whose it is
    out = satchel("check", custom, "--provider", "cpu", "--quiet", code=1).out
    assert "P01 error: an operator has no kernel (3 in" in out


def test_names_cannot_move_the_cursor(satchel: Satchel, bundle: Path) -> None:
    put_graph(bundle, "decode", product(*DEQUANTIZED[:2], helper.make_node("MatMul", ["x", "h"], ["y"], "a\x1b[2J")))
    output = satchel("check", bundle, "--provider", "cpu", "--quiet").out
    assert "\x1b" not in output
    assert "a\\x1b[2J" in output
