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


def test_where_it_is_not_built_that_is_said(beside: Path) -> None:
    beside.unlink()
    assert library.library() is None
    assert library.reason() == "are not built (there was no C compiler when satchel was installed)"


@pytest.mark.parametrize(
    ("features", "reason"),
    [
        (("aarch64", "asimddp"), "are for x86-64, and this processor is aarch64"),
        (
            ("x86_64", "avx2", "fma", "f16c", "avx512f"),
            "need a processor with avx512bw, avx512dq, avx512vl, avx512_vnni",
        ),
        (("x86_64", "Some processor"), "need a processor with avx512f, "),
    ],
)
def test_a_processor_that_cannot_is_named(
    beside: Path, monkeypatch: pytest.MonkeyPatch, features: tuple[str, ...], reason: str
) -> None:
    monkeypatch.setattr(library, "processor_features", lambda: features)
    assert library.library() is None
    assert str(library.reason()).startswith(reason)


def test_a_variable_of_the_environment_switches_them_off(beside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SATCHEL_KERNELS", "off")
    assert library.library() is None
    assert library.reason() == "are switched off (SATCHEL_KERNELS=off)"
