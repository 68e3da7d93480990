"""What is known of the processor."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from satchel.runtime.util import cpu as processor

X86 = "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 fma avx512_vnni mitigation\n\nmodel name\t: Other\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n"


def cpuinfo(monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
    def read_text(self: Path, encoding: str = "") -> str:
        if text is None:
            raise FileNotFoundError(str(self))
        return text

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(platform, "machine", lambda: "some64")


def test_extensions_are_those_that_kernels_choose_by(monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo(monkeypatch, X86)
    assert processor.processor_features() == ("some64", "fma", "avx2", "avx512_vnni")
    assert processor.processor_name() == "Some CPU"


def test_arm_lists_them_under_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo(monkeypatch, ARM)
    assert processor.processor_features() == ("some64", "asimddp", "i8mm")


def test_elsewhere_the_name_stands_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo(monkeypatch, None)
    monkeypatch.setattr(platform, "processor", lambda: "chip")
    assert processor.processor_features() == ("some64", "chip")
