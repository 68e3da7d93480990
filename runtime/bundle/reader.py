"""Reads a bundle on disk, a folder or a packed file: parses its manifest and checks its files.

Nothing here depends on the machine: the graphs to run are chosen in `satchel.runtime.ort.open_bundle`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from satchel.runtime.bundle import strict_json
from satchel.runtime.bundle.archive.folder import folder_span
from satchel.runtime.bundle.archive.packed import packed_files
from satchel.runtime.bundle.archive.span import Span
from satchel.runtime.bundle.digest import check_digest, claimed_digest, parse_manifest, read_content
from satchel.runtime.bundle.errors import BundleError
from satchel.runtime.bundle.hash_cache import HashCache, file_identity, part_of, sha256_of
from satchel.runtime.bundle.manifest import MANIFEST_NAME, CacheSpec, FileRecord, Manifest, Specialized
from satchel.runtime.bundle.names import equal_names
from satchel.runtime.bundle.oms import OMS_NAME, sha256_of_bytes
from satchel.runtime.bundle.recognize import is_checkpoint, is_locked
from satchel.runtime.bundle.signature import SIGNATURE_NAME, check_signature

BESIDE = (MANIFEST_NAME, SIGNATURE_NAME, OMS_NAME)
"""Files of a bundle that its manifest cannot list: itself and its signatures."""

SCRATCH_PREFIX = ".specialize-"
"""The name prefix of temporary folders in a bundle that is being specialized."""

Meter = Callable[[int], AbstractContextManager[Callable[[int], object]]]
"""Shows the progress of hashing: called with the total bytes, it yields a function for the bytes of each read."""


@contextlib.contextmanager
def no_meter(_: int) -> Iterator[Callable[[int], object]]:
    """A `Meter` that shows nothing."""
    yield lambda _: None


@dataclass(frozen=True)
class Bundle:
    """A bundle. `satchel.runtime.open_bundle` makes one that is checked and ready to run.

    `folder` is the folder or the packed file. `specialized` is set if the manifest has graphs for this machine, and
    None if the portable graphs run. `digest` is the manifest's, empty if it was not checked. `packed` has the spans of
    the files in a packed bundle, None for a folder. `custom_ops` are the operator libraries that the graphs need.
    `whole` is False if `manifest` is reduced to the plain graphs.
    """

    folder: Path
    manifest: Manifest
    specialized: Specialized | None = None
    digest: str = ""
    packed: Mapping[str, Span] | None = None
    custom_ops: tuple[Path, ...] = ()
    whole: bool = True

    def span(self, name: str) -> Span:
        """The span on disk of a file that the manifest lists. Raises BundleError for any other name."""
        self._check_listed(name)
        if self.packed is None:
            return Span(self.folder / name, 0, self._size(name), whole=True)
        return self.packed[name]

    def read(self, name: str) -> bytes:
        """The content of a file that the manifest lists. Raises BundleError for other names and read errors."""
        try:
            return self.span(name).read()
        except OSError as error:
            raise BundleError(
                f"{self.folder / name}: cannot be read ({error.strerror}): check its permissions"
            ) from None

    def path(self, name: str) -> Path:
        """The path of a file that the manifest lists, in a folder.

        Raises BundleError for any other name, and for a packed bundle, whose files have no path.
        """
        self._check_listed(name)
        if self.packed is not None:
            raise BundleError(
                f"{self.folder}: is packed into one file, but this needs a folder: extract it with satchel unpack"
            )
        return self.folder / name

    def graph_path(self, phase: str) -> Path:
        """The portable graph file of "prefill", "decode" or "score", in a folder."""
        return self.path(self.manifest.graph(phase).file)

    def absolute(self) -> Bundle:
        """The same bundle with absolute paths, which do not depend on the working directory."""
        packed = self.packed
        if packed is not None:
            packed = {name: dataclasses.replace(span, path=span.path.absolute()) for name, span in packed.items()}
        return dataclasses.replace(self, folder=self.folder.absolute(), packed=packed)

    @property
    def kv_cache(self) -> CacheSpec:
        """The KV cache of the graphs that run, which may store it in another type than the portable graphs."""
        name = None if self.specialized is None else self.specialized.variant("decode")
        return self.manifest.kv_cache if name is None else self.manifest.cache_of(name)

    @property
    def manifest_bytes(self) -> int:
        """The size of manifest.json in bytes."""
        return (
            (self.folder / MANIFEST_NAME).stat().st_size if self.packed is None else self.packed[MANIFEST_NAME].length
        )

    def _check_listed(self, name: str) -> None:
        if name not in self.manifest.files and not (self.specialized and name in self.specialized.files):
            raise BundleError(
                f"{self.folder / MANIFEST_NAME}: '{name}' is not listed in 'files': export the bundle again"
            )

    def _size(self, name: str) -> int:
        made = {} if self.specialized is None else self.specialized.files
        return (self.manifest.files.get(name) or made[name]).bytes

    @property
    def fingerprint(self) -> str:
        """SHA-256, as 64 hex digits, of everything that affects computed numbers and the cache format.

        It covers the names and hashes of the manifest's files, the target, the precision, the cache specification and
        the states, but not specialized graphs or a certificate.
        """
        import hashlib  # as in hash_cache

        manifest = self.manifest
        facts = {
            "files": [[name, record.sha256] for name, record in sorted(manifest.files.items())],
            "target": manifest.target,
            "precision": manifest.precision,
            "kv_cache": strict_json.to_json(manifest.kv_cache),
        }
        if manifest.states:
            facts["states"] = strict_json.to_json(manifest.states)
        return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


def read_bundle(path: str | Path, *, require_signature: str | Path | None = None) -> Bundle:
    """Read the manifest of a folder or a packed file, and check that all files exist with the listed sizes.

    `check_files` checks their contents. `require_signature` is the file of a public key: the manifest must be signed
    with its private key. Raises BundleError.
    """
    path = Path(path)
    _check_place(path)
    packed = packed_files(path) if path.is_file() else None
    if packed is None:
        manifest_span = folder_span(path, MANIFEST_NAME)
    elif MANIFEST_NAME in packed:
        manifest_span = packed[MANIFEST_NAME]
    else:
        raise BundleError(f"{path}: no {MANIFEST_NAME} in it: give a file made by satchel pack")
    name = str(path / MANIFEST_NAME)
    document, digest = _read_manifest(manifest_span, name, anew=require_signature is not None)
    check_signed = None
    if require_signature is not None:
        check_signed = check_signature(path, partial(_beside, path, packed), digest, Path(require_signature))
    manifest = Manifest.from_json(document, name)
    _check_names(name, manifest, packed)
    bundle = Bundle(path, manifest, None, digest, packed)
    _check_sizes(path, manifest.files, _spans(bundle, manifest.files))
    if check_signed is not None:
        check_signed(known_hashes(bundle))
    return bundle


def known_hashes(bundle: Bundle) -> dict[str, str]:
    """The SHA-256 of manifest.json, and those that it states of the bundle's files. Raises BundleError."""
    span = folder_span(bundle.folder, MANIFEST_NAME) if bundle.packed is None else bundle.packed[MANIFEST_NAME]
    content = read_content(span.path, str(bundle.folder / MANIFEST_NAME), span.offset, span.length)
    listed = {name: record.sha256 for name, record in bundle.manifest.files.items()}
    return {MANIFEST_NAME: sha256_of_bytes(content), **listed}


