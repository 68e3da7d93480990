"""The same checkpoint, options and versions give the same bytes, whatever the process that exports is like."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.checkpoints import save_tiny
from threadpoolctl import threadpool_info

from satchel.export.threads import fixed_threads
from satchel.runtime.util.cpu import machine_cores

OPTIONS = {"precision": "int8", "effort": "normal", "kv_cache": "int8"}
"""With all that an export computes: rotations, Hadamard matrices, searched and second-order rounding, scales of caches,
and a certificate."""

EXPORTS = """
import hashlib, json, sys
from pathlib import Path
import numpy as np, torch
from satchel.export import ExportConfig, export_bundle
from satchel.export.threads import fixed_threads

def products():
    random = np.random.default_rng(0)
    a, b = random.normal(size=(333, 777)), random.normal(size=(777, 555))
    x = torch.from_numpy(random.normal(size=(7, 2048)).astype("f"))
    second = (x.T @ x).double()
    second.diagonal().add_(second.diagonal().mean())
    return (a @ b).tobytes() + torch.cholesky_inverse(torch.linalg.cholesky(second)).numpy().tobytes()

source, place, options = sys.argv[1:]
with fixed_threads():
    (Path(place) / "products").write_text(hashlib.sha256(products()).hexdigest())
export_bundle(source, ExportConfig(Path(place) / "bundle", **json.loads(options)))
"""


def bound_to(cpus: set[int]) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """Exported by two processes that are as different as can be, over one checkpoint in two places."""
    places = tmp_path_factory.mktemp("twice")
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    runs = []
    for name, seed, threads, cpus in (("first", "1", "1", allowed[:1]), ("other/and_longer", "77", "2", allowed)):
        place = places / name
        place.mkdir(parents=True)
        save_tiny(place / "checkpoint", tokenizer=True)
        changed = {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        command = [sys.executable, "-c", EXPORTS, "checkpoint", str(place), json.dumps(OPTIONS)]
        runs.append(
            subprocess.Popen(
                command, cwd=place, env=os.environ | changed, preexec_fn=lambda cpus=cpus: bound_to(set(cpus))
            )
        )
    assert [run.wait(timeout=300) for run in runs] == [0, 0]
    yield places / "first", places / "other" / "and_longer"


@pytest.mark.slow
def test_two_exports_give_the_same_files(twice: tuple[Path, Path]) -> None:
    first, second = (digests(place / "bundle") for place in twice)
    assert "weights.bin" in first
    assert first == second


@pytest.mark.slow
def test_two_exports_give_the_same_manifest_but_for_times(twice: tuple[Path, Path]) -> None:
    first, second = (json.loads((place / "bundle" / "manifest.json").read_text()) for place in twice)
    for manifest in (first, second):
        del manifest["certificate"]["speed"]
    assert first["certificate"]["prompts"]
    assert first == second


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.iterdir()) if path.name != "manifest.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_products_and_factors_do_not_hang_on_the_threads_of_the_process(twice: tuple[Path, Path]) -> None:
    """On a machine of two cores or more these very sums differ between one thread and two."""
    first, second = ((place / "products").read_text() for place in twice)
    assert first == second


def blas_threads() -> set[int]:
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


def test_the_threads_of_a_process_come_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(machine_cores() + 1)
    blas = blas_threads()
    with fixed_threads():
        assert torch.get_num_threads() == machine_cores()
        assert blas_threads() == {1}
    assert (torch.get_num_threads(), blas_threads()) == (machine_cores() + 1, blas)
    torch.set_num_threads(before)
