"""Where the library of satchel's own operators is, and why it cannot be used here.

It is built when satchel is installed, where there is a C compiler, and lies beside this module. No other file is ever
taken for it.
"""

from __future__ import annotations

import importlib.machinery
import os
from pathlib import Path

from satchel.runtime.util.cpu import processor_features

VERSION = 1
"""To be raised when the operators or the layout of their weights change: weights packed before are then made anew."""

NAME = "_library"

SWITCH, OFF = "SATCHEL_KERNELS", "off"
"""A variable of the environment, and the value with which satchel does without its own operators."""

ARCHITECTURES = ("x86_64", "AMD64")
EXTENSIONS = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx2", "fma")
"""What the operators are compiled for; extensions as Linux spells them."""


def library() -> Path | None:
    """The built library; None where it cannot be used, and `reason` says why."""
    return None if reason() is not None else _built()


def reason() -> str | None:
    """Why satchel's own operators cannot be used here, as a clause without a subject; None where they can."""
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
    """The library beside this module, whichever of Python's suffixes it has."""
    beside = (Path(__file__).with_name(NAME + suffix) for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in beside if path.is_file()), None)