def check_files(bundle: Bundle, meter: Meter = no_meter, *, anew: bool = False) -> None:
    """Check the SHA-256 of every file that the manifest lists, except those of specialized graphs.

    An unchanged file with a cached hash is not read again, unless `anew`. Raises BundleError.
    """
    files = bundle.manifest.files
    _check_hashes(bundle.folder, files, _spans(bundle, files), meter, anew)


def with_specialized(bundle: Bundle, specialized: Specialized, meter: Meter = no_meter) -> Bundle:
    """The bundle with its specialized graphs in use, after checking their files. Raises BundleError."""
    spans = {name: folder_span(bundle.folder, name) for name in specialized.files}
    _check_sizes(bundle.folder, specialized.files, spans)
    _check_hashes(bundle.folder, specialized.files, spans, meter)
    return dataclasses.replace(bundle, specialized=specialized)


def is_bundle(path: str | Path) -> bool:
    """Whether `path` is a bundle, or a file that could be a packed bundle."""
    return (Path(path) / MANIFEST_NAME).is_file() or (Path(path).is_file() and Path(path).suffix == ".pyz")


def _spans(bundle: Bundle, files: Mapping[str, FileRecord]) -> Mapping[str, Span]:
    return bundle.packed or {name: folder_span(bundle.folder, name) for name in files}


