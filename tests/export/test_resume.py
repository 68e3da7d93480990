"""An export that was interrupted while it rounded goes on from there, and gives the same bytes."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import save_tiny
from support.command import Satchel
from support.export_command import SATCHEL

from satchel.export import ExportConfig, ExportError
from satchel.export.compile import export_bundle
from satchel.export.quantize import quantize as steps

OPTIONS = {"precision": "int4", "kv_cache": "int8", "certificate": False, "max_context": 128}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "text.txt"
    file.write_text("the cat sat on the mat and looked at the moon. " * 200)
    return file


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("checkpoints") / "tiny", tokenizer=True)


@pytest.fixture(scope="module")
def whole(checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of an export that nobody interrupted."""
    bundle = tmp_path_factory.mktemp("bundles") / "bundle"
    export_bundle(checkpoint, ExportConfig(bundle, calibrate=text, **OPTIONS))
    return bundle


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def interrupts(name: str, after: int, calls: list[str]) -> Callable[..., Any]:
    """The function of that name in the steps of quantization; it notes its calls, and one call is too many."""
    real = getattr(steps, name)

    def counted(*arguments: Any, **options: Any) -> Any:
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(str(getattr(arguments[0], "name", "")))
        return real(*arguments, **options)

    return counted


def of_a_dead_process(folder: Path) -> Path:
    """Rename the only hidden folder in `folder`, so that it belongs to a process that has ended."""
    (left,) = folder.glob(".bundle.scratch-*")
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return left.rename(folder / f".bundle.scratch-{process.pid}-1")


def interrupted(
    checkpoint: Path,
    config: ExportConfig,
    monkeypatch: pytest.MonkeyPatch,
    *,
    name: str = "round_weight",
    after: int = 5,
) -> list[str]:
    calls: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(steps, name, interrupts(name, after, calls))
        with pytest.raises(KeyboardInterrupt):
            export_bundle(checkpoint, config, progress=True)
    return calls


@pytest.mark.parametrize(("name", "after"), [("round_weight", 5), ("round_weight", 1), ("kept_grid", 7)])
def test_it_goes_on_and_gives_the_same_bytes(
    name: str, after: int, checkpoint: Path, text: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ExportConfig(tmp_path / "bundle", calibrate=text, **OPTIONS)
    before = interrupted(checkpoint, config, monkeypatch, name=name, after=after)
    of_a_dead_process(tmp_path)
    calls: list[str] = []
    monkeypatch.setattr(
        "satchel.export.quantize.observe._observe", lambda *_: pytest.fail("the text was observed again")
    )
    monkeypatch.setattr(steps, name, interrupts(name, -1, calls))
    export_bundle(checkpoint, dataclasses.replace(config, resume=True))
    assert set(calls).isdisjoint(before)
    assert contents(tmp_path / "bundle") == contents(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_it_may_be_interrupted_twice_and_while_it_writes(
    checkpoint: Path, text: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ExportConfig(tmp_path / "bundle", calibrate=text, **OPTIONS)
    interrupted(checkpoint, config, monkeypatch, after=3)
    again = dataclasses.replace(config, resume=True)
    of_a_dead_process(tmp_path)
    assert len(interrupted(checkpoint, again, monkeypatch, after=4)) == 4
    of_a_dead_process(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("satchel.export.compile.write_bundle", interrupts("cache_scales", 0, []))
        with pytest.raises(KeyboardInterrupt):
            export_bundle(checkpoint, again)
    of_a_dead_process(tmp_path)
    monkeypatch.setattr(steps, "round_weight", lambda *_, **__: pytest.fail("a weight was rounded again"))
    export_bundle(checkpoint, again)
    assert contents(tmp_path / "bundle") == contents(whole)


@pytest.mark.parametrize(
    "change",
    [
        {"precision": "a16w4"}, {"max_context": 64}, {"kv_cache": "float"},
        {"calibrate": None}, {"effort": "quick", "calibrate": None, "kv_cache": "float"},
    ],
    ids=str,
)  # fmt: skip
def test_other_options_are_refused_before_any_work(
    change: dict[str, Any], checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ExportConfig(tmp_path / "bundle", calibrate=text, **OPTIONS)
    interrupted(checkpoint, config, monkeypatch)
    left = of_a_dead_process(tmp_path)
    monkeypatch.setattr("satchel.export.compile.trace_source", lambda *_: pytest.fail("the model was traced"))
    with pytest.raises(ExportError, match=sorted(change)[0]):
        export_bundle(checkpoint, ExportConfig(**{**dataclasses.asdict(config), **change, "resume": True}))
    assert list(tmp_path.iterdir()) == [left]


def test_another_checkpoint_is_refused(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, satchel: Satchel
) -> None:
    own = Path(shutil.copytree(checkpoint, tmp_path / "own"))
    interrupted(own, ExportConfig(tmp_path / "bundle", calibrate=text, **OPTIONS), monkeypatch)
    of_a_dead_process(tmp_path)
    os.utime(own / "model.safetensors", ns=(1, 1))
    found = satchel.refuses(
        "export", own, "-o", tmp_path / "bundle", "-p", "int4", "--kv-cache", "int8", "--no-certificate",
        "--max-context", "128", "--calibrate", text, "--resume", "--quiet",
    )  # fmt: skip
    assert "model.safetensors" in found


def test_what_cannot_be_resumed_is_refused(checkpoint: Path, tmp_path: Path, satchel: Satchel) -> None:
    satchel.refuses("export", checkpoint, "-o", tmp_path / "bundle", "-p", "fp32", "--resume", "--quiet")
    assert list(tmp_path.iterdir()) == []


def test_a_quick_export_leaves_nothing_unless_it_may_be_resumed(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ExportConfig(tmp_path / "bundle", precision="int8", certificate=False)
    interrupted(checkpoint, config, monkeypatch)
    assert list(tmp_path.iterdir()) == []
    assert "--resume" not in capsys.readouterr().err
    interrupted(checkpoint, dataclasses.replace(config, resume=True), monkeypatch)
    assert "--resume" in capsys.readouterr().err.splitlines()[-1]
    of_a_dead_process(tmp_path)
    export_bundle(checkpoint, config)  # without it, an export starts anew and removes what is left
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.slow
def test_a_killed_command_goes_on(checkpoint: Path, text: Path, whole: Path, tmp_path: Path) -> None:
    command = [
        *SATCHEL, "export", str(checkpoint), "-o", str(tmp_path / "bundle"), "-p", "int4", "--kv-cache", "int8",
        "--no-certificate", "--max-context", "128", "--calibrate", str(text), "--quiet",
    ]  # fmt: skip
    with subprocess.Popen(command) as process:
        deadline = time.monotonic() + 120
        while not any(tmp_path.glob(".bundle.scratch-*/rounding/codes/3.npz")):
            assert time.monotonic() < deadline
            assert process.poll() is None, "the export was too fast"
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "bundle").exists()
    subprocess.run([*command, "--resume"], check=True, timeout=120)
    assert contents(tmp_path / "bundle") == contents(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
