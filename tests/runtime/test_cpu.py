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


@pytest.mark.parametrize(
    ("text", "features", "name"),
    [
        (X86, ("some64", "fma", "avx2", "avx512_vnni"), "Some CPU"),
        (ARM, ("some64", "asimddp", "i8mm"), "chip"),
        (None, ("some64", "chip"), "chip"),
    ],
)
def test_the_name_and_the_extensions_that_kernels_choose_by(
    monkeypatch: pytest.MonkeyPatch, text: str | None, features: tuple[str, ...], name: str
) -> None:
    cpuinfo(monkeypatch, text)
    monkeypatch.setattr(platform, "processor", lambda: "chip")
    assert processor.processor_features() == features
    assert processor.processor_name() == name
