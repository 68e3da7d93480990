"""Makes a bundle's graphs ready for this machine: optimised, with weights as its kernels want them, mapped at load.

ONNX Runtime optimises each graph and saves it with the weights that its kernels have packed. What the two phases have
in common, and what `weights.bin` holds already, is stored once. The portable graphs stay as they are.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from satchel.runtime import onnx_wire
from satchel.runtime.bundle import Bundle, open_bundle
from satchel.runtime.defaults import PROVIDER
from satchel.runtime.engine import Engine
from satchel.runtime.errors import SatchelError, SatchelWarning
from satchel.runtime.hash_memory import sha256_of
from satchel.runtime.manifest import MANIFEST_NAME, FileRecord, Manifest, Specialized
from satchel.runtime.processor import processor_features, processor_name
from satchel.runtime.proof.certify import check_certificate
from satchel.runtime.session import SessionSettings, save_optimised
from satchel.runtime.specializing.expand import EXPANDED_NAME, expand_weights

PHASES = ("prefill", "decode")
PREFIX = "specialized-"
PAGE, PAGED_FROM = 4096, 1 << 20
CACHE_LINE = 64
"""Bytes that offsets are multiples of: pages for what is mapped alone, cache lines for the small rest."""

INLINE_BYTES = 1024
"""Constants smaller than this stay in the graph."""

DISK_FACTOR, INT8_DISK_FACTOR = 5, 9
"""The most that the work takes of the weight file's size, with weights as they are stored, and with int8 ones made of
those in 4 bits: what a graph was optimised from and to, and the file in the making.
"""

TIMED_TOKENS, TIMED_RUNS = 512, 5
ENOUGH_FASTER = 0.95
"""Tiles take less memory, so the other kernel must take at most this share of their time."""

CHECKED_TOKENS = 8
TOLERANCE = 1e-3
"""Between logits of the specialised and the portable graphs, of the largest one: the kernels are the same."""

ROUNDED_TOLERANCE = 0.5
"""The same where prefill has int8 weights: enough to notice a wrong graph; the certificate tells the rest."""


def specialize(
    bundle: Bundle,
    *,
    int8_prefill: bool = False,
    threads: int | None = None,
    progress: Callable[[str], Any] = lambda stage: None,
) -> Manifest:
    """Write graphs and packed weights for this machine into a bundle's folder, and name them in its manifest.

    What an earlier call left is replaced. The files are checked against the portable graphs before the manifest, which
    is written last, names them; until then, and after any failure, the bundle is what it was.

    Args:
        int8_prefill: Make int8 weights of those in 4 bits, for prefill alone: a faster prefill for more memory.
        threads: CPU threads for the work; None for one per physical core.
        progress: Hears the name of each stage as it begins.

    Returns:
        The bundle's manifest as it is now.

    Raises:
        SatchelError: The folder cannot be written, the disk has no room, or the results differ; or the bundle has no
            weights in 4 bits, or int8 ones lose more than its certificate allows.
        BundleError: A graph does not load.
    """
    folder = bundle.folder
    settings = SessionSettings(threads=threads)
    portable = replace(bundle, specialized=None)
    sources = {"prefill": "prefill_int8" if int8_prefill else "prefill"}
    if int8_prefill or bundle.manifest.graph("decode").session_of is None:
        sources["decode"] = "decode"
    for phase in sources.values():
        portable.graph_path(phase)
    with _scratch(folder) as scratch:
        _check_room(portable, scratch, INT8_DISK_FACTOR if int8_prefill else DISK_FACTOR)
        with (scratch / "data").open("wb") as file:
            store = _Store(file, f"{PREFIX}{_token(portable)}.bin")
            progress("reading the weights")
            for name in _weight_files(portable):
                store.know(portable.path(name), name, portable)
            for phase, source in sources.items():
                progress(f"optimising {phase}")
                path = scratch / f"{phase}.onnx"
                with _complete(portable, source, scratch) as graph:
                    save_optimised(portable, source, graph, settings, path, INLINE_BYTES)
                _relocate(path, store)
        names = {phase: f"{PREFIX}{_token(portable)}-{phase}.onnx" for phase in sources}
        made = {store.name: scratch / "data", **{names[phase]: scratch / f"{phase}.onnx" for phase in sources}}
        progress("checking")
        records = {
            name: FileRecord(path.stat().st_size, sha256_of(path, lambda _: None)) for name, path in made.items()
        }
        specialized = Specialized(
            onnxruntime=ort.__version__,
            provider=PROVIDER,
            processor=processor_name(),
            features=processor_features(),
            int8_prefill=int8_prefill,
            tiled_attention=True,
            graphs=names,
            files=records,
        )
        old = set() if bundle.manifest.specialized is None else set(bundle.manifest.specialized.files)
        with _placed(folder, made, keep=old):
            _check(portable, Bundle(folder, bundle.manifest, specialized), settings)
            progress("timing attention")
            tiled = Bundle(folder, bundle.manifest, specialized)
            plain = replace(specialized, tiled_attention=False)
            if _plain_is_faster(tiled, replace(tiled, specialized=plain), settings):
                specialized = plain
            manifest = replace(bundle.manifest, specialized=specialized)
            _write_manifest(folder, manifest, scratch)
    for name in old - set(made):
        (folder / name).unlink(missing_ok=True)
    return manifest


def specialize_if_needed(path: str | Path, *, threads: int | None = None, progress: Callable[[str], Any]) -> None:
    """Specialise the bundle at `path` unless it is ready for this machine. Where that fails, warn and leave it.

    Raises BundleError for a bundle that cannot be opened.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SatchelWarning)
        bundle = open_bundle(path)
    if bundle.specialized is not None:
        return
    try:
        specialize(bundle, threads=threads, progress=progress)
    except SatchelError as error:
        warnings.warn(str(error), SatchelWarning, stacklevel=2)


