"""The commands on a bundle whose layers keep states: sizes are told, and what they measure and compare is right."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from support.command import Satchel
from support.tiny_bundle import VOCABULARY, read_manifest, replace_file, write_manifest
from support.tiny_hybrid import HEAD_DIM, KV_HEADS, PATTERN, expected, write_hybrid

from satchel.runtime.bundle import strict_json
from satchel.runtime.errors import BundleError, PromptError
from satchel.runtime.evaluation.certify import make_certificate
from satchel.runtime.evaluation.selftest import selftest
from satchel.runtime.execution.engine import Engine
from satchel.runtime.ort.open_bundle import open_bundle
from satchel.runtime.tools.bench import bandwidth
from satchel.runtime.tools.bench.bandwidth import Bandwidth

PATTERNS = {"hybrid": PATTERN, "recurrent": ("linear", "linear", "plain")}
STATES = {"hybrid": 4352, "recurrent": 3584}  # bytes
POSITION = {"hybrid": 2 * 2 * 16 * 4, "recurrent": 0}  # bytes


@pytest.fixture(scope="module", params=list(PATTERNS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hybrid(tmp_path_factory.mktemp(name) / "bundle", PATTERNS[name])


def test_the_bytes_of_states_are_told(satchel: Satchel, folder: Path, name: str) -> None:
    found = satchel.json("inspect", folder)
    assert (found["state_bytes"], found["cache_bytes_per_token"]) == (STATES[name], POSITION[name])
    assert found["states"] == read_manifest(folder)["states"]
    assert f"{STATES[name]:,} bytes" in satchel("inspect", folder).out
    assert satchel.json("doctor", folder)["bundle"]["cache_bytes"] == STATES[name] + 64 * POSITION[name]


def test_run_tells_them_apart_from_the_cache(satchel: Satchel, folder: Path, name: str) -> None:
    found = satchel.json("run", folder, "abc", "-n", 4, "--threads", 1)
    positions = found["prompt_tokens"] + 3
    assert found["kv_bytes"] == STATES[name] + positions * POSITION[name]
    _, err = satchel("run", folder, "abc", "-n", 4, "--threads", 1)
    cache = f"KV cache {positions * POSITION[name] / 1024:.1f} KiB, " if POSITION[name] else ""
    assert err.rstrip().endswith(f"), {cache}states {STATES[name] / 1024:.1f} KiB")


def test_inspect_counts_the_layers_of_each_kind(satchel: Satchel, folder: Path, name: str) -> None:
    states = {
        "hybrid": "conv and recurrent states in 2; conv states in 1",
        "recurrent": "conv and recurrent states in 2",
    }
    caches = f"1 with {KV_HEADS} KV heads of {HEAD_DIM}; " if POSITION[name] else ""
    out = satchel("inspect", folder).out
    assert re.search(rf"^  layers +{caches}{states[name]}$", out, re.MULTILINE)
    assert ("per token" in out) is ("\nKV cache and states\n" in out) is (name == "hybrid")


def test_a_limit_of_the_cache_does_not_advise_to_specialize(folder: Path) -> None:
    with pytest.raises(PromptError, match=r"--kv-cache-mib 3: .*fixed memory: lower --batch"):
        Engine.open(open_bundle(folder), threads=1).new_pool(2, 16, 0, 3 << 20)


def test_a_step_reads_the_states_once(
    satchel: Satchel, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bandwidth, "measure_in_child", lambda: Bandwidth(2.5, 3, 64))
    work = ("bench", folder, "--threads", 1, "--prompt-tokens", 8, "--new-tokens", 3, "--bandwidth")
    one = satchel.json(*work)["bytes_per_step"]
    assert satchel.json(*work, "--batch", 3)["bytes_per_step"] == one + 2 * (STATES[name] + 10 * POSITION[name])


def test_a_profile_has_each_layer(satchel: Satchel, folder: Path, name: str) -> None:
    found = satchel.json("profile", folder, "--prompt-tokens", 20, "--new-tokens", 4, "--threads", 1)
    for phase in ("prefill", "decode"):
        layers = [row["layer"] for row in found[phase]["layers"]]
        assert {0, 1} <= set(layers)
        assert (3 in layers) is (name == "hybrid")


def test_the_selftest_passes_and_finds_a_wrong_graph(folder: Path, tmp_path: Path) -> None:
    selftest(folder)
    wrong = Path(shutil.copytree(folder, tmp_path / "wrong"))
    model = onnx.load(wrong / "decode.onnx", load_external_data=False)
    two = next(each for each in model.graph.initializer if each.name == "two")  # in the decay
    two.CopyFrom(numpy_helper.from_array(np.float32(-3), "two"))
    replace_file(wrong, "decode.onnx", model.SerializeToString())
    with pytest.raises(BundleError, match="the decode graph differs from the score graph"):
        selftest(wrong)


def test_a_certificate_holds_and_eval_agrees_with_numpy(
    satchel: Satchel, folder: Path, name: str, tmp_path: Path
) -> None:
    certified = Path(shutil.copytree(folder, tmp_path / "certified"))
    engine = Engine.open(open_bundle(folder), threads=1)
    windows = [np.random.default_rng(2).integers(3, VOCABULARY, 20)]

    def reference(ids: np.ndarray) -> np.ndarray:
        return expected(ids, PATTERNS[name]).astype(np.float32)

    certificate = make_certificate(engine, reference, None, windows, [(0, 4, 16), (0, 9, 8)], skip=4)
    assert certificate.prefill.kl_mean == pytest.approx(0, abs=1e-6)
    assert certificate.decode.kl_mean == pytest.approx(0, abs=1e-6)
    write_manifest(certified, {**read_manifest(certified), "certificate": strict_json.to_json(certificate)})
    assert satchel.json("verify", certified, "--threads", 1)["ok"]


def test_a_graph_without_its_state_is_refused(satchel: Satchel, folder: Path, tmp_path: Path) -> None:
    wrong = Path(shutil.copytree(folder, tmp_path / "wrong"))
    model = onnx.load(wrong / "prefill.onnx", load_external_data=False)
    value = next(each for each in model.graph.input if each.name == "past.0.conv")
    value.type.tensor_type.shape.dim[2].dim_value = 7
    replace_file(wrong, "prefill.onnx", model.SerializeToString())
    found = satchel.refuses("run", wrong, "abc")
    assert "prefill.onnx: past.0.conv is" in found
    assert "7]" in found
    document = read_manifest(folder)
    document["states"][0]["shape"] = [64, 7]
    write_manifest(wrong, document)
    assert "past.0.conv" in satchel.refuses("run", wrong, "abc")


def test_packed_specialized_and_in_a_batch_it_gives_the_same_text(
    satchel: Satchel, folder: Path, tmp_path: Path
) -> None:
    flags = ("-n", 6, "--threads", 1)
    wanted = satchel.json("run", folder, "abc", *flags)["text"]
    satchel("pack", folder, "-o", tmp_path / "model.pyz", "--quiet")
    assert satchel.json("run", tmp_path / "model.pyz", "abc", *flags)["text"] == wanted
    satchel("unpack", tmp_path / "model.pyz", "-o", tmp_path / "unpacked", "--quiet")
    satchel("specialize", tmp_path / "unpacked", "--threads", 1, "--quiet")
    assert satchel.json("run", tmp_path / "unpacked", "abc", *flags)["text"] == wanted
    lines = tmp_path / "in.jsonl"
    lines.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in ("a longer text", "abc", "x")))
    satchel("run", folder, "--input", lines, "--output", tmp_path / "out.jsonl", *flags, "--batch", 3, "--quiet")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert rows[1]["text"] == wanted