def _check_place(path: Path) -> None:
    """Raise BundleError if there is no bundle, and say what is there instead."""
    if is_locked(path):
        raise BundleError(f"{path}: permission denied: check its permissions")
    if is_checkpoint(path):
        raise BundleError(f"{path}: is a checkpoint, not a bundle: make one with satchel export {path} -o BUNDLE")
    if not path.exists():
        raise BundleError(
            f"{path}: no such file or folder: give a folder made by satchel export, or a file made by satchel pack"
        )
    if not path.is_dir() and not path.is_file():
        raise BundleError(f"{path}: is neither a folder nor a regular file: give a folder made by satchel export")
    if path.is_dir() and not os.path.lexists(path / MANIFEST_NAME):
        raise BundleError(f"{path}: no {MANIFEST_NAME} in it: give a folder made by satchel export")


def _read_manifest(span: Span, name: str, *, anew: bool) -> tuple[dict[str, Any], str]:
    """The parsed manifest and its digest, which is checked unless the cache has it for the same file."""
    seen = file_identity(span.path)  # before it is read
    content = read_content(span.path, name, span.offset, span.length)
    document = parse_manifest(content, name)
    claimed = claimed_digest(document, name)
    cache, part = HashCache.load(), f"digest of {part_of(span)}"
    if anew or cache.get(span.path, part) != claimed:
        check_digest(document, name)
        cache.put(span.path, seen, claimed, part)
        cache.save()
    return document, claimed


def _beside(path: Path, packed: Mapping[str, Span] | None, name: str) -> Span | None:
    """The span of a file that the manifest does not list, None where there is none."""
    if packed is not None:
        return packed.get(name)
    return folder_span(path, name) if os.path.lexists(path / name) else None


def _check_names(name: str, manifest: Manifest, packed: Mapping[str, Span] | None) -> None:
    listed = [*manifest.files, *(manifest.specialized.files if manifest.specialized else ()), *BESIDE]
    twins = equal_names(listed)
    if twins is not None:
        raise BundleError(
            f"{name}: {twins[0]!r} and {twins[1]!r} are the same file on some systems: do not trust this bundle"
        )
    if packed is not None:
        odd = sorted(set(packed) - set(BESIDE) ^ set(manifest.files))
        if odd:
            raise BundleError(f"{name}: {odd[0]!r} is listed but missing, or present but not listed: pack it again")


def _check_sizes(folder: Path, files: Mapping[str, FileRecord], spans: Mapping[str, Span]) -> None:
    for name, record in files.items():
        found = spans[name].length
        if found != record.bytes:
            raise BundleError(
                f"{folder / name}: {found} bytes, but the manifest says {record.bytes}: "
                "copy the bundle again, or export it again"
            )


def _check_hashes(
    folder: Path, files: Mapping[str, FileRecord], spans: Mapping[str, Span], meter: Meter, anew: bool = False
) -> None:
    """Check the hash of each file; `anew` ignores cached hashes."""
    cache = HashCache.load()
    unseen = [
        name
        for name, record in files.items()
        if anew or cache.get(spans[name].path, part_of(spans[name])) != record.sha256
    ]
    if not unseen:
        return
    with meter(sum(files[name].bytes for name in unseen)) as advance:
        for name in unseen:
            span = spans[name]
            seen = file_identity(span.path)
            try:
                digest = sha256_of(span.path, advance, span.offset, span.length)
            except OSError as error:
                raise BundleError(
                    f"{folder / name}: cannot be read ({error.strerror}): check its permissions"
                ) from None
            if digest != files[name].sha256:
                raise BundleError(
                    f"{folder / name}: damaged (its SHA-256 differs): copy the bundle again, or export it again"
                )
            cache.put(span.path, seen, digest, part_of(span))
    cache.save()
