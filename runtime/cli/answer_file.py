"""Where answers go, a JSON object in a line for each: a file that a later run can go on with, or standard output."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from satchel.runtime.cli.prompt_lines import PromptLine, parse_object
from satchel.runtime.errors import PromptError, SatchelError

ANSWER_KEYS = {"id", "text", "finish_reason", "prompt_tokens", "new_tokens"}
ERROR_KEYS = {"id", "error"}
BEGINNING = b'{"id": '
"""How every row begins: an unfinished one, too, tells by it that it is ours."""
LINE_ENDS = re.compile("[\x85\u2028\u2029]")
"""What ends a line in Unicode and may stand in a JSON string as it is."""


class PrintedAnswers:
    """Answers on standard output. Nothing is done before."""

    done: frozenset[int] = frozenset()
    failed = 0

    def write(self, row: dict[str, Any]) -> None:
        """Print one row."""
        print(as_line(row), end="", flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class AnswerFile:
    """Answers in a file, as a context manager. What an earlier run has left there stays, and counts as done.

    Each row is handed to the system in one piece, so a process that is killed loses at most the row that it was
    writing: the next run cuts off the part without an end, and runs that line again. Only one process at a time may
    have the file.

    Attributes:
        done: The numbers of the lines that have a row.
        failed: How many of those rows are errors.
    """

    def __init__(self, path: Path, lines: Sequence[PromptLine]) -> None:
        """Open the file for the answers to `lines`. Raises PromptError, and changes nothing, where it has others."""
        self.failed = 0
        self._path = path
        self._total = len(lines)
        self._file = _open(path)
        with contextlib.ExitStack() as failure:
            failure.callback(os.close, self._file)
            self.done, self._whole = self._read(lines)
            failure.pop_all()
        self._rows = len(self.done)

    def __enter__(self) -> Self:
        try:
            self._cut()
        except OSError as error:
            os.close(self._file)
            raise self._unwritable(error) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._flush()
            else:
                # Should this fail as well, the next run cuts the unfinished row off.
                with contextlib.suppress(OSError):
                    self._cut()
        finally:
            os.close(self._file)

    def write(self, row: dict[str, Any]) -> None:
        """Add one row. Raises SatchelError, with the file as it was before, where the disk does not take it."""
        content = memoryview(as_line(row).encode())
        try:
            while content:
                content = content[os.write(self._file, content) :]
        except OSError as error:
            raise self._unwritable(error) from None
        self._whole = os.lseek(self._file, 0, os.SEEK_CUR)
        self._rows += 1

    def _flush(self) -> None:
        try:
            os.fsync(self._file)
        except OSError as error:  # some file systems say only now that they are full
            raise self._unwritable(error) from None

    def _cut(self) -> None:
        """Leave the whole rows alone in the file, and go on after them."""
        os.ftruncate(self._file, self._whole)
        os.lseek(self._file, self._whole, os.SEEK_SET)

    def _unwritable(self, error: OSError) -> SatchelError:
        return SatchelError(
            f"--output {self._path}: cannot be written ({error.strerror}): {self._rows} of {self._total} answers are "
            "kept: free some space, and the same command goes on from there"
        )

    def _read(self, lines: Sequence[PromptLine]) -> tuple[frozenset[int], int]:
        """The numbers of the lines that have a row, and where in the file the whole rows end."""
        by_id = {line.id: line for line in reversed(lines)}  # of several with one id the first has it
        by_number = {line.number: line for line in lines}
        done: set[int] = set()
        whole = 0
        with open(self._file, "rb", closefd=False) as rows:
            for place, raw in enumerate(rows, start=1):
                if not raw.endswith(b"\n"):
                    if not raw.startswith(BEGINNING) and not BEGINNING.startswith(raw):
                        raise self._foreign(place, "it is no answer")
                    break
                row = self._parse(place, raw)
                line = by_number.get(_error_place(row)) if "error" in row else by_id.get(row["id"])
                if line is None or line.id != row["id"]:
                    raise self._foreign(place, "it answers no line of --input")
                if line.number in done:
                    raise self._foreign(place, f"line {line.number} of --input has another answer before it")
                done.add(line.number)
                self.failed += "error" in row
                whole += len(raw)
        return frozenset(done), whole

    def _parse(self, place: int, raw: bytes) -> dict[str, Any]:
        try:
            row = parse_object(raw.decode("utf-8"))
        except (UnicodeDecodeError, PromptError):
            raise self._foreign(place, "it is no answer") from None
        answered = row.keys() - {"logprobs"} == ANSWER_KEYS
        failed = row.keys() == ERROR_KEYS and isinstance(row["error"], str)
        if not (answered or failed) or isinstance(row["id"], bool) or not isinstance(row["id"], str | int):
            raise self._foreign(place, "it is no answer")
        return row

    def _foreign(self, place: int, reason: str) -> PromptError:
        return PromptError(
            f"--output {self._path}: line {place}: {reason}: nothing was changed: name another file, or move this one"
        )


def as_line(row: dict[str, Any]) -> str:
    """A row as it is written, with its end. It is one line for every reader, also for one that knows Unicode's."""
    text = json.dumps(row, ensure_ascii=False)
    return LINE_ENDS.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"


def _error_place(row: dict[str, Any]) -> int:
    found = re.match(r"line ([0-9]{1,18}): ", row["error"])
    return int(found[1]) if found else 0


def _open(path: Path) -> int:
    """A descriptor to read and write, of a plain file that this process alone has; made where there is none."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666)
    except OSError as error:
        raise PromptError(f"--output {path}: cannot be opened ({error.strerror}): name another file") from None
    with contextlib.ExitStack() as failure:
        failure.callback(os.close, file)
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise PromptError(f"--output {path}: this is no plain file: name another, or - for standard output")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PromptError(f"--output {path}: another run writes to it: wait for its end, or name another") from None
        except OSError as error:
            raise PromptError(f"--output {path}: cannot be locked ({error.strerror}): name another file") from None
        failure.pop_all()
    return file
