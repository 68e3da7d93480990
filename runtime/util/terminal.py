"""Text for terminals: names from a bundle without control characters, and aligned columns."""

from __future__ import annotations

import sys
from collections.abc import Sequence

GAP = "  "


def printable(text: str) -> str:
    """The text with every unprintable character (control characters, lone surrogates) escaped.

    Text from a bundle could otherwise move the cursor or raise an encoding error.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def tell_written(path: object, *, shown: bool) -> None:
    """Say on standard error that a file was written which the user asked for beside the output."""
    if shown:
        print(f"{printable(str(path))}: written", file=sys.stderr)


def columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """One line per row, its cells padded to the widest of their column; the columns in `right` are right-aligned.

    Cells are used as they are: escape text from a bundle with `printable` first.
    """
    widths: list[int] = []
    for row in rows:
        widths += [0] * (len(row) - len(widths))
        for index, cell in enumerate(row):
            widths[index] = max(widths[index], len(cell))
    return [
        GAP.join(
            cell.rjust(widths[index]) if index in right else cell.ljust(widths[index]) for index, cell in enumerate(row)
        ).rstrip()
        for row in rows
    ]
