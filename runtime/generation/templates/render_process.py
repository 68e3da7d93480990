"""The child process that compiles and renders one chat template, and the messages for its failures."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from satchel.runtime.errors import PromptError
from satchel.runtime.generation.templates.limits import MEMORY_BYTES, OUTPUT_BYTES, SECONDS
from satchel.runtime.util.child import HIDDEN, python_path
from satchel.runtime.util.terminal import printable

_WORKER = "satchel.runtime.generation.templates.render_worker"
_START_SECONDS = 30.0  # for Python to start on a busy machine, before the template runs
_LONGEST_REPLY = 8 * OUTPUT_BYTES  # a byte of text is 6 characters of ASCII JSON at most
_LONGEST_REASON = 300  # characters of an error message
_ENVIRONMENT = ("LD_LIBRARY_PATH", "PYTHONHOME", "SYSTEMROOT", "TZ", "TZDIR")  # the child gets no other variables
_REMEDY = "name another template with --chat-template FILE"
_FAILURES = {
    "syntax": "the chat template cannot be read{where}: {reason}: " + _REMEDY,
    "refused": "the chat template refuses these messages: {reason}",
    "forbidden": "the chat template does what the sandbox forbids{where}: {reason}: " + _REMEDY,
    "failed": "the chat template fails{where}: {reason}: change the messages, or " + _REMEDY,
    "size": f"the chat template gives more than {OUTPUT_BYTES / 1e6:g} MB of text: shorten the messages, or {_REMEDY}",
    "memory": f"the chat template needs more than {MEMORY_BYTES >> 20} MiB of memory: {_REMEDY}",
}
_UNUSABLE_AFTER = ("size", "memory")  # after these the child may not be able to free its memory


class _Late(Exception):
    """The child did not answer in time."""


class _Ended(Exception):
    """The child has ended, or its reply is invalid."""


class TemplateProcess:
    """A child process that has compiled `source`, for one thread at a time of the process that started it."""

    def __init__(self, source: str) -> None:
        """Start the child and compile. Raises PromptError that says why if either fails."""
        if importlib.util.find_spec("jinja2") is None:
            raise PromptError("chat templates need the package jinja2, which is not installed: pip install jinja2")
        request = request_line({"template": source})
        self._child = _start()
        self._end = weakref.finalize(self, _end, self._child)  # at the interpreter's exit at the latest
        self._idle = False
        try:
            with self._within(_START_SECONDS):
                self._receive()
            self._idle = True
            self._ask(request)
        except (_Late, _Ended):
            self.close()
            raise PromptError(
                "the process that renders chat templates does not start: "
                f"find out why with `{sys.executable} -m {_WORKER}`"
            ) from None
        except BaseException:
            self.close()
            raise

    @property
    def usable(self) -> bool:
        """Whether the child is alive and waits for a request; never in a fork of this process."""
        return self._idle and self._child.poll() is None

    def render(self, request: bytes) -> str:
        """The rendered text for `request_line({"variables": ...})`.

        Raises PromptError that says why it fails. `usable` tells whether the child survived.
        """
        return str(self._ask(request).get("text"))

    def close(self) -> None:
        """End the child and wait for it."""
        self._end()

    def _ask(self, request: bytes) -> dict[str, Any]:
        self._idle = False  # stays so if this is interrupted: the reply must not be taken for that of the next request
        try:
            with self._within(SECONDS):
                self._send(request)
                reply = self._receive()
        except _Late:
            raise PromptError(f"the chat template took longer than {SECONDS:g} s: {_REMEDY}") from None
        except _Ended:
            self.close()
            status = self._child.returncode
            how = f"signal {-status}" if status < 0 else f"exit code {status}"
            raise PromptError(f"the chat template ended the process that renders it ({how}): {_REMEDY}") from None
        kind = reply.get("error")
        self._idle = kind not in _UNUSABLE_AFTER
        if kind is not None:
            raise PromptError(_explain(reply))
        return reply

    @contextmanager
    def _within(self, seconds: float) -> Iterator[None]:
        """Kill the child if the block takes longer, which ends its reads and writes; then raise _Late.

        Waiting for a pipe with a time limit is not possible on every system.
        """
        lock, state = threading.Lock(), "busy"

        def kill() -> None:
            nonlocal state
            with lock:
                if state == "busy":
                    state = "late"
                    self._child.kill()

        timer = threading.Timer(seconds, kill)
        timer.daemon = True
        timer.start()
        try:
            yield
        except _Ended:
            if state != "late":
                raise
        finally:
            timer.cancel()
            with lock:
                late, state = state == "late", "done"
        if late:
            raise _Late

    def _send(self, line: bytes) -> None:
        pipe = _descriptor(self._child.stdin)
        rest = memoryview(line)
        while rest:
            try:
                rest = rest[os.write(pipe, rest) :]
            except OSError:  # a broken pipe
                raise _Ended from None

    def _receive(self) -> dict[str, Any]:
        pipe = _descriptor(self._child.stdout)
        line = bytearray()
        while not line.endswith(b"\n"):
            block = os.read(pipe, 1 << 20)
            line += block
            if not block or len(line) > _LONGEST_REPLY:
                raise _Ended
        try:
            reply = json.loads(line)
        except ValueError:
            raise _Ended from None
        if not isinstance(reply, dict) or reply.get("error") not in (None, *_FAILURES):
            raise _Ended
        return reply


def request_line(request: Mapping[str, Any]) -> bytes:
    """A request as the child reads it. Raises PromptError for anything that is not a JSON value."""
    try:
        return json.dumps(request, default=_plain).encode("ascii") + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(
            f"what the chat template is given cannot be written as JSON ({_one_line(str(error))}): "
            "use text, numbers, lists and objects in messages, tools and arguments"
        ) from None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is not a JSON value")


def _start() -> subprocess.Popen[bytes]:
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    try:
        return subprocess.Popen(
            [sys.executable, "-P", "-B", "-m", _WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd="/",
            env={**environment, "PYTHONPATH": python_path()},
            **HIDDEN,  # Ctrl-C in the terminal must not reach it
        )
    except OSError as error:
        raise PromptError(
            f"no process can be started to render the chat template ({error.strerror}): close other programs"
        ) from None


def _end(child: subprocess.Popen[bytes]) -> None:
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            pipe.close()
    child.kill()  # has no effect in a fork of the process that started it
    child.wait()


def _descriptor(pipe: Any) -> int:
    return int(pipe.fileno())


def _explain(reply: Mapping[str, Any]) -> str:
    line = reply.get("line")
    where = f" at line {line}" if isinstance(line, int) else ""
    reason = _one_line(str(reply.get("text")))
    if reply["error"] != "refused":  # the template's own message is not changed
        reason = reason.removesuffix(".")
    return _FAILURES[reply["error"]].format(where=where, reason=reason)


def _one_line(text: str) -> str:
    short = printable(" ".join(text.split()))
    return short if len(short) <= _LONGEST_REASON else f"{short[:_LONGEST_REASON]} ..."
