"""Changes parsed JSON and bytes at random, and makes a bundle's hashes and digest right again."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from pathlib import Path
from typing import Any

from fuzz.edges import NUMBERS, TEXTS
from support.tiny_bundle import read_manifest, write_manifest

Random = random.Random

OTHER_VALUES: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], {"": ""}, [0] * 100)


def some_value(rng: Random) -> Any:
    """A value that is at the edge of something."""
    return copy.deepcopy(rng.choice((rng.choice(TEXTS), rng.choice(NUMBERS), rng.choice(OTHER_VALUES))))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values inside parsed JSON."""
    keys: list[Any] = []
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        keys = list(range(len(value)))
    return [inner for key in keys for inner in ((*path, key), *places(value[key], (*path, key)))]


def mutate_json(rng: Random, document: Any) -> str:
    """Change a few places of parsed JSON; returns what was done."""
    notes = []
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        paths = places(document)
        if not paths:
            break
        # Lists of ids are long: choose the section first, so that short ones get their share.
        top = rng.choice(sorted({path[0] for path in paths}, key=str))
        *parents, key = rng.choice([path for path in paths if path[0] == top])
        parent = document
        for step in parents:
            parent = parent[step]
        what = rng.choice(("set", "set", "set", "delete", "copy", "near", "rename", "repeat"))
        if what == "delete":
            del parent[key]
        elif what == "copy":
            other: Any = document
            for step in rng.choice(paths):
                other = other[step]
            parent[key] = copy.deepcopy(other)
        elif what == "near" and isinstance(parent[key], int) and not isinstance(parent[key], bool):
            parent[key] += rng.choice((-1, 1, 2, -1000, 1000))
        elif what == "rename" and isinstance(parent, dict):
            parent[rng.choice(TEXTS)] = parent.pop(key)
        elif what == "repeat" and isinstance(parent, list):
            parent.extend(copy.deepcopy(parent) * rng.choice((1, 3)))
        else:
            parent[key] = some_value(rng)
        notes.append(f"{what} {'.'.join(map(str, (*parents, key)))[:60]}")
    return ", ".join(notes)


def mutate_bytes(rng: Random, content: bytes, first: int = 0, last: int | None = None) -> bytes:
    """Change, insert, remove or repeat bytes between two positions."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        last_now = len(changed) if last is None else min(last, len(changed))
        if last_now <= first:
            break
        at = rng.randrange(first, last_now)
        what = rng.randrange(7)
        if what == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            changed[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, 0x22, 0x7B))
        elif what == 2:
            changed[at:at] = rng.randbytes(rng.choice((1, 4, 100)))
        elif what == 3:
            del changed[at : at + rng.choice((1, 4, 100))]
        elif what == 4:
            changed[at:at] = changed[at : at + rng.choice((1, 16, 300))]
        elif what == 5:
            changed[at : at + 4] = rng.choice((0, 1, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)).to_bytes(4, "little")
        else:
            del changed[at:]
    return bytes(changed)


def mend(folder: Path, document: Any = None) -> None:
    """Make sizes, hashes and digest of a bundle right for what lies in it, as far as its manifest lets that happen."""
    document = read_manifest(folder) if document is None else document
    files = document.get("files") if isinstance(document, dict) else None
    for name, record in files.items() if isinstance(files, dict) else ():
        path = folder / str(name).replace("\0", "").encode("utf-8", "replace").decode()
        try:
            inside = path.resolve().is_relative_to(folder.resolve()) and path.is_file()
        except OSError:
            continue
        if inside and isinstance(record, dict) and {"bytes", "sha256"} <= record.keys():
            content = path.read_bytes()
            record |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    try:
        write_manifest(folder, document)
    except (ValueError, RecursionError):  # no text, or no number: it has no digest
        (folder / "manifest.json").write_text(json.dumps(document), encoding="utf-8")


def state_with(header: Any, tensors: bytes) -> bytes:
    """A saved state of this header and these bytes of tensors, with the hash made right as far as that is possible."""
    metadata = header.get("__metadata__")
    if isinstance(metadata, dict):
        others = {key: value for key, value in metadata.items() if key != "sha256"}
        text = json.dumps(others, sort_keys=True, separators=(",", ":"))
        metadata["sha256"] = hashlib.sha256(text.encode() + tensors).hexdigest()
    line = json.dumps(header).encode()
    line += b" " * (-len(line) % 8)
    return len(line).to_bytes(8, "little") + line + tensors
