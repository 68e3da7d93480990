"""Deduplicates the data that ONNX Runtime saves with optimized graphs, so that graphs share equal data."""

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
"""Alignment in bytes: pages for data of `PAGED_FROM` bytes or more, cache lines for smaller data."""

Places = dict[bytes, tuple[str, int]]
"""Locations of data by its hash: a file of the bundle, and the offset in it."""


@dataclass
class Store:
    """A file, called `name` in the bundle, for the data of several graphs; equal bytes are written once.

    `places` are locations of existing data, which is not written again.
    """

    file: BinaryIO
    name: str
    places: Places = field(default_factory=dict)
    size: int = 0

    def put(self, data: memoryview, *, here: bool) -> tuple[str, int]:
        """Write data unless it exists. Returns its file and offset; `here` requires this file."""
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
    """The locations of the portable graphs' data in the weight file `name`."""
    ranges = set()
    for phase in PHASES:
        for entries in onnx_wire.external_data(bundle.graph_path(phase).read_bytes()):
            if entries.get("location") == name:
                ranges.add((int(entries["offset"]), int(entries["length"])))
    with _mapped(bundle.path(name)) as content:
        return {_digest(content[offset : offset + length]): (name, offset) for offset, length in sorted(ranges)}


def relocate(saved: Path, graph: Path, store: Store) -> None:
    """Move a saved graph's data into the store, and write the graph with the new locations to `graph`."""
    data_file = saved.with_suffix(".data")
    with _mapped(data_file) as content:

        def part(offset: str, length: str) -> memoryview:
            return content[int(offset) : int(offset) + int(length)]

        def moved(entries: onnx_wire.External) -> onnx_wire.External:
            packed = [key for key in entries if key.startswith("prepacked_")]
            # ONNX Runtime requires packed data in the same file as the original.
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
    """A file's content, memory-mapped; empty for a missing or empty file, which cannot be mapped."""
    if not path.exists() or not path.stat().st_size:
        yield memoryview(b"")
        return
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    view = memoryview(content)
    try:
        yield view
    finally:
        # After an interrupt the traceback still refers to slices: the mapping then ends with the last of them.
        with contextlib.suppress(BufferError):
            view.release()
            content.close()


def _digest(data: memoryview) -> bytes:
    return hashlib.sha256(data).digest()
