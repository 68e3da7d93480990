"""The commands over a bundle of static graphs: they work as over any other, or say why they cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from support.chat_bundle import END, TEMPLATE, chat_tokenizer
from support.command import Satchel
from support.tiny_bundle import (
    HEAD_DIM,
    KV_HEADS,
    LAYERS,
    VOCABULARY,
    change_manifest,
    replace_file,
    write_bundle,
)
from support.tiny_static_bundle import write_static_bundle

from satchel.runtime.bundle import strict_json
from satchel.runtime.errors import BundleError
from satchel.runtime.evaluation.certify import make_certificate
from satchel.runtime.evaluation.selftest import selftest
from satchel.runtime.execution.engine import Engine
from satchel.runtime.ort.open_bundle import open_bundle
from satchel.runtime.tools.bench.decode_traffic import weight_bytes

CONTEXT = 256
OPTIONS: dict[str, Any] = {
    "tokenizer": chat_tokenizer(),
    "eos_token_ids": (END,),
    "max_context": CONTEXT,
    "companions": {"chat_template.jinja": TEMPLATE.encode()},
}


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundles") / "dynamic", **OPTIONS)


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory, dynamic: Path) -> Path:
    """Certified by the dynamic graphs of the same weights."""
    folder = write_static_bundle(tmp_path_factory.mktemp("bundles") / "static", lengths=(8, 32), parts=2, **OPTIONS)
    engine = Engine.open(open_bundle(dynamic), threads=1)
    windows = [np.random.default_rng(3).integers(3, VOCABULARY, 24)]
    certificate = make_certificate(engine, engine.score, None, windows, [(0, 4, 12)], skip=4)
    change_manifest(folder, "certificate", to=strict_json.to_json(certificate))
    return folder


def test_run_and_eval_give_what_dynamic_graphs_give(
    satchel: Satchel, static: Path, dynamic: Path, tmp_path: Path
) -> None:
    for flags in ([], ["--beams", 2], ["--num-return-sequences", 2, "--temperature", 1.2, "--seed", 3]):
        command = ("the cat", "--max-new-tokens", 9, *flags, "--quiet")
        assert satchel("run", dynamic, *command) == satchel("run", static, *command)
    text = tmp_path / "text.txt"
    text.write_text("the cat and the dog and the cat " * 9)
    found = satchel.json("eval", static, "--text", text, "--reference", dynamic, "--skip", 2)
    assert found["prefill"]["kl_mean"] < 1e-9
    assert found["decode"]["kl_mean"] < 1e-9


def test_verify_reports_ok(satchel: Satchel, static: Path) -> None:
    assert satchel("verify", static).out.endswith("OK\n")


def test_bench_and_profile_measure_all_parts(satchel: Satchel, static: Path) -> None:
    work = ("--prompt-tokens", 41, "--new-tokens", 3)
    speeds = satchel.json("bench", static, *work)
    assert min(speeds["prefill"], speeds["decode"]) > 0
    profile = satchel.json("profile", static, *work)
    assert (profile["prefill"]["runs"], profile["decode"]["runs"]) == (2 * 2, 2)  # 32 + 9 tokens, in two parts
    operators = {row["operator"]: row["count"] for row in profile["decode"]["operators"]}
    assert operators["Softmax"] == LAYERS


def test_inspect_names_every_graph_and_both_caches(satchel: Satchel, static: Path) -> None:
    found = satchel.json("inspect", static)
    assert len(found["graphs"]) == 2 * len(("prefill of 8", "prefill of 32", "decode", "score of 8"))
    numbers = LAYERS * KV_HEADS * 2 * HEAD_DIM
    assert found["cache_bytes_per_token"] == 2 * 4 * numbers


def test_specialize_refuses(satchel: Satchel, static: Path) -> None:
    assert "static graphs for cann" in satchel.refuses("specialize", static)


def test_the_bytes_of_a_step_are_those_of_all_parts(static: Path, dynamic: Path, tmp_path: Path) -> None:
    wanted, shapes = weight_bytes(open_bundle(dynamic)), 2048  # constants of a few numbers count, too
    assert wanted <= weight_bytes(open_bundle(static)) < wanted + shapes
    inside = write_static_bundle(tmp_path / "inside", **OPTIONS)
    content = onnx.load(inside / "decode-1-0.onnx").SerializeToString()  # with its weights
    replace_file(inside, "decode-1-0.onnx", content)
    assert wanted <= weight_bytes(open_bundle(inside)) < wanted + shapes


def test_the_selftest_passes_and_finds_a_wrong_graph(static: Path, tmp_path: Path) -> None:
    selftest(static)
    for name, phase in (("score-8-0.onnx", "score"), ("prefill-32-0.onnx", "score"), ("decode-1-0.onnx", "decode")):
        wrong = write_static_bundle(tmp_path / name, lengths=(8, 32), max_context=CONTEXT)
        model = onnx.load(wrong / name, load_external_data=False)
        scale = next(each for each in model.graph.initializer if each.name == "scale")
        scale.CopyFrom(numpy_helper.from_array(np.float32(0.4), "scale"))
        (wrong / name).write_bytes(model.SerializeToString())
        with pytest.raises(BundleError, match=f"the {phase} graph differs from the prefill graph"):
            selftest(wrong)
