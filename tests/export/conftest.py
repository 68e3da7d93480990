"""One tiny checkpoint and the bundle of it for all tests that only read them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.checkpoints import save_tiny
from support.shared import made_once

from satchel.export import ExportConfig, export_bundle


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "tiny-checkpoint", lambda folder: save_tiny(folder, tokenizer=True))


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        export_bundle(tiny_checkpoint, ExportConfig(folder / "tiny", precision="fp32"))

    return made_once(tmp_path_factory, "tiny-bundle", make) / "tiny"


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    """The export command takes over SIGTERM: give it back."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)
