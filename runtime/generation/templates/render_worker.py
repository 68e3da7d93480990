"""Renders one chat template under limits, in a child process that `render_process` starts.

Requests come on standard input, replies go to standard output, each as one line of ASCII JSON. The first reply is
`{"ready": true}`. Then `{"template": source}` gets `{"ready": true}`, and `{"variables": {...}}` gets `{"text": ...}`.
Either may get `{"error": kind, "text": ..., "line": number or null}` instead, with a kind of `FAILURES`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any, BinaryIO, NoReturn

from jinja2 import Environment, Template, nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from satchel.runtime.generation.templates.limits import MEMORY_BYTES, OUTPUT_BYTES

FAILURES = ("syntax", "refused", "forbidden", "failed", "size", "memory")

_CPU_SECONDS = 5
_LONGEST_MESSAGE = 1000
_FILE = "<chat template>"  # what tracebacks call the template

# What expressions in a template raise. Anything else ends this process, which the parent reports.
_TEMPLATE_ERRORS = (
    TemplateError, ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError,
    StopIteration, SyntaxError, TypeError, ValueError,
)  # fmt: skip


class _Refusal(TemplateError):
    """The template called `raise_exception`."""


class _TooLong(Exception):
    """The text is longer than OUTPUT_BYTES."""


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, but a forbidden attribute raises at once instead of giving an undefined value."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        raise SecurityError(f"access to '{attribute}' of a {type(obj).__name__}")


class _Generation(Extension):
    """`{% generation %}` ... `{% endgeneration %}` marks the model's text for training; it has no effect here."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Namespace(Namespace):
    """Jinja's namespace, without names that start with an underscore."""

    def __init__(self, /, *args: Any, **values: Any) -> None:
        initial = dict(*args, **values)
        for name in initial:
            _check_name(name)
        super().__init__(initial)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class _Dict:
    """`dict` as templates use it: a function instead of the class with its attributes."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace with the name '{name}'")


def _raise_exception(message: Any) -> NoReturn:
    raise _Refusal(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def make_environment() -> Environment:
    """The sandbox with the extensions that chat templates expect from transformers."""
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dict(), namespace=_Namespace
    )
    return environment


def render(template: Template, variables: Mapping[str, Any]) -> str:
    """The rendered text. Raises _TooLong as soon as it exceeds OUTPUT_BYTES."""
    pieces, left = [], OUTPUT_BYTES
    for piece in template.generate(variables):
        left -= len(piece)
        if left >= 0:  # a character has at least one byte
            left -= len(piece.encode("utf-8", "surrogatepass")) - len(piece)
        if left < 0:
            raise _TooLong
        pieces.append(piece)
    return "".join(pieces)


class Worker:
    """Answers requests: compiles a template, then renders it."""

    def __init__(self) -> None:
        self._environment = make_environment()
        self._template: Template | None = None

    def answer(self, line: bytes) -> dict[str, Any]:
        """The reply to one request."""
        try:
            request = json.loads(line)
            if self._template is None:
                code = self._environment.compile(request["template"], filename=_FILE)
                self._template = Template.from_code(self._environment, code, self._environment.globals)
                return {"ready": True}
            return {"text": render(self._template, request["variables"])}
        except _Refusal as error:
            return _failure("refused", error)
        except SecurityError as error:
            return _failure("forbidden", error, _line_of(error))
        except TemplateSyntaxError as error:
            return _failure("syntax", error, error.lineno)
        except _TooLong as error:
            return _failure("size", error)
        except MemoryError as error:
            return _failure("memory", error)
        except _TEMPLATE_ERRORS as error:
            return _failure("failed" if self._template else "syntax", error, _line_of(error))


def _failure(kind: str, error: Exception, line: int | None = None) -> dict[str, Any]:
    text = str(error.message if isinstance(error, TemplateError) else error)
    if not isinstance(error, TemplateError):
        text = f"{type(error).__name__}: {text}"
    return {"error": kind, "text": text[:_LONGEST_MESSAGE], "line": line}


def _line_of(error: BaseException) -> int | None:
    """The line of the template that raised an error: Jinja puts template lines into the traceback."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == _FILE:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def _limit_process(highest_descriptor: int) -> None:
    """Limit memory, files and processes to what rendering needs, as far as the system can. Not reversible."""
    if sys.platform == "win32":
        _limit_job()
        return
    try:
        import resource
    except ImportError:
        return
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_NOFILE: highest_descriptor + 1,  # all of them are in use, so none can be opened
    }
    if sys.platform != "darwin":  # macOS refuses to set it
        limits[resource.RLIMIT_AS] = MEMORY_BYTES
    for limit, wanted in limits.items():
        hard = resource.getrlimit(limit)[1]
        value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(limit, (value, value))


def _limit_job() -> None:
    """Limit memory, and start no processes, on Windows: JOBOBJECT_EXTENDED_LIMIT_INFORMATION of winnt.h, 64 bits."""
    import ctypes
    import struct

    extended, one_process, process_memory = 9, 0x8, 0x100
    basic = struct.pack("<qqI4xQQI4xQII", 0, 0, one_process | process_memory, 0, 0, 1, 0, 0, 0)
    limits = basic + struct.pack("<6Q4Q", *[0] * 6, MEMORY_BYTES, 0, 0, 0)
    kernel = ctypes.WinDLL("kernel32")  # type: ignore[attr-defined, unused-ignore]
    for function in (kernel.CreateJobObjectW, kernel.GetCurrentProcess):
        function.restype = ctypes.c_void_p
    job = ctypes.c_void_p(kernel.CreateJobObjectW(None, None))
    kernel.SetInformationJobObject(job, extended, limits, len(limits))
    kernel.AssignProcessToJobObject(job, ctypes.c_void_p(kernel.GetCurrentProcess()))


def _limit_processor_time() -> None:
    """A few seconds from now: a second limit, in case the parent, which stops what takes long, is gone."""
    try:
        import resource
    except ImportError:  # on Windows the parent alone stops what takes long
        return
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = int(time.process_time()) + 1 + _CPU_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _load_what_is_loaded_late() -> None:
    """Use what Jinja imports and Python reads on first use, before files can no longer be opened."""
    trial = Worker()
    uses = "{{ 'a b' | pprint | striptags | wordwrap(1) }}{{ lipsum(n=1) }}{{ strftime_now('%c %Z') }}{{ 1 // none }}"
    trial.answer(json.dumps({"template": uses}).encode())
    trial.answer(b'{"variables": {}}')


def _take_standard_output() -> BinaryIO:
    """The pipe to the parent, for replies alone; standard output goes to the null device afterwards."""
    replies = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    return replies


def main() -> None:
    """Answer requests until standard input ends, as it does when the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    replies = _take_standard_output()
    worker = Worker()
    _load_what_is_loaded_late()
    _limit_process(replies.fileno())
    reply: dict[str, Any] = {"ready": True}
    while True:
        replies.write(json.dumps(reply).encode("ascii") + b"\n")
        replies.flush()
        line = sys.stdin.buffer.readline()
        if not line:
            return
        _limit_processor_time()
        reply = worker.answer(line)


if __name__ == "__main__":
    main()
