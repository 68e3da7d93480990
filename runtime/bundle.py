"""A bundle on disk: its folder, its manifest, and files that are all there, inside the folder and undamaged."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from satchel.runtime import strict_json
from satchel.runtime.custom import Custom, choose
from satchel.runtime.errors import BundleError, SatchelWarning
from satchel.runtime.hash_memory import HashMemory, file_identity, sha256_of
from satchel.runtime.manifest import MANIFEST_NAME, FileRecord, Manifest, Specialized
from satchel.runtime.processor import processor_features
from satchel.runtime.progress import progress_bar

DEFAULT_CUSTOM = Custom()


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. Make one with `open_bundle`, which checks what is on disk first.

    `specialized` is what the manifest has for this very machine; None where the portable graphs are to run.
    `custom_ops` are the libraries that its graphs need. `whole` is False where `manifest` is that of the plain graphs.
    """

    folder: Path
    manifest: Manifest
    specialized: Specialized | None = None
    custom_ops: tuple[Path, ...] = ()
    whole: bool = True

    def path(self, name: str) -> Path:
        """The path of a file that the manifest lists. Raises BundleError for any other name."""
        if name not in self.manifest.files and not (self.specialized and name in self.specialized.files):
            raise BundleError(
                f"{self.folder / MANIFEST_NAME}: '{name}' is not listed in 'files': export the bundle again"
            )
        return self.folder / name

    def graph_path(self, phase: str) -> Path:
        """The portable graph file of "prefill", "decode" or "score"."""
        return self.path(self.manifest.graph(phase).file)

    @property
    def fingerprint(self) -> str:
        """SHA-256, as 64 hex digits, of what decides the numbers that the graphs compute and how a cache holds them.

        That is the names and hashes of the manifest's files, the target, the precision and the cache's description.
        Specialised graphs and a certificate leave it as it is.
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


def open_bundle(path: str | Path, *, progress: bool = False, custom: Custom = DEFAULT_CUSTOM) -> Bundle:
    """Open a bundle folder: read manifest.json, then check every file that it lists.

    Each file must lie inside the folder and have the listed size and SHA-256. A file is hashed in full when it is first
    seen; the result is remembered by path, size, inode and modification time. `progress` shows a bar on standard error
    when hashing takes more than two seconds. `custom` says what of a user's own is to run. Raises BundleError; warns
    with SatchelWarning where specialised graphs are there and do not fit this machine, or are damaged, and where the
    plain graphs run for want of a library.
    """
    bundle = survey_bundle(path)
    folder, manifest = bundle.folder, bundle.manifest
    _check_hashes(folder, manifest.files, progress)
    return choose(Bundle(folder, manifest, _usable(folder, manifest.specialized, progress)), custom)


def survey_bundle(path: str | Path) -> Bundle:
    """As `open_bundle`, without reading the files: they are where they should be and of their size, no more.

    For who wants to know what a bundle says of itself, and runs nothing. Raises BundleError.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise BundleError(f"{folder}: no such folder: give a folder made by satchel export")
    if not (folder / MANIFEST_NAME).is_file():
        raise BundleError(f"{folder}: no {MANIFEST_NAME} in it: give a folder made by satchel export")
    manifest = Manifest.read(folder / MANIFEST_NAME)
    for name, record in manifest.files.items():
        _check_place(folder, name)
        _check_size(folder / name, record)
    return Bundle(folder, manifest)


def _usable(folder: Path, specialized: Specialized | None, progress: bool) -> Specialized | None:
    if specialized is None:
        return None
    reason = _misfit(specialized)
    if reason is None:
        try:
            for name, record in specialized.files.items():
                _check_place(folder, name)
                _check_size(folder / name, record)
            _check_hashes(folder, specialized.files, progress)
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
    """Why specialised graphs are not for this machine, or None."""
    import onnxruntime

    if specialized.onnxruntime != onnxruntime.__version__:
        return f"it was specialised for ONNX Runtime {specialized.onnxruntime} and this is {onnxruntime.__version__}"
    if specialized.features != processor_features():
        return f"it was specialised for another processor ({specialized.processor})"
    return None


def _check_place(folder: Path, name: str) -> None:
    pure = PurePosixPath(name)
    inside = not pure.is_absolute() and ".." not in pure.parts and str(pure) == name and "\\" not in name
    if not inside or not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise BundleError(
            f"{folder / MANIFEST_NAME}: '{name}' leads outside the bundle, which is not allowed: "
            "put the file itself into the folder, or do not trust this bundle"
        )


def _check_size(path: Path, record: FileRecord) -> None:
    if not path.is_file():
        raise BundleError(f"{path}: missing: copy the bundle again, or export it again")
    size = path.stat().st_size
    if size != record.bytes:
        raise BundleError(
            f"{path}: {size} bytes where the manifest says {record.bytes}: copy the bundle again, or export it again"
        )


def _check_hashes(folder: Path, files: dict[str, FileRecord], progress: bool) -> None:
    memory = HashMemory.load()
    unseen = [name for name, record in files.items() if memory.recall(folder / name) != record.sha256]
    if not unseen:
        return
    with progress_bar(sum(files[name].bytes for name in unseen), "checking", "B", shown=progress) as bar:
        for name in unseen:
            path = folder / name
            seen = file_identity(path)
            try:
                digest = sha256_of(path, bar.update)
            except OSError as error:
                raise BundleError(f"{path}: cannot be read ({error.strerror}): give yourself the right to") from None
            if digest != files[name].sha256:
                raise BundleError(f"{path}: damaged (its SHA-256 differs): copy the bundle again, or export it again")
            memory.remember(path, seen, digest)
    memory.save()
