"""What a file of answers survives: kills, interrupts, full disks, and files that are none."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.command import Satchel
from support.jsonl_work import Work, by_id
from support.tiny_bundle import write_bundle

from satchel.runtime.cli import answer_file
from satchel.runtime.cli.answer_file import AnswerFile
from satchel.runtime.cli.prompt_lines import read_lines
from satchel.runtime.generation.generator import Generator

PATIENCE = 60  # seconds


@pytest.fixture
def work(satchel: Satchel, tiny: Path, tmp_path: Path) -> Work:
    return Work(satchel, tiny, tmp_path)


@pytest.fixture
def slow(satchel: Satchel, long_bundle: Path, tmp_path: Path) -> Work:
    """Work of ten answers, one of them an error, that takes some seconds, two at a time."""
    work = Work(satchel, long_bundle, tmp_path)
    work.write(*({"prompt": "the cat sat " + "again " * n, "max_new_tokens": 900 + 40 * n} for n in range(9)), b"{")
    return work


@pytest.fixture(scope="module")
def long_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundles") / "long", max_context=2000)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Work], set[str]]:
    """What a run of that work gives when nothing happens to it."""
    found: set[str] = set()

    def lines(work: Work) -> set[str]:
        if not found:
            output = tmp_path_factory.mktemp("undisturbed") / "out.jsonl"
            work.run("--batch", 2, "--quiet", "--output", output, code=1)
            found.update(output.read_text("utf-8").splitlines())
        return found

    return lines


def wait_for_rows(path: Path, count: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_what_is_done_is_not_run_again(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    line = {"prompt": "the", "max_new_tokens": 1}
    work.write(line, line, b"{", line)
    work.run(code=1)
    whole = work.output.read_bytes()
    lines = whole.splitlines(keepends=True)
    work.output.write_bytes(b"".join(lines[:2]) + lines[2][:-9])
    assert work.run(code=1).startswith("resuming: 2 of 4 prompts are answered\n2 prompts of ")
    assert sorted(work.output.read_bytes().splitlines()) == sorted(whole.splitlines())
    with monkeypatch.context() as patch:
        patch.setattr(Generator, "open", None)  # no generator is opened if there is nothing to do
        failed = f'satchel: 1 of 4 prompts failed: see "error" in the rows of {work.output}\n'
        assert work.run(code=1) == f"all 4 prompts are answered already\n{failed}"
        assert work.run("--quiet", code=1) == failed
    work.write(line, line, b"", line)
    work.output.write_bytes(b"".join(row for row in lines if b"error" not in row))
    assert work.run("--quiet") == ""


def test_only_rows_that_answer_another_request_are_computed_again(
    work: Work, generator: Generator, tmp_path: Path
) -> None:
    """A prompt, an option of a line or of the command, an error, the context and the bundle: each makes rows stale."""

    def changed(stale: int, *flags: object, code: int = 0) -> None:
        before = by_id(work.rows())
        assert (f"{stale} answers in {work.output}" in work.run(*flags, code=code)) == bool(stale)
        rows = by_id(work.rows())
        assert sum(before[id] != row for id, row in rows.items()) == stale
        work.run("--quiet", *flags, code=code)
        assert by_id(work.rows()) == rows

    line = {"prompt": "the", "max_new_tokens": 2}
    work.write(line, {"prompt": "cat"}, b"{", {"prompt": "dog", "max_new_tokens": 3})
    work.run("-n", 4, code=1)
    work.output.chmod(0o640)
    changed(0, "-n", 4, code=1)
    work.write({**line, "prompt": "a"}, {"prompt": "cat"}, b"{", {"prompt": "dog", "max_new_tokens": 3})
    changed(1, "-n", 4, code=1)
    changed(1, "-n", 5, code=1)  # the other lines have a number of their own, or cannot be run
    assert by_id(work.rows())[2]["text"] == generator.generate("cat", 5).text
    work.write({**line, "prompt": "a"}, {"prompt": "cat"}, {"prompt": "the"}, {"prompt": "dog", "max_new_tokens": 3})
    changed(1, "-n", 5)
    changed(4, "-n", 5, "--max-context", 30)
    work.bundle = write_bundle(tmp_path / "other", seed=3)
    changed(4, "-n", 5, "--max-context", 30)
    assert work.output.stat().st_mode & 0o777 == 0o640
    assert not list(tmp_path.glob(".satchel-*"))


def test_stale_rows_stay_where_the_file_cannot_be_replaced(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    work.write({"prompt": "the"}, {"prompt": "cat"})
    work.run("-n", 2)
    content = work.output.read_bytes()
    monkeypatch.setattr(answer_file.os, "fsync", full)
    assert "No space left on device" in work.run("-n", 3, code=2)
    assert work.output.read_bytes() == content
    assert list(work.output.parent.glob(".satchel-*")) == []


def test_a_file_that_is_torn_anywhere_keeps_its_whole_rows(work: Work) -> None:
    line = {"prompt": "the cat", "max_new_tokens": 3}
    work.write({**line, "id": "猫"}, line, b"{")
    work.run("--quiet", code=1)
    content, lines = work.output.read_bytes(), read_lines(work.input.read_bytes())
    requests = {row["id"]: row["request"] for row in work.rows()}
    digests = {line.number: requests[line.id] for line in lines}
    for end in range(len(content) + 1):
        work.output.write_bytes(content[:end])
        with AnswerFile(work.output, lines, digests) as file:
            assert len(file.done) == content[:end].count(b"\n")
        assert work.output.read_bytes() == content[: content.rfind(b"\n", 0, end) + 1]


ANSWER = {"id": 1, "text": "", "finish_reason": "stop", "prompt_tokens": 1, "new_tokens": 0, "request": "x"}
FOREIGN: list[tuple[str, int, str]] = [
    ("my diary", 1, "not an answer"),
    ("my diary\n", 1, "not an answer"),
    (json.dumps({"prompt": "the"}) + "\n", 1, "not an answer"),
    (json.dumps(ANSWER | {"extra": 1}) + "\n", 1, "not an answer"),
    (json.dumps({key: value for key, value in ANSWER.items() if key != "request"}) + "\n", 1, "not an answer"),
    (json.dumps(ANSWER | {"request": None}) + "\n", 1, "not an answer"),
    (json.dumps(ANSWER) + "\n\n", 2, "not an answer"),
    (json.dumps(ANSWER) + "\n{'id", 2, "not an answer"),
    (json.dumps(ANSWER | {"id": True}) + "\n", 1, "not an answer"),
    (json.dumps(ANSWER | {"id": [1]}) + "\n", 1, "not an answer"),
    (json.dumps(ANSWER | {"id": "1"}) + "\n", 1, "no line of --input"),
    (json.dumps(ANSWER | {"id": 3}) + "\n", 1, "no line of --input"),
    (json.dumps({"id": 9, "error": "line 1: x", "request": "x"}) + "\n", 1, "no line of --input"),
    (json.dumps({"id": 1, "error": 1, "request": "x"}) + "\n", 1, "not an answer"),
    (json.dumps(ANSWER) + "\n\udcff\n", 2, "not an answer"),
]


@pytest.mark.parametrize(("content", "place", "fact"), FOREIGN)
def test_a_file_with_other_rows_is_refused_and_stays(work: Work, content: str, place: int, fact: str) -> None:
    work.write({"prompt": "the"}, {"prompt": "cat"})
    work.output.write_text(content, "utf-8", "surrogateescape")
    err = work.run(code=2)
    assert err.startswith(f"satchel: error: --output {work.output}: line {place}: ")
    assert fact in err
    assert err.count("\n") == 1
    assert work.output.read_text("utf-8", "surrogateescape") == content


def test_two_runs_do_not_write_to_one_file(work: Work) -> None:
    work.write({"prompt": "the"})
    with AnswerFile(work.output, read_lines(work.input.read_bytes()), {1: ""}):
        assert "another run is writing to it" in work.run(code=2)
    work.run("--quiet")


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_and_loses_and_repeats_nothing(
    slow: Work, undisturbed: Callable[[Work], set[str]]
) -> None:
    whole = undisturbed(slow)
    for rows in (0, 1, 3, 4, 7):
        with slow.start("--batch", 2) as process:
            wait_for_rows(slow.output, rows)
            process.kill()
        assert process.returncode == -signal.SIGKILL
    assert 7 <= slow.output.read_bytes().count(b"\n") < 10
    slow.run("--batch", 2, "--quiet", code=1)
    lines = slow.output.read_text("utf-8").splitlines()
    assert (len(lines), set(lines)) == (10, whole)


def test_an_interrupt_leaves_a_file_to_go_on_with(slow: Work, undisturbed: Callable[[Work], set[str]]) -> None:
    whole = undisturbed(slow)
    with slow.start("--batch", 2, "--quiet") as process:
        wait_for_rows(slow.output, 3)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out, err) == (130, b"", b"satchel: interrupted\n")
    content = slow.output.read_text("utf-8")
    assert content.endswith("\n")
    assert set(content.splitlines()) < whole
    slow.run("--batch", 2, "--quiet", code=1)
    assert set(slow.output.read_text("utf-8").splitlines()) == whole


def test_a_disk_that_fills_keeps_the_whole_rows(work: Work) -> None:
    line = {"prompt": "the cat sat on the mat", "max_new_tokens": 6}
    work.write(*[line] * 8)
    limit = 700  # bytes
    with work.start("--quiet", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) as process:
        out, err = process.communicate(timeout=PATIENCE)
    content = work.output.read_bytes()
    kept = content.count(b"\n")
    assert (process.returncode, out) == (2, b"")
    assert err.decode().startswith(f"satchel: error: --output {work.output}: cannot be written (File too large): ")
    assert f"{kept} of 8 answers" in err.decode()
    assert err.count(b"\n") == 1
    assert 0 < kept < 8
    assert content.endswith(b"\n")
    work.run("--quiet")
    assert work.output.read_bytes().startswith(content)
    assert sorted(by_id(work.rows())) == list(range(1, 9))


def full(*_: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_part_of_a_row_is_cut_off_again(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    work.write(*[{"prompt": "the", "max_new_tokens": 1}] * 3)
    write, calls = os.write, []

    def writing(file: int, content: memoryview) -> int:
        calls.append(1)
        return full() if len(calls) == 4 else write(file, content[: len(content) // 2 + 1])

    with monkeypatch.context() as patch:
        patch.setattr(answer_file.os, "write", writing)
        assert "cannot be written (No space left on device): " in work.run(code=2)
    content = work.output.read_bytes()
    assert content == b"" or content.endswith(b"\n")
    work.run("--quiet")
    assert sorted(by_id(work.rows())) == [1, 2, 3]


def test_a_disk_that_says_at_the_end_that_it_is_full_is_heard(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    work.write({"prompt": "the", "max_new_tokens": 1})
    monkeypatch.setattr(answer_file.os, "fsync", full)
    assert "cannot be written (No space left on device): 1 of 1 answers" in work.run("--quiet", code=2)
