"""satchel's own kernels: where the library is, and why it is not used."""

from __future__ import annotations

import importlib.machinery
from pathlib import Path

import pytest

from satchel.runtime.kernels import library


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A built library and a processor for it."""
    monkeypatch.delenv(library.SWITCH, raising=False)
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    monkeypatch.setattr(library, "processor_features", lambda: ("x86_64", "avx2", *library.EXTENSIONS))
    path = tmp_path / f"_library{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    path.write_bytes(b"")
    return path


def test_the_library_is_the_file_beside_the_module(beside: Path) -> None:
    assert (library.library(), library.reason()) == (beside, None)


@pytest.mark.parametrize(
    ("features", "reason"),
    [
        (None, "are not built"),
        (("aarch64", "asimddp"), "aarch64"),
        (("x86_64", "avx2", "fma", "f16c", "avx512f"), "avx512bw, avx512dq, avx512vl, avx512_vnni"),
        (("x86_64", "Some processor"), "avx512f, "),
        ((), "SATCHEL_KERNELS=off"),
    ],
)
def test_why_it_is_not_used_is_said(
    beside: Path, monkeypatch: pytest.MonkeyPatch, features: tuple[str, ...] | None, reason: str
) -> None:
    if features:
        monkeypatch.setattr(library, "processor_features", lambda: features)
    elif features is None:
        beside.unlink()
    else:
        monkeypatch.setenv("SATCHEL_KERNELS", "off")
    assert library.library() is None
    assert reason in str(library.reason())
