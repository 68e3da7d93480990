"""The samples do what their first lines say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
from integration.conftest import CHECKOUT
from support.chat_bundle import write_chat_bundle
from support.export_command import satchel
from support.tiny_bundle import write_bundle

from satchel.runtime import Engine, open_bundle

SAMPLES = CHECKOUT / "samples"


def sample(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SAMPLES / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the sample's own module."""
    folder = tmp_path_factory.mktemp("own")
    assert sample("own_module.py", folder / "tokenizer.json").returncode == 0
    source = f"{SAMPLES / 'own_module.py'}:build"
    done = satchel("export", source, "-o", folder / "bundle", "--tokenizer", folder / "tokenizer.json")
    assert done.returncode == 0, done.stderr
    return folder / "bundle"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["own_module.py", "custom_pass.py", "train_hybrid.py"])
def test_a_sample_does_not_write_over_what_it_is_given(name: str, tmp_path: Path) -> None:
    path = tmp_path / "mine"
    path.write_text("precious")
    done = sample(name, path)
    assert (done.returncode, path.read_text(), list(tmp_path.iterdir())) == (2, "precious", [path])
    assert str(path) in done.stderr


@pytest.mark.slow
def test_the_own_module_says_what_it_has_learnt(own: Path) -> None:
    done = satchel("run", own, "A gull sat", "--raw", "--max-new-tokens", "12", "--quiet")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(" on the lid.")


@pytest.mark.slow
def test_a_pass_of_ones_own_runs_over_a_library_and_is_switched_off(tmp_path: Path) -> None:
    done = sample("custom_pass.py", tmp_path / "custom")
    assert done.returncode == 0, done.stderr
    wrote, counts, custom, plain, change = done.stdout.splitlines()
    assert str(tmp_path / "custom") in wrote
    assert counts == "passes: prefill 4, decode 4, score 4"
    assert custom.startswith("with the pass:    ' on the lid.")
    assert plain.startswith("without the pass: ' on the lid.")
    assert 0.1 < float(change.removeprefix("largest change of a logit: ")) < 10


@pytest.mark.slow
def test_the_bundles_of_a_trained_hybrid_predict_as_torch_does(tmp_path: Path) -> None:
    done = sample("train_hybrid.py", tmp_path / "hybrid", "--steps", "16", "--seed", "3")
    assert done.returncode == 0, done.stderr
    head, *rows, fp32, int8, int4 = done.stdout.splitlines()
    assert head.split() == ["perplexity", "score", "decode"]
    found = {name: np.array(figures, float) for name, *figures in map(str.split, rows)}
    assert list(found) == ["torch", "fp32", "int8", "int4"]
    assert (found["torch"] < 300).all()  # without training 512, the size of the vocabulary
    np.testing.assert_allclose(found["fp32"], found["torch"], rtol=0.0001)
    np.testing.assert_allclose(found["int8"], found["torch"], rtol=0.02)
    np.testing.assert_allclose(found["int4"], found["torch"], rtol=0.05)
    assert (found["int8"] != found["fp32"]).any()
    assert (found["int4"] != found["int8"]).any()
    assert fp32.startswith("fp32: 'By the time")
    assert int8.startswith("int8: 'By the time")
    assert re.match("int4: ['\"]By the time", int4)


@pytest.mark.slow
def test_generate_prints_the_text_as_a_stream_and_then_its_cost(own: Path) -> None:
    done = sample("generate.py", own, "A gull sat")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(" on the lid.")
    assert re.search(r"^48 tokens, \d+ tokens/s, ended by length$", done.stdout, re.MULTILINE)


def test_prompts_that_begin_alike_are_prefilled_once(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "tiny")
    done = sample("prefix_reuse.py", bundle, "--prompts", "5", "--prefix", "20", "--own", "6", "--new-tokens", "4")
    assert (done.returncode, done.stderr) == (0, "")
    prefill, reused, same = done.stdout.splitlines()
    assert re.fullmatch(r"prefill without reuse [\d.]+ s, with [\d.]+ s: [\d.]+ times less", prefill)
    assert reused == "reused 80 of 130 prompt tokens"
    assert same == "the same answers: 5 of 5"


def test_the_overhead_of_the_server_is_measured(tmp_path: Path) -> None:
    bundle = write_chat_bundle(tmp_path / "chatty")
    done = sample(
        "server_overhead.py", bundle, "--requests", "3", "--prompt-tokens", "9", "--new-tokens", "4", "--rounds", "2"
    )
    assert (done.returncode, done.stderr) == (0, "")
    *rounds, median = done.stdout.splitlines()
    assert len(rounds) == 2
    assert all(re.fullmatch(r"scheduler [\d.]+ s, server [\d.]+ s: [+-][\d.]+ %", line) for line in rounds)
    assert re.fullmatch(r"overhead of the server: [+-][\d.]+ % \(median of 2\)", median)


@pytest.mark.slow
def test_the_large_checkpoint_is_a_llama_that_transformers_reads(tmp_path: Path) -> None:
    import torch
    import transformers

    size = ("--layers", "2", "--hidden", "128", "--vocabulary", "300", "--shard-bytes", "200000")
    done = sample("make_llama_1b.py", tmp_path / "small", *size)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 2
    assert satchel("export", tmp_path / "small", "-o", tmp_path / "bundle").returncode == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    found = Engine.open(open_bundle(tmp_path / "bundle"), threads=1).score(ids)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


