"""SmolLM2-135M cut for several ranks, among which its 9 query heads and 3 key heads cannot be divided evenly."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from integration.conftest import NEW_TOKENS, PROMPT
from support import rank_steps
from support.export_command import satchel
from support.ranks import needs_mpi, together
from support.shared import made_once
from support.specialized import specialize_for_satchel

from satchel.runtime import Engine, Generator, open_bundle
from satchel.runtime.bundle.manifest import Manifest
from satchel.runtime.bundle.ranks import rank_folder
from satchel.runtime.cli.main import main

pytestmark = [pytest.mark.slow, needs_mpi]

TOLERANCE = 1e-4
"""Of the largest logit, for float weights: sums over ranks are in another order. With quantized ones bits are equal."""
KV_HEADS = {2: [2, 2], 3: [1, 1, 1], 4: [1, 1, 1, 1]}
CASES = [
    ("fp32", 2, "portable"),
    ("fp32", 3, "portable"),
    ("int8", 2, "satchel"),
    ("int8", 4, "portable"),
    ("int4", 3, "satchel"),
]


def exported(precision: str, kernels: str, gguf: Path, request: pytest.FixtureRequest) -> Path:
    if precision == "fp32":
        found: Path = request.getfixturevalue("smollm2")
        return found

    def make(folder: Path) -> None:
        options = ("--precision", precision, "--effort", "quick", "--no-certificate")
        done = satchel("export", gguf, "-o", folder / "portable", *options)
        assert done.returncode == 0, done.stderr
        shutil.copytree(folder / "portable", folder / "satchel")
        specialize_for_satchel(folder / "satchel")

    return made_once(request.getfixturevalue("tmp_path_factory"), f"smollm2-quick-{precision}", make) / kernels


@pytest.mark.parametrize(("precision", "ranks", "kernels"), CASES)
def test_ranks_give_the_logits_and_tokens_of_one_process(
    precision: str, ranks: int, kernels: str, gguf: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    whole, cut = exported(precision, kernels, gguf, request), tmp_path / "cut"
    ids = Generator.open(whole, threads=1).encode(PROMPT)
    np.save(tmp_path / "ids.npy", ids)
    assert main(["shard", str(whole), "--tensor-parallel", str(ranks), "-o", str(cut), "--quiet"]) == 0
    folders = [rank_folder(cut, rank) for rank in range(ranks)]
    caches = [Manifest.read(folder / "manifest.json").kv_cache for folder in folders]
    assert [layer.kv_heads for each in caches for layer in each.layers[:1]] == KV_HEADS[ranks]
    for folder in folders if kernels == "satchel" else ():
        specialize_for_satchel(folder)
    done = together(ranks, rank_steps.__file__, cut, tmp_path / "ids.npy", tmp_path / "found.npz", timeout=600)
    assert done.returncode == 0, done.stderr
    found = dict(np.load(tmp_path / "found.npz"))
    alone = rank_steps.steps(Engine.open(open_bundle(whole), threads=1), ids, NEW_TOKENS)
    assert found["tokens"].tolist() == alone["tokens"].tolist()
    assert len(alone["tokens"]) == NEW_TOKENS
    tolerance = TOLERANCE if precision == "fp32" else 0
    keys = ("logits", "together", "copied", *(("score",) if kernels == "portable" else ()))
    for key in keys:  # ranks score by the portable graph
        assert np.abs(found[key] - alone[key]).max() <= tolerance * np.abs(alone[key]).max(), key
