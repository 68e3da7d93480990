"""One tiny checkpoint and the bundle of it for all tests that only read them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.checkpoints import save_tiny
from support.command import Said, Satchel
from support.export_command import in_float, tree
from support.shared import made_once
from support.traced import traced_once, translations_read_once

from satchel.export import ExportConfig, export_bundle
from satchel.export.tracing.trace import trace
from satchel.runtime.kernels.library import OFF, SWITCH


@pytest.fixture(scope="session", autouse=True)
def _one_trace_of_each_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        translations_read_once(patch)
        patch.setattr("satchel.export.compile.trace", traced_once(tmp_path_factory, trace))
        yield


@pytest.fixture
def portable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Certificates of the portable graphs: satchel's kernels round the inputs of layers to int8."""
    monkeypatch.setenv(SWITCH, OFF)


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


@pytest.fixture
def export(satchel: Satchel) -> Callable[..., Said]:
    """`satchel export` of these arguments; see `in_float`."""
    return lambda *arguments: satchel("export", *in_float(*arguments))


@pytest.fixture
def refused(satchel: Satchel, tmp_path: Path) -> Callable[..., None]:
    """Checks that an export is refused in one line that holds each of `says`, and changes nothing in the folder."""

    def check(source: str | Path, *options: str | Path, says: tuple[str, ...], output: Path | None = None) -> None:
        before = tree(tmp_path)
        said = satchel.refuses("export", *in_float(source, "-o", output or tmp_path / "bundle", *options, "--quiet"))
        for part in says:
            assert part in said
        assert tree(tmp_path) == before

    return check