WORK = ("--rounds", "2", "--prompt-tokens", "8", "--new-tokens", "3", "--threads", "1")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("peers") / "tiny")


def test_compare_peers_measures_satchel_alone(tiny: Path) -> None:
    done = sample("compare_peers.py", "--satchel", f"one={tiny}", "--satchel", f"two={tiny}", *WORK, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found["median"]) == ["satchel one", "satchel two"]
    for figures in found["median"].values():
        assert list(figures) == ["prefill", "decode", "load", "rss_mb"]
        assert all(value > 0 for value in figures.values())
    assert found["ratio"] == {"satchel one": {}, "satchel two": {}}
    rounds = [f"round {number} of 2: satchel {name}" for number in (1, 2) for name in ("one", "two")]
    assert done.stderr.splitlines() == rounds


def test_compare_peers_puts_a_peer_beside_it(tiny: Path, tmp_path: Path) -> None:
    """llama-bench is not here: a script stands in that tells what it was asked for."""
    stand_in = tmp_path / "llama-bench"
    script = """#!/bin/sh
echo "$@" >> "$0.log"
echo "some chatter" >&2
case "$*" in *" -n 0"*) speed=1000 ;; *) speed=50 ;; esac
printf '[\\n  {\\n    "avg_ts": %s,\\n    "samples_ts": [ 1 ]\\n  }\\n]\\n' $speed
"""
    stand_in.write_text(script)
    stand_in.chmod(0o755)
    peer = ("--llama-bench", stand_in, "--gguf", tmp_path / "model-Q8_0.gguf")
    done = sample("compare_peers.py", "--satchel", f"tiny={tiny}", *peer, *WORK, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    theirs = found["median"]["llama.cpp model-Q8_0"]
    assert (theirs["prefill"], theirs["decode"], theirs["load"]) == (1000, 50, None)
    ratio = found["ratio"]["satchel tiny"]["llama.cpp model-Q8_0"]
    assert ratio["load"] is None
    assert ratio["decode"] == pytest.approx(found["median"]["satchel tiny"]["decode"] / 50)
    asked = Path(f"{stand_in}.log").read_text().splitlines()
    assert len(asked) == 4
    assert all("--threads 1 " in line for line in asked)
    assert [re.findall(r"-[pnd] \d+", line) for line in asked[:2]] == [["-p 8", "-n 0"], ["-p 0", "-n 3", "-d 8"]]


def test_compare_peers_says_in_a_line_which_peers_cannot_run(tiny: Path, tmp_path: Path) -> None:
    python = tmp_path / "python"  # an interpreter without any package
    venv.create(python, symlinks=True)
    named = ("--genai", tmp_path, "--genai-python", python / "bin" / "python", "--openvino", tmp_path / "nowhere")
    missing = ("--llama-bench", tmp_path / "none", "--gguf", "model.gguf", *named)
    done = sample("compare_peers.py", "--satchel", f"tiny={tiny}", "--satchel", f"bad={tmp_path}", *missing, *WORK)
    assert done.returncode == 2
    assert done.stderr == f"{tmp_path}: not a bundle (no manifest.json that tells the vocabulary)\n"
    done = sample("compare_peers.py", "--satchel", f"tiny={tiny}", *missing, *WORK)
    assert done.returncode == 1
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["prefill", "satchel"]
    left_out = {line.split(" is left out: ")[0]: line for line in done.stderr.splitlines() if "left out" in line}
    assert len(left_out) == 3
    assert "cannot be started (No such file or directory)" in left_out["llama.cpp model"]
    assert "onnxruntime-genai cannot be imported by" in left_out[f"genai {tmp_path.name}"]
    assert left_out["openvino nowhere"].endswith("nowhere: not there")
    assert "Traceback" not in done.stderr
    assert "round 2 of 2: satchel tiny" in done.stderr
    assert "round 2 of 2: genai" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "allowed"), [("Q8_0", 0.01), pytest.param("Q4_0", 0.15, marks=pytest.mark.slow)])
def test_a_llama_in_gguf_has_the_weights_of_its_checkpoint(kind: str, allowed: float, tmp_path: Path) -> None:
    from satchel.export.compile import open_source
    from satchel.export.config import ExportConfig

    small = ("--layers", "2", "--hidden", "512", "--inner", "256", "--vocabulary", "320")
    assert sample("make_llama_1b.py", tmp_path / "small", *small).returncode == 0
    done = sample("gguf_of_llama.py", tmp_path / "small", tmp_path / "small.gguf", "--type", kind)
    assert done.returncode == 0, done.stderr
    config = ExportConfig(tmp_path / "unused", precision="fp32")
    ours, theirs = (open_source(tmp_path / name, config).weights for name in ("small.gguf", "small"))
    compared = [name for name in theirs if name in ours]
    assert len(compared) > 15
    for name in compared:
        found, wanted = ours[name].numpy(), theirs[name].numpy()
        assert np.linalg.norm(found - wanted) <= allowed * np.linalg.norm(wanted), name
