"""`satchel doctor` says what is installed, what the machine can do, and what runs of a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import onnxruntime
import pytest

from satchel.runtime.bundle.certificate import PhaseFidelity
from satchel.runtime.bundle.reader import read_bundle
from satchel.runtime.cli import main as cli
from satchel.runtime.kernels import library
from satchel.runtime.ort import machine
from satchel.runtime.tools import doctor
from satchel.runtime.util import kl


def facts(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, dict[str, dict[str, object]]]:
    code = cli.main(["doctor", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_it_says_what_is_here_in_ten_lines(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", str(tiny)]) == 0
    out, err = capsys.readouterr()
    assert (out.count("\n"), err) == (10, "")
    assert onnxruntime.__version__ in out
    assert f"satchel specialize {tiny}" in out


def test_json_has_the_facts(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = facts(capsys, tiny)
    assert (code, found["works"]) == (0, True)
    assert found["onnxruntime"]["tested"] is True
    assert found["kernels"]["run"] is (library.reason() is None)
    assert (found["bundle"]["target"], found["bundle"]["fits"], found["speed"]["specialized"]) == ("cpu", True, False)


def test_a_failed_background_attempt_gives_its_reason(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert machine.note_attempts(read_bundle(tiny), 1, "the disk is full")
    assert "the disk is full" in str(facts(capsys, tiny)[1]["speed"]["reason"])


def test_a_bundle_that_does_not_open_is_broken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = facts(capsys, tmp_path / "nowhere")
    assert (code, found["works"]) == (1, False)
    assert "nowhere" in found["bundle"]["error"]


@pytest.mark.parametrize(("version", "tested", "code"), [("1.24.4", False, 1), ("1.99.0", False, 0)])
def test_an_onnx_runtime_outside_the_tested_range_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], version: str, tested: bool, code: int
) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", version)
    assert facts(capsys)[0] == code
    assert doctor._onnxruntime().facts["tested"] is tested


def test_a_specialized_bundle_says_what_runs_each_phase(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    bundle = shutil.copytree(tiny, tmp_path / "bundle")
    assert cli.main(["specialize", str(bundle), "--threads", "1", "--quiet"]) == 0
    speed = facts(capsys, bundle)[1]["speed"]
    assert speed["specialized"] is True
    assert speed["prefill"] and speed["decode"]


def test_a_certificate_is_shown_with_its_grade() -> None:
    phases = {
        "prefill": PhaseFidelity(0.004, 0.001, 0.01, 0.96, 20.0, 20.1),
        "decode": PhaseFidelity(0.9, 0.5, 2.0, 0.5, 20.0, 20.1),
    }
    finding = doctor._certificate(SimpleNamespace(**phases))  # type: ignore[arg-type]
    assert finding.facts["decode"] == {"kl_mean": 0.9, "top1": 0.5}
    for part in ("0.00400", "96.0%", "0.90000", kl.grade(0.9)):
        assert part in finding.text
