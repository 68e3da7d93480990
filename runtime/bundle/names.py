"""Rules for names of a bundle's files: relative, inside the bundle, and distinct on every file system."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath

from satchel.runtime.bundle.limits import LIMITS

CONTROLS = frozenset(map(chr, (*range(0x20), *range(0x7F, 0xA0))))
"""The control characters of Unicode (category Cc)."""


def leads_outside(name: str) -> bool:
    """Whether a name is not a plain relative path.

    Such a name is absolute, or has `..`, a backslash, a colon, a control character or a lone surrogate.
    """
    pure = PurePosixPath(name)
    plain = not pure.is_absolute() and ".." not in pure.parts and str(pure) == name and name != "."
    odd = any(char in "\\:" or char in CONTROLS or "\ud800" <= char <= "\udfff" for char in name)
    return not plain or odd


WINDOWS_CHARACTERS = frozenset('<>"|?*')
WINDOWS_DEVICES = frozenset(
    (
        "con",
        "prn",
        "aux",
        "nul",
        "conin$",
        "conout$",
        *(f"{port}{number}" for port in ("com", "lpt") for number in "0123456789¹²³"),
    )
)
"""Names that no file can have on Windows, with any extension ("Naming Files, Paths, and Namespaces" of Win32)."""


def impossible_on_windows(name: str) -> bool:
    """Whether Windows cannot store a file under a relative path, or would store it under another name."""
    return any(
        part.endswith((".", " "))
        or not WINDOWS_CHARACTERS.isdisjoint(part)
        or part.partition(".")[0].rstrip(" ").lower() in WINDOWS_DEVICES
        for part in name.split("/")
    )


def too_long(name: str) -> bool:
    """Whether a name has more bytes than `LIMITS` allows."""
    return len(name.encode("utf-8", "surrogatepass")) > LIMITS["bytes of a file name"].most


def equal_names(names: Iterable[str]) -> tuple[str, str] | None:
    """Two names that are equal on some file systems: they differ only in case or in Unicode normalization."""
    seen: dict[str, str] = {}
    for name in names:
        key = name.casefold() if name.isascii() else _composed(_composed(name).casefold())
        if key in seen:
            return seen[key], name
        seen[key] = name
    return None


def _composed(name: str) -> str:
    import unicodedata  # a megabyte of tables, which ASCII names do not need

    return unicodedata.normalize("NFC", name)
