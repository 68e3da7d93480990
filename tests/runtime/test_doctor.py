"""`satchel doctor` says what is installed, what the machine can do, and what runs of a bundle."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import onnxruntime
import pytest
from support.command import Satchel

from satchel.runtime.bundle.certificate import PhaseFidelity
from satchel.runtime.bundle.reader import read_bundle
from satchel.runtime.kernels import library
from satchel.runtime.ort import machine
from satchel.runtime.tools import doctor
from satchel.runtime.util import kl


def test_it_says_what_is_here_in_ten_lines(satchel: Satchel, tiny: Path) -> None:
    out, err = satchel("doctor", tiny)
    assert (out.count("\n"), err) == (10, "")
    assert onnxruntime.__version__ in out
    assert f"satchel specialize {tiny}" in out


def test_json_has_the_facts(satchel: Satchel, tiny: Path) -> None:
    found = satchel.json("doctor", tiny)
    assert found["works"]
    assert found["onnxruntime"]["tested"] is True
    assert found["kernels"]["run"] is (library.reason() is None)
    assert (found["bundle"]["target"], found["bundle"]["fits"], found["speed"]["specialized"]) == ("cpu", True, False)


def test_a_failed_background_attempt_gives_its_reason(
    satchel: Satchel, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert machine.note_attempts(read_bundle(tiny), 1, "the disk is full")
    assert "the disk is full" in satchel.json("doctor", tiny)["speed"]["reason"]


def test_a_bundle_that_does_not_open_is_broken(satchel: Satchel, tmp_path: Path) -> None:
    found = satchel.json("doctor", tmp_path / "nowhere", code=1)
    assert not found["works"]
    assert "nowhere" in found["bundle"]["error"]


@pytest.mark.parametrize(("version", "code"), [("1.24.4", 1), ("1.99.0", 0)])
def test_an_onnx_runtime_outside_the_tested_range_is_told(
    satchel: Satchel, monkeypatch: pytest.MonkeyPatch, version: str, code: int
) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", version)
    assert satchel.json("doctor", code=code)["onnxruntime"]["tested"] is False


def test_a_specialized_bundle_says_what_runs_each_phase(satchel: Satchel, tiny: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(tiny, tmp_path / "bundle")
    satchel("specialize", bundle, "--threads", 1, "--quiet")
    speed = satchel.json("doctor", bundle)["speed"]
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
