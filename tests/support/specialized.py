"""What tests of specialized bundles look at and change, whichever kernels these are for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from support.tiny_bundle import read_manifest, write_manifest

from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.execution.engine import Engine

IDS = [3, 1, 4, 1, 5, 9, 2, 6]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def logits(bundle: Bundle) -> np.ndarray:
    engine = Engine.open(bundle, threads=1)
    state = engine.new_state(16)
    return np.stack([engine.prefill(state, IDS).copy(), *(engine.decode(state, token).copy() for token in IDS)])


def specialize_for_satchel(folder: Path) -> None:
    """Let satchel's own kernels run a bundle, in a process of its own."""
    line = [sys.executable, "-m", "satchel", "specialize", str(folder), "--kernels", "satchel", "--quiet"]
    subprocess.run(line, check=True)


def change(folder: Path, **values: Any) -> None:
    manifest = read_manifest(folder)
    manifest["specialized"] |= values
    write_manifest(folder, manifest)
