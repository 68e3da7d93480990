"""The arithmetic of this machine, as `satchel plan` measures it."""

from __future__ import annotations

import subprocess

import pytest
from support.kernels import needs_kernels

from satchel.runtime.errors import SatchelError
from satchel.runtime.kernels.library import SWITCH
from satchel.runtime.tools.bench import compute


@needs_kernels
def test_the_kernels_are_measured_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    found = compute.measure_in_child()
    assert 1e8 < found.floats < 1e15
    assert found.int8 is not None
    assert 1e8 < found.int8 < 1e15
    monkeypatch.setenv(SWITCH, "off")
    assert compute.measure_in_child().int8 is None


@pytest.mark.parametrize("out", ["", "[1]", '{"flops": 3}'])
def test_a_failure_is_told(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, out, "x\nno\n")

    monkeypatch.setattr(compute.subprocess, "run", run)
    with pytest.raises(SatchelError, match=r"could not be measured: no$"):
        compute.measure_in_child()
