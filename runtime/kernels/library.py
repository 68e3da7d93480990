"""Locates the library of satchel's own operators, and says why it cannot be used on this machine.

It is built beside this module when satchel is installed with a C compiler. No other file is ever loaded as the library.
"""

from __future__ import annotations

import importlib.machinery
import os
from pathlib import Path

from satchel.runtime.util.cpu import processor_features

VERSION, OLDEST = 2, 1
"""Raise the first when the operators change, for new graphs. Raise the second, too, when the layout of weights or the
meaning of an operator changes: bundles of before must then be exported again."""

NAME = "_library"

SWITCH, OFF = "SATCHEL_KERNELS", "off"
"""An environment variable, and the value that disables satchel's own operators."""

ARCHITECTURES = ("x86_64", "AMD64")
EXTENSIONS = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx2", "fma")
"""The instruction set that the operators are compiled for; extensions are spelled as in /proc/cpuinfo."""


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
    architecture, *extensions = processor_features()
    if architecture not in ARCHITECTURES:
        return f"are for x86-64, and this processor is {architecture}"
    lacking = [name for name in EXTENSIONS if name not in extensions]
    return f"need a processor with {', '.join(lacking)}" if lacking else None


def _built() -> Path | None:
    """The library beside this module, with any of Python's extension suffixes."""
    beside = (Path(__file__).with_name(NAME + suffix) for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in beside if path.is_file()), None)
