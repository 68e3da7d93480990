"""The fuzzer of GGUF files reaches its code, judges right, and finds nothing in a few mutants."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from fuzz import gguf_files
from fuzz.gguf_files import fields, mutant, outcome, prepare, run

MUTANTS = 150


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    return prepare(tmp_path_factory.mktemp("seeds"))


def test_the_good_files_open(seeds: list[bytes], tmp_path: Path) -> None:
    path = tmp_path / "good.gguf"
    for content in seeds[:-1]:
        path.write_bytes(content)
        assert outcome(path) == ("opened", "")
        places, end = fields(content)
        assert len(places) > 50 and places[-1][0] + places[-1][1] == end < len(content)


def test_a_few_mutants_are_opened_or_refused(seeds: list[bytes], tmp_path: Path) -> None:
    ended = list(run(0, range(MUTANTS), seeds, tmp_path))
    assert [index for index, *_ in ended] == list(range(MUTANTS))
    counts = Counter(how for _, _, how, _ in ended)
    assert counts.keys() == {"opened", "refused"}, [row for row in ended if row[2] not in gguf_files.GOOD]
    assert counts["refused"] > MUTANTS // 2


def test_mutants_depend_on_their_numbers_alone(seeds: list[bytes]) -> None:
    first, again, other = (mutant(random.Random(f"0/{number}"), seeds) for number in (3, 3, 4))
    assert first == again != other


@pytest.mark.parametrize(
    ("happens", "how"),
    [
        ("raise ValueError('x')", "let an exception through"),
        ("import os; os.kill(os.getpid(), 9)", "died of signal 9"),
        ("bytearray(1 << 40)", "let an exception through"),
        ("from satchel.export.errors import ExportError; raise ExportError('two\\nlines')", "not one line"),
    ],
)
def test_what_may_not_happen_is_seen(
    happens: str, how: str, seeds: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("satchel.export.checkpoint.open_checkpoint", lambda path: exec(happens))
    assert [row[2] for row in run(0, range(2), seeds, tmp_path)] == [how, how]
