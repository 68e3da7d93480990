"""Finds and joins the parts of a split GGUF file, whichever part is given and however the parts are named."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from satchel.export.checkpoint.gguf_file import GgufFile, read_gguf
from satchel.export.errors import ExportError

_NUMBER, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"
_NAME = re.compile(r"(?P<stem>.+)-\d+-of-(?P<count>\d+)\.gguf", re.IGNORECASE)


def open_parts(path: Path) -> GgufFile:
    """Read a GGUF file; for a part of a split one, with all other parts, which are in the same folder.

    The metadata is that of the first part; the keys `split.no` and `split.count` say which part a file is.

    Raises:
        ExportError: If a part cannot be read, is missing, or there is more than one file for it.
    """
    given = read_gguf(path)
    count, number = given.metadata.get(_COUNT, 1), given.metadata.get(_NUMBER, 0)
    if count == 1 or count == 0:
        return given
    if type(count) is not int or type(number) is not int or not 0 <= number < count:
        raise ExportError(f"{path}: part {number!r} of {count!r} cannot be; download the file again")
    parts, unreadable = {number: given}, []
    for other in _candidates(path):
        try:
            found = read_gguf(other)
        except ExportError as error:
            unreadable.append(error)
            continue
        if not _belongs(found, given):
            continue
        place = found.metadata.get(_NUMBER, 0)
        if place in parts:
            raise ExportError(
                f"{path}: {parts[place].path.name} and {other.name} are both part {place + 1} of {count}; "
                "leave only the parts of one model in the folder"
            )
        parts[place] = found
    if len(parts) < count:
        if unreadable:
            raise unreadable[0]
        missing = next(i for i in range(count) if i not in parts)
        raise ExportError(
            f"{path}: part {number + 1} of {count}, and {path.parent} has no part {missing + 1} of {count}; put all "
            "parts into one folder, or join them with gguf-split --merge"
        )
    return _joined([parts[i] for i in range(count)])


def _candidates(path: Path) -> list[Path]:
    """Return the other files of the folder that may be parts; those of the same name only, where names are numbered."""
    others = [p for p in sorted(path.parent.glob("*.[gG][gG][uU][fF]")) if p.is_file() and not p.samefile(path)]
    name = _NAME.fullmatch(path.name)
    if name is None:
        return others
    named = {p: _NAME.fullmatch(p.name) for p in others}
    alike = [p for p, other in named.items() if other and other.groupdict() == name.groupdict()]
    return alike if len(alike) >= int(name["count"]) - 1 else others


def _belongs(found: GgufFile, given: GgufFile) -> bool:
    return all(found.metadata.get(key) == given.metadata.get(key) for key in (_COUNT, _TENSORS))


def _joined(parts: list[GgufFile]) -> GgufFile:
    first = parts[0]
    for part in parts[1:]:
        twice = first.tensors.keys() & part.tensors.keys()
        if twice:
            raise ExportError(f"{part.path}: tensor {min(twice)} is also in another part; download both again")
        first = dataclasses.replace(
            first,
            tensors={**first.tensors, **part.tensors},
            types={**first.types, **part.types},
            stored_bytes=first.stored_bytes + part.stored_bytes,
            parts=(*first.parts, *part.parts),
        )
    expected = first.metadata.get(_TENSORS, len(first.tensors))
    if expected != len(first.tensors):
        raise ExportError(
            f"{first.path}: its {len(parts)} parts have {len(first.tensors)} tensors instead of {expected}; "
            "download them again"
        )
    return first
