"""satchel's own kernels: where the library is, and why it is not used."""

from __future__ import annotations

import importlib.machinery
import platform
import shutil
from pathlib import Path

import pytest
from support.command import Satchel
from support.kernels import needs_kernels

from satchel.runtime.errors import SatchelError
from satchel.runtime.kernels import library


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the built library, in a folder of its own."""
    monkeypatch.delenv(library.SWITCH, raising=False)
    path = tmp_path / f"_library{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    if (built := library.library()) is not None:
        shutil.copy(built, path)
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    return path


@needs_kernels
def test_the_library_is_the_file_beside_the_module(beside: Path) -> None:
    assert (library.library(), library.reason()) == (beside, None)


@needs_kernels
@pytest.mark.parametrize("name", ["plain", None])
def test_an_instruction_set_is_chosen_by_name(beside: Path, monkeypatch: pytest.MonkeyPatch, name: str | None) -> None:
    fastest = library.instruction_set()
    assert fastest not in (None, "plain")
    if name is not None:
        monkeypatch.setenv(library.SWITCH, name)
    assert library.instruction_set() == (name or fastest)


def test_without_the_file_it_is_not_built(beside: Path) -> None:
    beside.unlink(missing_ok=True)
    assert (library.library(), library.instruction_set()) == (None, None)
    assert "not built" in str(library.reason())


def test_a_file_of_another_system_is_not_loaded(beside: Path) -> None:
    beside.write_bytes(b"MZ")
    assert library.library() is None
    assert str(beside) in str(library.reason())


def test_that_it_is_switched_off_is_said(beside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.SWITCH, library.OFF)
    assert (library.library(), library.instruction_set()) == (None, None)
    assert "SATCHEL_KERNELS=off" in str(library.reason())


@needs_kernels
@pytest.mark.parametrize("name", ["avx9", "neon" if platform.machine() in ("x86_64", "AMD64") else "avx2"])
@pytest.mark.usefixtures("beside")
def test_a_name_that_is_not_possible_here_is_an_error(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    possible = library.instruction_sets()
    assert possible[-1] == "plain"
    assert len(possible) > 1
    monkeypatch.setenv(library.SWITCH, name)
    for call in (library.instruction_set, library.reason, library.library):
        with pytest.raises(SatchelError, match=f"=.*{', '.join(('off', *possible))}") as caught:
            call()
        assert name in str(caught.value)


def test_without_the_library_no_name_is_possible(beside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside.unlink(missing_ok=True)
    monkeypatch.setenv(library.SWITCH, "plain")
    with pytest.raises(SatchelError, match=r"plain.*off.*not built"):
        library.reason()


@needs_kernels
def test_a_command_with_an_impossible_name_says_so(
    satchel: Satchel, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(library.SWITCH, "avx9")
    for words in (("run", tiny, "a"), ("specialize", tiny)):
        assert "avx9" in satchel.refuses(*words)
    assert "avx9" in satchel.json("doctor", code=1)["kernels"]["reason"]


@needs_kernels
def test_an_empty_name_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.SWITCH, "")
    assert library.reason() is None


@needs_kernels
def test_a_processor_without_its_instruction_sets_is_told_which(beside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_announced", lambda: ("plain",))
    assert "AVX2" in str(library.reason())
