"""Names of a bundle's files: relative, inside, told apart on every file system."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath

from satchel.runtime.bundle.limits import LIMITS

CONTROLS = frozenset(map(chr, (*range(0x20), *range(0x7F, 0xA0))))
"""The control characters of Unicode (category Cc); half a surrogate pair is none, and as bad."""


def leads_outside(name: str) -> bool:
    """Whether a name is no plain relative path: absolute, with `..`, a backslash, a colon or a control character."""
    pure = PurePosixPath(name)
    plain = not pure.is_absolute() and ".." not in pure.parts and str(pure) == name and name != "."
    odd = any(char in "\\:" or char in CONTROLS or "\ud800" <= char <= "\udfff" for char in name)
    return not plain or odd


def too_long(name: str) -> bool:
    """Whether a name has more bytes than `LIMITS` allows. The name must be text."""
    return len(name.encode("utf-8", "surrogatepass")) > LIMITS["bytes of a file name"].most


def equal_names(names: Iterable[str]) -> tuple[str, str] | None:
    """Two names that some file system takes for one, since they differ in case or in how accents are composed."""
    seen: dict[str, str] = {}
    for name in names:
        key = name.casefold() if name.isascii() else _composed(_composed(name).casefold())
        if key in seen:
            return seen[key], name
        seen[key] = name
    return None


def _composed(name: str) -> str:
    import unicodedata  # a megabyte of tables, for names beyond ASCII alone

    return unicodedata.normalize("NFC", name)
