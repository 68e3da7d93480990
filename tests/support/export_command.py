"""Runs `satchel export` inside the test process, and checks what a refusal must be."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from satchel.runtime.cli import main as cli

SATCHEL = [sys.executable, "-m", "satchel.runtime.cli.main"]


@dataclass(frozen=True)
class Ran:
    """A command's exit code and what it printed."""

    code: int
    out: str
    err: str


def export(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Ran:
    """`satchel export` with these arguments, in this process; fp32 where they say nothing of a precision or target."""
    capsys.readouterr()
    code = cli.main(["export", *in_float(*arguments)])
    return Ran(code, *capsys.readouterr())


def in_float(*arguments: str | Path) -> list[str]:
    """The arguments of an export, with `--precision fp32` where they name neither a precision nor a target."""
    words = [str(argument) for argument in arguments]
    return words if {"--precision", "-p", "--target"} & set(words) else [*words, "--precision", "fp32"]


def satchel(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`satchel` in a process of its own; see `export` for what an export is without a precision."""
    name, *rest = map(str, arguments)
    command = [*SATCHEL, name, *(in_float(*rest) if name == "export" else rest)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder below, hidden ones too, with its size and time of change."""
    found = {}
    for path in sorted(folder.rglob("*")):
        stat = os.lstat(path)
        found[str(path.relative_to(folder))] = (stat.st_size, stat.st_mtime_ns)
    return found


def refused(capsys: pytest.CaptureFixture[str], place: Path, *arguments: str | Path, says: tuple[str, ...]) -> None:
    """The export exits with 2 and one line that holds each of `says`, and changes nothing below `place`."""
    before = tree(place)
    ran = export(capsys, *arguments, "--quiet")
    assert (ran.code, ran.out) == (2, ""), ran.err
    assert ran.err.startswith("satchel: error: ")
    assert ran.err.count("\n") == 1
    for part in says:
        assert part in ran.err
    assert tree(place) == before