def remove(bundle: Bundle) -> Manifest:
    """Take what `specialize` added out of a bundle again. Returns the manifest. Raises SatchelError."""
    specialized = bundle.manifest.specialized
    manifest = replace(bundle.manifest, specialized=None)
    if specialized is None:
        return manifest
    with _scratch(bundle.folder) as scratch:
        _write_manifest(bundle.folder, manifest, scratch)
    for name in specialized.files:
        (bundle.folder / name).unlink(missing_ok=True)
    return manifest


@contextlib.contextmanager
def _complete(bundle: Bundle, source: str, scratch: Path) -> Iterator[Path]:
    """The graph file of `source`, all of whose weights are there; ONNX Runtime reads no file above a graph's folder."""
    if source != "prefill_int8":
        yield bundle.graph_path(source)
        return
    weights, graph = scratch / EXPANDED_NAME, scratch.with_suffix(".onnx")
    expand_weights(bundle, weights)

    def moved(entries: onnx_wire.External) -> onnx_wire.External:
        inside = entries["location"] == EXPANDED_NAME
        return {**entries, "location": f"{scratch.name}/{EXPANDED_NAME}"} if inside else entries

    try:
        graph.write_bytes(onnx_wire.map_external_data(bundle.graph_path(source).read_bytes(), moved))
        yield graph
    finally:
        graph.unlink(missing_ok=True)
        weights.unlink(missing_ok=True)


@dataclass
class _Store:
    """The one file that takes the data of both graphs; equal bytes are written once.

    `places` are those of data by its hash: a file of the bundle, and the offset in it.
    """

    file: BinaryIO
    name: str
    places: dict[bytes, tuple[str, int]] = field(default_factory=dict)
    size: int = 0

    def know(self, path: Path, name: str, bundle: Bundle) -> None:
        """Take in what the portable graphs keep in the weight file `name`, so that it is not written again."""
        ranges = set()
        for phase in ("prefill", "decode", "score"):
            for entries in onnx_wire.external_data(bundle.graph_path(phase).read_bytes()):
                if entries.get("location") == name:
                    ranges.add((int(entries["offset"]), int(entries["length"])))
        with _mapped(path) as content:
            for offset, length in ranges:
                self.places.setdefault(_digest(content[offset : offset + length]), (name, offset))

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


def _relocate(graph: Path, store: _Store) -> None:
    """Move a saved graph's data into the store, and point the graph there; its own data file goes."""
    data_file = graph.with_suffix(".data")
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

        model = onnx_wire.map_external_data(graph.read_bytes(), moved)
    graph.write_bytes(model)
    data_file.unlink()


def _check(portable: Bundle, specialised: Bundle, settings: SessionSettings) -> None:
    """Raise SatchelError unless what the specialised graphs give is right."""
    certificate = portable.manifest.certificate
    rounded = specialised.specialized is not None and specialised.specialized.int8_prefill
    _compare(portable, specialised, settings, ROUNDED_TOLERANCE if rounded else TOLERANCE)
    if rounded and certificate is not None:
        lines = check_certificate(Engine(specialised, settings), certificate)
        if lines:
            raise SatchelError(
                f"{portable.folder}: with int8 weights prefill loses more than the certificate allows ({lines[0]}): "
                "nothing was changed; specialise it without them"
            )


