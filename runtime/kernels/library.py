"""Locates the library of satchel's own operators, and says why it cannot be used on this machine.

It lies beside this module in wheels for a platform, and is built there when satchel is installed from source with a C
compiler. No other file is ever loaded as the library.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import os
from pathlib import Path

VERSION, OLDEST = 2, 1
"""Raise the first when the operators change, for new graphs. Raise the second, too, when the layout of weights or the
meaning of an operator changes: bundles of before must then be exported again."""

NAME = "_library"

SWITCH, OFF = "SATCHEL_KERNELS", "off"
"""An environment variable, and the value that disables satchel's own operators. Another value is the name of the
instruction set that they use; unset, it is the fastest that the processor has."""

INSTRUCTION_SETS = ("avx512", "avx2", "neon", "plain")
"""The names of instruction sets, as in isa/; plain C, right on any processor but slow, is used only if it is named."""


def runs(version: int) -> bool:
    """Whether these operators run graphs that were made for this version of them."""
    return OLDEST <= version <= VERSION


def library() -> Path | None:
    """The path of the built library, or None if it cannot be used; `reason` says why."""
    return None if reason() is not None else _built()


def reason() -> str | None:
    """Why satchel's own operators cannot be used here, as a clause without a subject; None if they can."""
    if os.environ.get(SWITCH) == OFF:
        return f"are switched off ({SWITCH}={OFF})"
    if _built() is None:
        return "are not built (there was no C compiler when satchel was installed)"
    try:
        if instruction_set() is not None:
            return None
    except OSError as error:
        return f"cannot be loaded ({error}); install satchel again"
    named = os.environ.get(SWITCH)
    if named is None:
        return "need a processor with AVX2 (x86-64) or dot products (Arm)"
    if named not in INSTRUCTION_SETS:
        return f"know no instruction set {named} ({SWITCH}: {', '.join((OFF, *INSTRUCTION_SETS))})"
    return f"cannot use {named} on this processor ({SWITCH}={named})"


def instruction_set() -> str | None:
    """The name of the instruction set that satchel's own operators use from now on; None if they cannot be used.

    Raises:
        OSError: The library was built for another system.
    """
    built = _built()
    if built is None:
        return None
    choose = _opened(built).satchel_choose_instruction_set
    choose.argtypes, choose.restype = [ctypes.c_char_p], ctypes.c_char_p
    named = os.environ.get(SWITCH)
    chosen: bytes | None = choose(None if named is None else named.encode())
    return None if chosen is None else chosen.decode()


@functools.cache
def _opened(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))  # never unloaded: memory of threads is freed by code in it when they end


def _built() -> Path | None:
    """The library beside this module, with any of Python's extension suffixes."""
    beside = (Path(__file__).with_name(NAME + suffix) for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in beside if path.is_file()), None)
