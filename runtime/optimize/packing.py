"""Takes apart what ONNX Runtime saves beside an optimized graph, so that graphs share what they have in common."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from satchel.runtime.bundle import onnx_wire
from satchel.runtime.bundle.contract import PHASES
from satchel.runtime.bundle.reader import Bundle

PAGE, PAGED_FROM = 4096, 1 << 20
CACHE_LINE = 64
"""Bytes that offsets are multiples of: pages for what is mapped alone, cache lines for the small rest."""

Places = dict[bytes, tuple[str, int]]
"""Where data lies, by its hash: a file of the bundle, and the offset in it."""


@dataclass
class Store:
    """The one file, called `name` in the bundle, that takes the data of several graphs; equal bytes are written once.

    `places` are those that are not to be written again.
    """

    file: BinaryIO
    name: str
    places: Places = field(default_factory=dict)
    size: int = 0

    def put(self, data: memoryview, *, here: bool) -> tuple[str, int]:
        """The file and offset at which the data lies; `here`: in this file, even if another one has it."""
        digest = _digest(data)
        place = self.places.get(digest)
        if place is None or (here and place[0] != self.name):
            alignment = PAGE if len(data) >= PAGED_FROM else CACHE_LINE
            self.file.write(bytes(-self.size % alignment))
            self.size += -self.size % alignment
            place = self.places[digest] = (self.name, self.size)
            self.file.write(data)
            self.size += len(data)
        return place


def stored_places(bundle: Bundle, name: str) -> Places:
    """Where the portable graphs keep their data in the weight file `name`."""
    ranges = set()
    for phase in PHASES:
        for entries in onnx_wire.external_data(bundle.graph_path(phase).read_bytes()):
            if entries.get("location") == name:
                ranges.add((int(entries["offset"]), int(entries["length"])))
    with _mapped(bundle.path(name)) as content:
        return {_digest(content[offset : offset + length]): (name, offset) for offset, length in sorted(ranges)}


def relocate(saved: Path, graph: Path, store: Store) -> None:
    """Put a saved graph's data into the store, and write the graph that points there to `graph`."""
    data_file = saved.with_suffix(".data")
    with _mapped(data_file) as content:

        def part(offset: str, length: str) -> memoryview:
            return content[int(offset) : int(offset) + int(length)]

        def moved(entries: onnx_wire.External) -> onnx_wire.External:
            packed = [key for key in entries if key.startswith("prepacked_")]
            # What is packed must lie in the same file as what it was packed from.
            location, offset = store.put(part(entries["offset"], entries["length"]), here=bool(packed))
            result = {"location": location, "offset": str(offset), "length": entries["length"]}
            for key in packed:
                kernel, *blobs = entries[key].split("|")
                places = []
                for blob in blobs:
                    start, length, *rest = blob.split(";")
                    places.append(";".join([str(store.put(part(start, length), here=True)[1]), length, *rest]))
                result[key] = "|".join([kernel, *places])
            return result

        model = onnx_wire.map_external_data(saved.read_bytes(), moved)
    graph.write_bytes(model)


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[memoryview]:
    """A file's content; an empty file cannot be mapped."""
    if not path.exists() or not path.stat().st_size:
        yield memoryview(b"")
        return
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    view = memoryview(content)
    try:
        yield view
    finally:
        # After an interrupt the traceback still holds parts of it: the mapping then ends with the last of them.
        with contextlib.suppress(BufferError):
            view.release()
            content.close()


def _digest(data: memoryview) -> bytes:
    return hashlib.sha256(data).digest()