def _compare(portable: Bundle, specialised: Bundle, settings: SessionSettings, tolerance: float) -> None:
    """Raise SatchelError unless both give the same logits for some tokens, by prefill and by decode."""
    expected, found = (_logits(bundle, settings) for bundle in (portable, specialised))
    error = float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), 1e-30))
    if not error <= tolerance:
        raise SatchelError(
            f"{portable.folder}: the specialised graphs differ from the portable ones by {error:.2g} of the logits: "
            "nothing was changed; report this processor and ONNX Runtime to satchel"
        )


def _plain_is_faster(tiled: Bundle, plain: Bundle, settings: SessionSettings) -> bool:
    """Whether prefill takes less time with one row of scores at a time, by medians of runs in turn."""
    length = min(TIMED_TOKENS, tiled.manifest.model.max_context)
    ids = [(7 * i + 1) % tiled.manifest.model.vocab_size for i in range(length)]
    engines = [Engine(bundle, settings) for bundle in (tiled, plain)]
    times: list[list[float]] = [[], []]
    for _ in range(TIMED_RUNS):
        for engine, taken in zip(engines, times, strict=True):
            state = engine.new_state(length)
            start = time.perf_counter()
            engine.prefill(state, ids)
            taken.append(time.perf_counter() - start)
    return bool(np.median(times[1]) < np.median(times[0]) * ENOUGH_FASTER)


def _logits(bundle: Bundle, settings: SessionSettings) -> NDArray[np.float32]:
    engine = Engine(bundle, settings)
    count = max(min(CHECKED_TOKENS, engine.max_context - 1), 1)
    ids = [(7 * i + 1) % engine.vocabulary for i in range(count)]
    state = engine.new_state(min(count + 1, engine.max_context))
    logits = [engine.prefill(state, ids).copy()]
    if state.cache.capacity > count:
        logits.append(engine.decode(state, ids[0]).copy())
    return np.stack(logits)


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    try:
        path = Path(tempfile.mkdtemp(prefix=".specialize-", dir=folder))
    except OSError as error:
        raise SatchelError(
            f"{folder}: cannot be written ({error.strerror}): the portable graphs run as they are; "
            "copy the bundle to a place of your own to specialise it"
        ) from None
    try:
        yield path
    except OSError as error:
        raise SatchelError(
            f"{folder}: cannot be written ({error.strerror}): nothing was changed; free space and try again"
        ) from None
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _placed(folder: Path, made: dict[str, Path], keep: set[str]) -> Iterator[None]:
    """Move files to their names in the folder; they are taken away again if the block fails."""
    try:
        for name, path in made.items():
            path.replace(folder / name)
        yield
    except BaseException:
        for name in made.keys() - keep:
            (folder / name).unlink(missing_ok=True)
        raise


def _write_manifest(folder: Path, manifest: Manifest, scratch: Path) -> None:
    path = scratch / MANIFEST_NAME
    path.write_text(json.dumps(manifest.to_json(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.copymode(folder / MANIFEST_NAME, path)
    path.replace(folder / MANIFEST_NAME)


def _record(path: Path) -> FileRecord:
    return FileRecord(path.stat().st_size, sha256_of(path, lambda _: None))


def _check_room(bundle: Bundle, scratch: Path, factor: int) -> None:
    needed = factor * sum(bundle.manifest.files[name].bytes for name in _weight_files(bundle))
    free = shutil.disk_usage(scratch).free
    if free < needed:
        raise SatchelError(
            f"{bundle.folder}: specialising takes up to {needed >> 20:,} MiB while it works and {free >> 20:,} MiB are "
            "free: free some space"
        )


def _weight_files(bundle: Bundle) -> list[str]:
    """The files in which the portable graphs keep their data."""
    names = {
        entries.get("location", "")
        for phase in PHASES  # prefill_int8 has no others
        for entries in onnx_wire.external_data(bundle.graph_path(phase).read_bytes())
    }
    return sorted(name for name in names if name in bundle.manifest.files)


def _token(bundle: Bundle) -> str:
    """A short name for this bundle on this machine, so that files of two machines are not taken for each other."""
    facts = [ort.__version__, *processor_features(), *(record.sha256 for record in bundle.manifest.files.values())]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:8]


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[memoryview]:
    """A file's content; an empty file cannot be mapped."""
    if not path.exists() or not path.stat().st_size:
        yield memoryview(b"")
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        view = memoryview(content)
        try:
            yield view
        finally:
            view.release()


def _digest(data: memoryview) -> bytes:
    return hashlib.sha256(data).digest()
