"""Opens a bundle to run it: checks its files, and chooses the graphs for this machine."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from satchel.runtime.bundle import user_cache
from satchel.runtime.bundle.graph_specs import Variant
from satchel.runtime.bundle.manifest import Manifest, Specialized
from satchel.runtime.bundle.reader import SCRATCH_PREFIX, Bundle, Meter, check_files, read_bundle, with_specialized
from satchel.runtime.bundle.scratch import sweep
from satchel.runtime.errors import BundleError, SatchelWarning
from satchel.runtime.kernels import library
from satchel.runtime.ort import machine
from satchel.runtime.ort.custom_ops import DEFAULT_CUSTOM, Custom, choose
from satchel.runtime.util.cpu import processor_features
from satchel.runtime.util.progress import progress_bar


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
    when hashing takes more than two seconds. `custom` says which custom passes and operators run; None leaves the
    bundle as it is, for callers that run nothing.

    `require_signature` is the file of a public key: the bundle must be signed with its private key. All files are then
    hashed, also those seen before, and specialized graphs are not used, which a signature does not cover.

    Where the bundle itself has no specialized graphs for this machine and the user's cache has a copy with them, that
    copy is returned, and its `folder` is in the cache; not for `require_signature`, nor for `custom` None.

    Raises BundleError. Warns with SatchelWarning where specialized graphs do not fit this machine, are damaged or not
    covered by the signature, and where the plain graphs run because a library is missing.
    """
    bundle, meter = read_bundle(path, require_signature=require_signature), _meter(shown=progress)
    if bundle.packed is None:
        sweep(bundle.folder, SCRATCH_PREFIX)
    check_files(bundle, meter, anew=require_signature is not None)
    specialized = bundle.manifest.specialized
    reason = None
    if specialized is not None and require_signature is not None:
        reason = "the signature does not cover the specialized ones"
    elif specialized is not None and bundle.packed is None:
        reason = misfit(bundle.manifest, specialized)
        if reason is None:
            try:
                bundle = with_specialized(bundle, specialized, meter)
            except BundleError as error:
                reason = str(error).partition(": copy the bundle")[0]
        if reason is not None:
            reason += f": {_remedy(bundle.manifest, specialized)}"
    if custom is not None and require_signature is None and bundle.specialized is None:
        cached = _cached(bundle, meter)
        bundle, reason = (bundle, reason) if cached is None else (cached, None)
    if reason is not None:
        warnings.warn(f"{bundle.folder}: the portable graphs run, since {reason}", SatchelWarning, stacklevel=2)
    return bundle if custom is None else choose(bundle, custom)


def misfit(manifest: Manifest, specialized: Specialized) -> str | None:
    """Why the specialized graphs of a bundle are not for this machine, as a clause, or None where they are."""
    import onnxruntime

    if specialized.onnxruntime != onnxruntime.__version__:
        return f"it was specialized for ONNX Runtime {specialized.onnxruntime} and this is {onnxruntime.__version__}"
    if specialized.features != processor_features():
        return f"it was specialized for another processor ({specialized.processor})"
    reasons = (unusable(manifest.variant(name)) for name in specialized.variants)
    return next((f"it was specialized for {reason}" for reason in reasons if reason is not None), None)


def _remedy(manifest: Manifest, specialized: Specialized) -> str:
    if any(is_outdated(manifest.variant(name)) for name in specialized.variants):
        return "export it again"
    return "satchel specialize optimizes it for this machine"


def is_outdated(variant: Variant) -> bool:
    """Whether a variant is for another version of satchel's own kernels, which run here: only a new export helps."""
    version = variant.kernel_abi
    return library.reason() is None and version is not None and not library.runs(version)


def unusable(variant: Variant) -> str | None:
    """Why this machine cannot run a variant of a graph, as a phrase, or None where it can."""
    if variant.kernel_abi is not None:
        reason = library.reason()
        if reason is not None:
            return f"satchel's own kernels, which {reason}"
        if not library.runs(variant.kernel_abi):
            return f"version {variant.kernel_abi} of satchel's own kernels, and this is version {library.VERSION}"
        return None  # they are compiled for any processor, whatever `requires` said when they were not
    lacking = [feature for feature in variant.requires if feature not in processor_features()]
    return f"a processor with {', '.join(lacking)}" if lacking else None


def _cached(bundle: Bundle, meter: Meter) -> Bundle | None:
    """The bundle's specialized copy in the user's cache, or None. One that is damaged is removed."""
    folder = user_cache.find(machine.cache_name(bundle)) if bundle.digest else None
    if folder is None:
        return None
    try:
        copy = read_bundle(folder)
        check_files(copy, meter)
        specialized = copy.manifest.specialized
        if copy.digest == bundle.digest and specialized is not None and misfit(copy.manifest, specialized) is None:
            return with_specialized(copy, specialized, meter)
    except BundleError:
        pass
    user_cache.remove(folder)
    return None


def _meter(*, shown: bool) -> Meter:
    @contextlib.contextmanager
    def meter(total: int) -> Iterator[Callable[[int], object]]:
        with progress_bar(total, "checking", "B", shown=shown) as bar:
            yield bar.update

    return meter
