"""Locates the library of satchel's own operators, and says why it cannot be used on this machine.

It lies beside this module in wheels for a platform, and is built there when satchel is installed from source with a C
compiler. No other file is ever loaded as the library.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import itertools
import os
import warnings
from pathlib import Path

from satchel.runtime.errors import SatchelError, SatchelWarning
from satchel.runtime.kernels.trial import ENDED, RIGHT, tried

VERSION, OLDEST = 9, 1
"""Raise the first when the operators change, for new graphs. Raise the second, too, when the layout of weights or the
meaning of an operator changes by more than rounding: bundles of before must then be exported again."""

NAME = "_library"

SWITCH, OFF = "SATCHEL_KERNELS", "off"
"""An environment variable, and the value that disables satchel's own operators. Another value is the name of the
instruction set that they use; unset or empty, it is the fastest that the processor has."""

PLAIN = "plain"
"""The instruction set that is right on any processor, but slow: it is used only if it is named."""


def runs(version: int) -> bool:
    """Whether these operators run graphs that were made for this version of them."""
    return OLDEST <= version <= VERSION


def library() -> Path | None:
    """The path of the built library, or None if it cannot be used; `reason` says why."""
    return None if reason() is not None else _built()


def reason() -> str | None:
    """Why satchel's own operators cannot be used here, as a clause without a subject; None if they can.

    Raises:
        SatchelError: `SATCHEL_KERNELS` names an instruction set that is unknown or not possible here.
    """
    if os.environ.get(SWITCH) == OFF:
        return f"are switched off ({SWITCH}={OFF})"
    if instruction_set() is not None:
        return None
    opened = _opened()
    return opened if isinstance(opened, str) else "need a processor with AVX2 (x86-64) or dot products (Arm)"


def instruction_set() -> str | None:
    """The name of the instruction set that satchel's own operators use from now on; None if they cannot be used.

    Raises:
        SatchelError: `SATCHEL_KERNELS` names an instruction set that is unknown or not possible here.
    """
    named = os.environ.get(SWITCH) or None
    if named == OFF:
        return None
    opened = _opened()
    if named is not None and (named not in _announced() or not _runs(named)):
        here = ", ".join((OFF, *instruction_sets()))
        here += f" (satchel's own kernels {opened})" if isinstance(opened, str) else ""
        raise SatchelError(f"{SWITCH}={named}: no instruction set of this machine: unset it, or use one of {here}")
    chosen = named or next((name for name in _announced() if name != PLAIN and _runs(name)), None)
    if chosen is not None and not isinstance(opened, str):
        opened.satchel_choose_instruction_set(chosen.encode())
    return chosen


def instruction_sets() -> tuple[str, ...]:
    """The names of the instruction sets that are possible here, fastest first; empty if the library cannot be used."""
    return tuple(name for name in _announced() if _runs(name))


def drain_helpers() -> None:
    """Wait until no thread of satchel's own operators reads weights of a session that is about to end."""
    path = _built()
    if path is not None and _loaded.cache_info().currsize:
        _loaded(path).satchel_drain_helpers()


def _announced() -> tuple[str, ...]:
    """The names of the instruction sets that the processor announces, fastest first, and plain C."""
    opened = _opened()
    if isinstance(opened, str):
        return ()
    names = iter(map(opened.satchel_announced_instruction_set, itertools.count()).__next__, None)
    return tuple(name.decode() for name in names)


def _runs(name: str) -> bool:
    """Whether the processor runs an instruction set that it announces, as far as that can be found out."""
    path = _built()
    return path is not None and (name == PLAIN or _is_right(path, name))


@functools.cache
def _is_right(path: Path, name: str) -> bool:
    found = tried(path, name)
    if found in (None, RIGHT):
        return True
    what = "is ended by them" if found == ENDED else "gets wrong products by them"
    warnings.warn(
        f"this processor announces the instructions of {name}, and a program {what}: satchel's kernels do without",
        SatchelWarning,
        stacklevel=2,
    )
    return False


def _opened() -> ctypes.CDLL | str:
    """The library; or why it cannot be used on any processor, as a clause without a subject."""
    path = _built()
    if path is None:
        return "are not built (there was no C compiler when satchel was installed)"
    try:
        return _loaded(path)
    except (OSError, AttributeError) as error:  # of another system, or of another version of satchel
        return f"cannot be loaded ({error}); install satchel again"


@functools.cache
def _loaded(path: Path) -> ctypes.CDLL:
    opened = ctypes.CDLL(str(path))  # never unloaded: memory of threads is freed by code in it when they end
    announced, choose = opened.satchel_announced_instruction_set, opened.satchel_choose_instruction_set
    announced.argtypes, announced.restype = [ctypes.c_size_t], ctypes.c_char_p
    choose.argtypes, choose.restype = [ctypes.c_char_p], ctypes.c_char_p
    opened.satchel_drain_helpers.restype = None
    return opened


def _built() -> Path | None:
    """The library beside this module, with any of Python's extension suffixes."""
    beside = (Path(__file__).with_name(NAME + suffix) for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in beside if path.is_file()), None)
