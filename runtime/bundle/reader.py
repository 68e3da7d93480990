"""A bundle on disk: its folder or file, its manifest, and files that are all there, inside it and undamaged."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from satchel.runtime.bundle import strict_json
from satchel.runtime.bundle.archive.folder import folder_span
from satchel.runtime.bundle.archive.packed import packed_files
from satchel.runtime.bundle.archive.span import Span
from satchel.runtime.bundle.errors import BundleError, SatchelWarning
from satchel.runtime.bundle.hash_cache import HashCache, file_identity, part_of, sha256_of
from satchel.runtime.bundle.limits import LIMITS
from satchel.runtime.bundle.manifest import MANIFEST_NAME, FileRecord, Manifest, Specialized
from satchel.runtime.bundle.manifest_text import claimed_digest, parse_document, true_digest
from satchel.runtime.bundle.names import equal_names
from satchel.runtime.bundle.scratch import sweep
from satchel.runtime.kernels import library
from satchel.runtime.ort.custom_ops import Custom, choose
from satchel.runtime.util.cpu import processor_features
from satchel.runtime.util.progress import progress_bar

SIGNATURE_NAME = "signature.json"
BESIDE = (MANIFEST_NAME, SIGNATURE_NAME)
"""Files of a bundle that its manifest cannot list, since they tell of it."""

SCRATCH_PREFIX = ".specialize-"
"""How the names of folders in a bundle begin in which it is being specialized."""

DEFAULT_CUSTOM = Custom()


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. Make one with `open_bundle`, which checks what is on disk first.

    `folder` is the folder, or the packed file. `specialized` is what the manifest has for this very machine; None where
    the portable graphs are to run. `digest` is that of the manifest as it is on disk; None where it has none. `packed`
    says where the files lie in a packed bundle, None for a folder. `custom_ops` are the libraries that its graphs need.
    `whole` is False where `manifest` is that of the plain graphs.
    """

    folder: Path
    manifest: Manifest
    specialized: Specialized | None = None
    digest: str | None = None
    packed: Mapping[str, Span] | None = None
    custom_ops: tuple[Path, ...] = ()
    whole: bool = True

    def span(self, name: str) -> Span:
        """Where a file that the manifest lists lies on disk. Raises BundleError for any other name."""
        self._check_listed(name)
        if self.packed is None:
            return Span(self.folder / name, 0, self._size(name), whole=True)
        return self.packed[name]

    def read(self, name: str) -> bytes:
        """The content of a file that the manifest lists. Raises BundleError for any other, and if it cannot be read."""
        try:
            return self.span(name).read()
        except OSError as error:
            raise BundleError(
                f"{self.folder / name}: cannot be read ({error.strerror}): give yourself the right to"
            ) from None

    def path(self, name: str) -> Path:
        """The path of a file that the manifest lists, in a folder.

        Raises BundleError for any other name, and for a packed bundle, whose files have none.
        """
        self._check_listed(name)
        if self.packed is not None:
            raise BundleError(f"{self.folder}: is packed in one file, and this needs a folder: satchel unpack it first")
        return self.folder / name

    def graph_path(self, phase: str) -> Path:
        """The portable graph file of "prefill", "decode" or "score", in a folder."""
        return self.path(self.manifest.graph(phase).file)

    def absolute(self) -> Bundle:
        """The same with absolute paths, which stay right when the working directory is another one."""
        packed = self.packed
        if packed is not None:
            packed = {name: dataclasses.replace(span, path=span.path.absolute()) for name, span in packed.items()}
        return dataclasses.replace(self, folder=self.folder.absolute(), packed=packed)

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
        """SHA-256, as 64 hex digits, of what decides the numbers that the graphs compute and how a cache holds them.

        That is the names and hashes of the manifest's files, the target, the precision and the cache's description.
        Specialized graphs and a certificate leave it as it is.
        """
        import hashlib  # as in hash_memory

        manifest = self.manifest
        facts = {
            "files": [[name, record.sha256] for name, record in sorted(manifest.files.items())],
            "target": manifest.target,
            "precision": manifest.precision,
            "kv_cache": strict_json.to_json(manifest.kv_cache),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


def open_bundle(
    path: str | Path,
    *,
    progress: bool = False,
    require_signature: str | Path | None = None,
    custom: Custom | None = DEFAULT_CUSTOM,
) -> Bundle:
    """Open a bundle, a folder or a packed file: read manifest.json, then check every file that it lists.

    Each file must lie inside the bundle and have the listed size and SHA-256. A file is hashed in full when it is first
    seen; the result is remembered by path, size, inode and modification time. `progress` shows a bar on standard error
    when hashing takes more than two seconds. `custom` says what of a user's own is to run; None leaves the
    bundle as it is, for who runs nothing.

    `require_signature` is the file of a public key: the bundle must be signed with its private key. All files are then
    hashed, also those seen before, and specialized graphs are not used, which a signature does not cover.

    Raises BundleError; warns with SatchelWarning where specialized graphs are there and do not fit this machine, are
    damaged, or are not covered, and where the plain graphs run for want of a library.
    """
    bundle, spans = _survey(Path(path), require_signature)
    folder, specialized = bundle.folder, bundle.manifest.specialized
    if bundle.packed is None:
        sweep(folder, SCRATCH_PREFIX)
    _check_hashes(folder, bundle.manifest.files, spans, progress, anew=require_signature is not None)
    if require_signature is None:
        usable = None if bundle.packed is not None else _usable(folder, specialized, progress)
        return _chosen(Bundle(folder, bundle.manifest, usable, bundle.digest, bundle.packed), custom)
    if specialized is not None:
        warnings.warn(
            f"{folder}: the portable graphs run, since the signature does not cover those made on a device",
            SatchelWarning,
            stacklevel=2,
        )
    return _chosen(bundle, custom)


def _chosen(bundle: Bundle, custom: Custom | None) -> Bundle:
    return bundle if custom is None else choose(bundle, custom)


def survey_bundle(path: str | Path) -> Bundle:
    """As `open_bundle`, without reading the files: they are where they should be and of their size, no more.

    For who wants to know what a bundle says of itself, and runs nothing. Raises BundleError.
    """
    return _survey(Path(path), None)[0]


def is_bundle(path: str | Path) -> bool:
    """Whether something that calls itself a bundle, or could be a packed one, is at `path`."""
    return (Path(path) / MANIFEST_NAME).is_file() or (Path(path).is_file() and Path(path).suffix == ".pyz")


def _survey(path: Path, key: str | Path | None) -> tuple[Bundle, dict[str, Span]]:
    packed = packed_files(path) if path.is_file() else None
    if packed is None:
        _check_folder(path)
        manifest_span = folder_span(path, MANIFEST_NAME)
    elif MANIFEST_NAME in packed:
        manifest_span = packed[MANIFEST_NAME]
    else:
        raise BundleError(f"{path}: no {MANIFEST_NAME} in it: give a file made by satchel pack")
    name = str(path / MANIFEST_NAME)
    document, digest = _read_manifest(manifest_span, name, anew=key is not None)
    if key is not None:
        from satchel.runtime.bundle.signature import check_signature

        check_signature(path, _signature(path, packed), digest, Path(key))
    manifest = Manifest.from_json(document, name)
    _check_names(name, manifest, packed)
    spans = dict(packed or {name: folder_span(path, name) for name in manifest.files})
    _check_sizes(path, manifest.files, spans)
    return Bundle(path, manifest, None, digest, packed), spans


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise BundleError(
            f"{folder}: no such folder: give a folder made by satchel export, or a file made by satchel pack"
        )
    if not os.path.lexists(folder / MANIFEST_NAME):
        raise BundleError(f"{folder}: no {MANIFEST_NAME} in it: give a folder made by satchel export")


def _read_manifest(span: Span, name: str, *, anew: bool) -> tuple[object, str | None]:
    """The parsed manifest, and its digest, which is right: computed here, unless it is remembered and not `anew`."""
    most = LIMITS["manifest.json bytes"].most
    if span.length > most:
        raise BundleError(f"{name}: more than the {most:,} bytes that a manifest may have: do not trust this bundle")
    try:
        seen = file_identity(span.path)
        content = span.read()
    except OSError as error:
        raise BundleError(f"{name}: cannot be read ({error.strerror}): give yourself the right to") from None
    document = parse_document(content, name)
    claimed = claimed_digest(document, Manifest.VERSION, name)
    if claimed is not None and isinstance(document, dict):
        memory, part = HashCache.load(), f"digest of {part_of(span)}"
        if anew or memory.recall(span.path, part) != claimed:
            if true_digest(document, name) != claimed:
                raise BundleError(f"{name}: damaged (its digest differs): copy the bundle again, or export it again")
            memory.remember(span.path, seen, claimed, part)
            memory.save()
    return document, claimed


def _signature(path: Path, packed: Mapping[str, Span] | None) -> Span | None:
    if packed is not None:
        return packed.get(SIGNATURE_NAME)
    return folder_span(path, SIGNATURE_NAME) if os.path.lexists(path / SIGNATURE_NAME) else None


def _usable(folder: Path, specialized: Specialized | None, progress: bool) -> Specialized | None:
    if specialized is None:
        return None
    reason = _misfit(specialized)
    if reason is None:
        try:
            spans = {name: folder_span(folder, name) for name in specialized.files}
            _check_sizes(folder, specialized.files, spans)
            _check_hashes(folder, specialized.files, spans, progress)
        except BundleError as error:
            reason = str(error).partition(": copy the bundle")[0]
    if reason is None:
        return specialized
    warnings.warn(
        f"{folder}: the portable graphs run, since {reason}: satchel specialize makes it ready for this machine",
        SatchelWarning,
        stacklevel=3,
    )
    return None


def _misfit(specialized: Specialized) -> str | None:
    """Why specialized graphs are not for this machine, or None."""
    import onnxruntime

    if specialized.onnxruntime != onnxruntime.__version__:
        return f"it was specialized for ONNX Runtime {specialized.onnxruntime} and this is {onnxruntime.__version__}"
    if specialized.features != processor_features():
        return f"it was specialized for another processor ({specialized.processor})"
    if not specialized.native:
        return None
    reason = library.reason()
    if reason is not None:
        return f"satchel's own kernels, for which it was specialized, {reason}"
    if specialized.kernels != library.VERSION:
        return (
            f"it was specialized for version {specialized.kernels} of satchel's kernels and this is {library.VERSION}"
        )
    return None


def _check_names(name: str, manifest: Manifest, packed: Mapping[str, Span] | None) -> None:
    listed = [*manifest.files, *(manifest.specialized.files if manifest.specialized else ()), *BESIDE]
    twins = equal_names(listed)
    if twins is not None:
        raise BundleError(
            f"{name}: {twins[0]!r} and {twins[1]!r} are the same file on some systems, which is not allowed: "
            "do not trust this bundle"
        )
    if packed is not None:
        odd = sorted(set(packed) - set(BESIDE) ^ set(manifest.files))
        if odd:
            raise BundleError(f"{name}: {odd[0]!r} is listed and not there, or there and not listed: pack it again")


def _check_sizes(folder: Path, files: Mapping[str, FileRecord], spans: Mapping[str, Span]) -> None:
    for name, record in files.items():
        found = spans[name].length
        if found != record.bytes:
            raise BundleError(
                f"{folder / name}: {found} bytes where the manifest says {record.bytes}: "
                "copy the bundle again, or export it again"
            )


def _check_hashes(
    folder: Path, files: Mapping[str, FileRecord], spans: Mapping[str, Span], progress: bool, anew: bool = False
) -> None:
    """Compare the hash of each file; `anew` trusts no memory of earlier ones."""
    memory = HashCache.load()
    unseen = [
        name
        for name, record in files.items()
        if anew or memory.recall(spans[name].path, part_of(spans[name])) != record.sha256
    ]
    if not unseen:
        return
    with progress_bar(sum(files[name].bytes for name in unseen), "checking", "B", shown=progress) as bar:
        for name in unseen:
            span = spans[name]
            seen = file_identity(span.path)
            try:
                digest = sha256_of(span.path, bar.update, span.offset, span.length)
            except OSError as error:
                raise BundleError(
                    f"{folder / name}: cannot be read ({error.strerror}): give yourself the right to"
                ) from None
            if digest != files[name].sha256:
                raise BundleError(
                    f"{folder / name}: damaged (its SHA-256 differs): copy the bundle again, or export it again"
                )
            memory.remember(span.path, seen, digest, part_of(span))
    memory.save()
