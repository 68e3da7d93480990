"""Where answers go, one JSON object per line: a file that a later run can resume, or standard output."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from satchel.runtime.bundle.lock import BusyError, held
from satchel.runtime.cli.prompt_lines import PromptLine, parse_object
from satchel.runtime.errors import PromptError, SatchelError

ANSWER_KEYS = {"id", "text", "finish_reason", "prompt_tokens", "new_tokens", "request"}
ERROR_KEYS = {"id", "error", "request"}
BEGINNING = b'{"id": '
"""How every row begins, by which an incomplete one is recognized too."""
LINE_ENDS = re.compile("[\x85\u2028\u2029]")
"""Unicode line ends that JSON strings may contain unescaped."""

FLAGS = os.O_RDWR | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
"""For opening the file: a pipe is not waited for, and Windows changes no line ends."""


class PrintedAnswers:
    """Answers on standard output, of which none is there before."""

    done: frozenset[int] = frozenset()
    failed = stale = 0

    def write(self, row: dict[str, Any]) -> None:
        """Print one row."""
        print(as_line(row), end="", flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class AnswerFile:
    """Answers in a file, as a context manager. Rows of an earlier run stay if they answer the same requests.

    A row is handed to the system in one piece, so a process that is killed loses at most the row that it was writing:
    the next run cuts off the incomplete row and runs that line again. Rows for a line of --input whose request, options
    or bundle have changed since are stale, and are removed on entry. Only one process at a time may use the file.

    Attributes:
        done: The numbers of the lines that have a row.
        failed: How many of those rows are errors.
        stale: How many rows answer other requests than those of the lines.
    """

    def __init__(self, path: Path, lines: Sequence[PromptLine], digests: Mapping[int, str]) -> None:
        """Open the file for answers to `lines`; `digests` has that of each line's request by its number.

        Raises PromptError, and changes nothing, for a file with anything else in it.
        """
        self.failed = self.stale = 0
        self.done: set[int] = set()
        self._path = path
        self._total = len(lines)
        self._whole = 0  # where the rows end
        self._kept: list[tuple[int, int]] = []  # the begin and end of each row that counts
        self._file = _open(path, os.O_CREAT)
        with contextlib.ExitStack() as failure:
            self._locks = contextlib.ExitStack()
            failure.callback(self._close)
            self._lock(path)
            self._read(lines, digests)
            failure.pop_all()
        self._rows = len(self.done)

    def __enter__(self) -> Self:
        try:
            if self.stale:
                self._remove_stale()
            else:
                self._cut()
        except OSError as error:
            self._close()
            raise self._unwritable(error) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._flush()
            else:
                # If this fails too, the next run cuts off the incomplete row.
                with contextlib.suppress(OSError):
                    self._cut()
        finally:
            self._close()

    def write(self, row: dict[str, Any]) -> None:
        """Append one row. Raises SatchelError if it cannot be written; the file then has the rows before it."""
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
        except OSError as error:  # some file systems report only now that they are full
            raise self._unwritable(error) from None

    def _cut(self) -> None:
        """Truncate the file to its complete rows, and append after them."""
        os.ftruncate(self._file, self._whole)
        os.lseek(self._file, self._whole, os.SEEK_SET)

    def _remove_stale(self) -> None:
        """Replace the file, whole, by one that has the rows that count."""
        target = self._path.resolve()
        part = target.with_name(f".satchel-{os.getpid()}.part")
        try:
            with part.open("wb") as file, open(self._file, "rb", closefd=False) as rows:
                shutil.copymode(target, part)
                for begin, end in self._kept:
                    rows.seek(begin)
                    file.write(rows.read(end - begin))
                file.flush()
                os.fsync(file.fileno())
            self._locks.enter_context(held(part))
            os.close(self._file)  # Windows replaces no open file
            try:
                part.replace(target)
            finally:
                self._file = _open(target)
        finally:
            part.unlink(missing_ok=True)
        self._whole = sum(end - begin for begin, end in self._kept)
        self._cut()

    def _lock(self, path: Path) -> None:
        try:
            self._locks.enter_context(held(path))
            busy = not os.path.samestat(os.fstat(self._file), path.stat())  # another run has just replaced it
        except BusyError:
            busy = True
        except OSError as error:
            raise PromptError(f"--output {path}: cannot be locked ({error.strerror}): choose another path") from None
        if busy:
            raise PromptError(
                f"--output {path}: another run is writing to it: wait until it ends, or choose another path"
            )

    def _close(self) -> None:
        os.close(self._file)
        self._locks.close()

    def _unwritable(self, error: OSError) -> SatchelError:
        return SatchelError(
            f"--output {self._path}: cannot be written ({error.strerror}): {self._rows} of {self._total} answers are "
            "saved: free some space, and run the same command again to resume"
        )

    def _read(self, lines: Sequence[PromptLine], digests: Mapping[int, str]) -> None:
        """Find the lines that have a row, the stale rows, and where in the file the complete rows end."""
        wanted = {(line.id, digests[line.number]): line.number for line in lines}
        known = {line.id for line in lines}
        with open(self._file, "rb", closefd=False) as rows:
            for place, raw in enumerate(rows, start=1):
                if not raw.endswith(b"\n"):
                    if not raw.startswith(BEGINNING) and not BEGINNING.startswith(raw):
                        raise self._foreign(place, "not an answer")
                    return
                row = self._parse(place, raw)
                if row["id"] not in known:
                    raise self._foreign(place, "answers no line of --input")
                begin, self._whole = self._whole, self._whole + len(raw)
                number = wanted.get((row["id"], row["request"]))
                if number is None or number in self.done:
                    self.stale += 1
                    continue
                self._kept.append((begin, self._whole))
                self.done.add(number)
                self.failed += "error" in row

    def _parse(self, place: int, raw: bytes) -> dict[str, Any]:
        try:
            row = parse_object(raw.decode("utf-8"))
        except (UnicodeDecodeError, PromptError):
            raise self._foreign(place, "not an answer") from None
        answered = row.keys() - {"logprobs"} == ANSWER_KEYS
        failed = row.keys() == ERROR_KEYS and isinstance(row["error"], str)
        typed = isinstance(row.get("id"), str | int) and not isinstance(row.get("id"), bool)
        if not (answered or failed) or not typed or not isinstance(row["request"], str):
            raise self._foreign(place, "not an answer")
        return row

    def _foreign(self, place: int, reason: str) -> PromptError:
        return PromptError(
            f"--output {self._path}: line {place}: {reason}: nothing was changed: choose another path, or move it"
        )


def as_line(row: dict[str, Any]) -> str:
    """A row as written, with its line end; readers that split at Unicode line ends also see one line."""
    text = json.dumps(row, ensure_ascii=False)
    return LINE_ENDS.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"


def _open(path: Path, flags: int = 0) -> int:
    """A descriptor to read and write a regular file. Raises PromptError for any other."""
    try:
        file = os.open(path, FLAGS | flags, 0o666)
    except OSError as error:
        raise PromptError(f"--output {path}: cannot be opened ({error.strerror})") from None
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise PromptError(f"--output {path}: not a regular file: choose another path, or - for standard output")
    return file
