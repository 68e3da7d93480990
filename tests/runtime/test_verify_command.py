"""`satchel verify`: OK for the bundle that was certified, and a line for each mismatch of one that was changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from support.command import Satchel
from support.tiny_bundle import VOCABULARY, read_manifest, replace_file, write_manifest


@pytest.fixture
def changed(certified: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes a copy whose manifest is changed as told."""

    def make(change: Callable[[dict[str, Any]], None] = lambda manifest: None) -> Path:
        folder = Path(shutil.copytree(certified, tmp_path / "changed"))
        manifest = read_manifest(folder)
        change(manifest)
        write_manifest(folder, manifest)
        return folder

    return make


def test_the_bundle_that_was_certified_holds(satchel: Satchel, certified: Path) -> None:
    out, err = satchel("verify", certified, "--threads", 1)
    assert (err, out.splitlines()[-1]) == ("", "OK")
    found = satchel.json("verify", certified, "--threads", 1)
    assert (found["bundle"], found["ok"], found["mismatches"]) == (str(certified), True, [])
    assert found["kl"]["found"] == pytest.approx(found["kl"]["recorded"], abs=1e-6)
    assert [(p["same_tokens"], p["new_tokens"]) for p in found["prompts"]] == [(16, 16), (8, 8)]
    assert found["onnxruntime"] == dict.fromkeys(("recorded", "found"), onnxruntime.__version__)


def mismatches(out: str) -> list[str]:
    assert "OK" not in out
    return [line.removeprefix("MISMATCH ") for line in out.splitlines() if line.startswith("MISMATCH ")]


def test_other_weights_fail(satchel: Satchel, certified: Path, changed: Callable[..., Path]) -> None:
    weights = np.frombuffer((certified / "weights.bin").read_bytes(), np.float32).copy()
    weights[: len(weights) // 2] += 0.3
    folder = changed()
    replace_file(folder, "weights.bin", weights.tobytes())
    out, err = satchel("verify", folder, "--threads", 1, code=1)
    assert err == ""
    assert mismatches(out)[0].startswith("prompt 1: KL ")
    assert mismatches(out)[-1].startswith("all prompts: KL ")
    found = satchel.json("verify", folder, "--threads", 1, code=1)
    assert (found["ok"], found["mismatches"]) == (False, mismatches(out))


def test_a_tokenizer_that_encodes_otherwise_fails(satchel: Satchel, changed: Callable[..., Path]) -> None:
    def corpus(manifest: dict[str, Any]) -> None:
        manifest["tokenizer"]["corpus"] = [{"text": "the cat", "ids": [5]}]

    out, err = satchel("verify", changed(corpus), "--threads", 1, code=1)
    (mismatch,) = mismatches(out)
    assert err == ""
    assert "tokenizer.json" in mismatch
    assert "the cat" in mismatch


def test_a_bundle_without_certificate_cannot(satchel: Satchel, tiny: Path) -> None:
    assert f"{tiny}: has no certificate" in satchel.refuses("verify", tiny)


def test_a_text_that_differs_after_a_near_tie_is_explained(satchel: Satchel, changed: Callable[..., Path]) -> None:
    def other_token(manifest: dict[str, Any]) -> None:
        prompt = manifest["certificate"]["prompts"][0]
        prompt["greedy_ids"][6] = (prompt["greedy_ids"][6] + 1) % VOCABULARY
        prompt["gaps"][6] = 0.03

    out, _ = satchel("verify", changed(other_token), "--threads", 1)
    assert out.splitlines()[-1] == "OK"
    assert "prompt 1: the text differs from token 7 on" in out
    assert "0.03 logits" in out
