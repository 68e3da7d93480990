"""The samples do what their first lines say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from integration.conftest import CHECKOUT
from support.export_command import satchel

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


def test_the_own_module_says_what_it_has_learnt(own: Path) -> None:
    done = satchel("run", own, "A gull sat", "--max-new-tokens", "12", "--quiet")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(" on the lid.")


def test_every_layer_of_the_own_module_is_fused(own: Path) -> None:
    passes = json.loads((own / "manifest.json").read_text())["passes"]
    counts = {entry["pass"]: entry["count"] for entry in passes if entry["graph"] == "common"}
    assert (counts["fuse_rotary"], counts["fuse_attention"], counts["expand_attention"]) == (8, 4, 0)


def test_generate_prints_the_text_as_a_stream_and_then_its_cost(own: Path) -> None:
    done = sample("generate.py", own, "A gull sat")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(" on the lid.")
    assert re.search(r"^48 tokens, \d+ tokens/s, ended by length$", done.stdout, re.MULTILINE)


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


def test_peak_memory_counts_what_children_hold_and_keeps_the_exit_code() -> None:
    child = "x = bytearray(100 << 20); import time; time.sleep(0.2)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}]); sys.exit(3)"
    done = sample("peak_memory.py", sys.executable, "-c", code)
    assert done.returncode == 3
    found = re.search(r"^peak anonymous memory: (\d+) MiB$", done.stderr, re.MULTILINE)
    assert found is not None
    assert 100 <= int(found[1]) < 150
