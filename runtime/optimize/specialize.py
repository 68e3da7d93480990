"""Makes a bundle's graphs ready for this machine: optimized, with weights as its kernels want them, mapped at load.

ONNX Runtime optimizes each graph and saves it with the weights that its kernels have packed. What the two phases have
in common, and what `weights.bin` holds already, is stored once. The portable graphs stay as they are.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from satchel.runtime.bundle import onnx_wire
from satchel.runtime.bundle.contract import Layout
from satchel.runtime.bundle.external_data import check_external_data
from satchel.runtime.bundle.manifest import MANIFEST_NAME, Manifest, Variant
from satchel.runtime.bundle.reader import SCRATCH_PREFIX, Bundle, read_bundle
from satchel.runtime.bundle.scratch import scratch_folder
from satchel.runtime.errors import BundleError, SatchelError, SatchelWarning
from satchel.runtime.optimize.derived import make_weights
from satchel.runtime.optimize.forms import PREFIX, STORED, Form, Made, described, form_of, portable_form, token_of
from satchel.runtime.optimize.packing import Places, Store, relocate, stored_places
from satchel.runtime.optimize.trials import ENOUGH_FASTER, check, fastest, step_seconds
from satchel.runtime.ort.open_bundle import unusable
from satchel.runtime.ort.session import SessionSettings, save_optimized

INLINE_BYTES = 1024
"""Constants smaller than this stay in the graph."""

DISK_FACTOR, LAYOUT_FACTORS = 4, {Layout.INT8.value: 4, Layout.GROUPS.value: 2}
"""The disk space that the work takes at most, in sizes of the weight file: for each form, and for the layouts of its
variants. It is for what a graph was optimized from and to, and the files being made.
"""

EXACT = frozenset({Layout.GROUPS.value})
"""Layouts of the very numbers that the bundle stores: a variant over one may be chosen for its speed alone."""


def silent(_: str) -> None:
    """Take a message and print nothing."""


def specialize(
    bundle: Bundle,
    *,
    layout: str = "auto",
    kernels: str = "auto",
    threads: int | None = None,
    progress: Callable[[str], Any] = silent,
    say: Callable[[str], Any] = silent,
) -> Manifest:
    """Write graphs and packed weights for this machine into a bundle's folder, and name them in its manifest.

    What an earlier call left is replaced. The files are checked against the portable graphs before the manifest, which
    is written last, names them; until then, and after any failure, the bundle is what it was.

    Args:
        layout: How ONNX Runtime's kernels get the weights. "stored": as the bundle has them; or a layout of its
            variants, such as "groups" for decode or "int8" for prefill. "auto": as stored, or a layout of the same
            numbers where a step of decode is faster with it by a margin, unless both phases share a session.
        kernels: "satchel": satchel's own. "onnxruntime". "auto": satchel's own where a variant for them runs here and
            is faster than ONNX Runtime's, unless `layout` asks for one of those.
        threads: CPU threads for the work; None for one per physical core.
        progress: Hears the name of each stage as it begins.
        say: Hears what was found out.

    Returns:
        The bundle's manifest as it is now.

    Raises:
        SatchelError: The folder cannot be written, the disk has no room, or the results differ; or the bundle has no
            variant that was asked for, or it loses more than the certificate allows. With "auto", variants that differ
            or lose too much are left out, with a SatchelWarning.
        BundleError: A graph does not load.
    """
    folder, settings = bundle.folder, SessionSettings(threads=threads)
    if not bundle.whole:
        raise BundleError(f"{folder}: only its graphs with a user's own operators are specialized: give --custom-ops")
    portable = replace(bundle, specialized=None)
    if portable.manifest.graphs is None:
        raise BundleError(f"{folder}: its graphs are static, for {portable.manifest.target}: nothing to specialize")
    own = _own_variant(portable, kernels, layout)
    forms = _forms(portable, layout)
    old = set() if bundle.manifest.specialized is None else set(bundle.manifest.specialized.files)
    with _scratch(folder) as scratch, contextlib.ExitStack() as placed:
        progress("reading the weights")
        known: Places = {}
        for name in _weight_files(portable):
            known |= stored_places(portable, name)
        written: set[str] = set()

        def make(wanted: list[Form]) -> list[Bundle]:
            _check_room(portable, scratch, _disk_factor(portable, wanted))
            made = _make(portable, wanted, known, settings, scratch, progress)
            files = {name: path for _, paths in made for name, path in paths.items()}
            written.update(files)
            placed.enter_context(_placed(folder, files, keep=old))
            progress("checking")
            return [replace(bundle, specialized=specialized) for specialized, _ in made]

        native = None
        if own is not None:
            [native] = make([form_of(own)])
            if not _is_right(portable, native, settings, needed=kernels == "satchel"):
                native = None
        if native is not None and kernels == "satchel":
            chosen = native.specialized
        else:
            found = make(forms if native is None else forms[:1])
            kept = _choose(portable, found, settings, progress, say)
            progress("timing attention")
            chosen = fastest(kept, native, settings, say)
        manifest = replace(bundle.manifest, specialized=chosen)
        _write_manifest(folder, manifest, scratch)
    for name in (old | written) - set(manifest.specialized.files if manifest.specialized else ()):
        (folder / name).unlink(missing_ok=True)
    return manifest


def _is_right(portable: Bundle, native: Bundle, settings: SessionSettings, *, needed: bool) -> bool:
    """Whether satchel's own kernels give the right logits. Where not, a SatchelWarning, or SatchelError if `needed`."""
    try:
        check(portable, native, settings)
    except SatchelError as error:
        if needed:
            raise
        warnings.warn(f"satchel's own kernels are left out: {error}", SatchelWarning, stacklevel=3)
        return False
    return True


def _own_variant(portable: Bundle, kernels: str, layout: str) -> Variant | None:
    """The variant for satchel's own kernels that is to be made: the first that this machine runs.

    Raises SatchelError where one is asked for and there is none.
    """
    asked = kernels == "satchel"
    if asked and layout != "auto":
        raise SatchelError(
            "--kernels satchel with --layout: the layouts are for ONNX Runtime's kernels: leave one of them out"
        )
    own = [variant for variant in portable.manifest.variants if variant.kernel_abi is not None]
    if not asked and (kernels != "auto" or layout != "auto"):
        return None
    usable = next((variant for variant in own if unusable(variant) is None), None)
    if asked and usable is None:
        reason = f"it needs {unusable(own[0])}" if own else f"{portable.folder} has no variant for them"
        raise SatchelError(f"--kernels satchel: {reason}: leave it out")
    return usable


def _forms(portable: Bundle, layout: str) -> list[Form]:
    """The forms to make, the one to keep unless another is faster first. Raises BundleError for an unknown layout."""
    manifest = portable.manifest
    variants = [variant for variant in manifest.variants if variant.kernel_abi is None]
    if layout not in ("auto", STORED):
        found = [form_of(variant) for variant in variants if variant.weights.layout == layout]
        if not found:
            others = ", ".join(sorted({variant.weights.layout for variant in variants})) or "none"
            raise BundleError(f"{portable.folder}: no variant has weights in {layout}; layouts that it has: {others}")
        return found[:1]
    stored = portable_form(manifest)
    # Where both phases share a session, the bundle was made to take little memory.
    if layout == STORED or set(stored.sources) == {"prefill"}:
        return [stored]
    return [stored, *(form_of(variant) for variant in variants if variant.weights.layout in EXACT)]


def _names(made: Bundle) -> str:
    """The variants of specialized graphs, for messages."""
    return " and ".join(made.specialized.variants if made.specialized else ()) or "the portable graphs"


def _make(
    portable: Bundle,
    forms: list[Form],
    known: Places,
    settings: SessionSettings,
    scratch: Path,
    progress: Callable[[str], Any],
) -> list[Made]:
    """Make the files of each form in the scratch folder: its manifest entry, and where they lie by their names.

    `known` is where the bundle has what need not be written again.
    """
    saved: dict[str, Path] = {}
    made = []
    for number, form in enumerate(forms):
        token = token_of(portable, form)
        place = scratch / token
        place.mkdir()
        files = {f"{PREFIX}{token}.bin": place / "data"}
        graphs = {phase: f"{PREFIX}{token}-{phase}.onnx" for phase in form.sources}
        later = {source for other in forms[number + 1 :] for source in other.sources.values()}
        with (place / "data").open("wb") as file:
            store = Store(file, f"{PREFIX}{token}.bin", dict(known))
            for phase, source in form.sources.items():
                if source not in saved:
                    progress(f"optimizing {source}")
                    saved[source] = scratch / f"{source}.onnx"
                    with _complete(portable, source, scratch) as graph:
                        save_optimized(portable, source, graph, settings, saved[source], INLINE_BYTES)
                files[graphs[phase]] = place / f"{phase}.onnx"
                relocate(saved[source], files[graphs[phase]], store)
                if source not in later:
                    saved[source].with_suffix(".data").unlink(missing_ok=True)
        made.append((described(portable, form, graphs, files), files))
    return made


def _choose(
    portable: Bundle,
    found: list[Bundle],
    settings: SessionSettings,
    progress: Callable[[str], Any],
    say: Callable[[str], Any],
) -> Bundle:
    """Check the forms, time decode where there are several, and return the one to keep.

    Raises SatchelError where the first is not right; others that are not are left out.
    """
    first, *others = found
    check(portable, first, settings)
    kept = first
    for other in others:
        try:
            check(portable, other, settings)
        except SatchelError as error:
            warnings.warn(f"{_names(other)} is left out: {error}", SatchelWarning, stacklevel=3)
            continue
        progress("timing decode")
        before, after = step_seconds([kept, other], settings)
        names = _names(kept), _names(other)
        if after < before * ENOUGH_FASTER:
            kept = other
        say(
            f"a step of decode takes {1e3 * before:.1f} ms with {names[0]} and {1e3 * after:.1f} ms with {names[1]}: "
            f"{_names(kept)} is kept"
        )
    return kept


def remove(bundle: Bundle) -> Manifest:
    """Take what `specialize` added out of a bundle again. Returns the manifest. Raises SatchelError."""
    bundle = bundle if bundle.whole else read_bundle(bundle.folder)  # whose manifest is the one to be written
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
    path = bundle.graph_path(source)
    model, sizes = path.read_bytes(), {file: record.bytes for file, record in bundle.manifest.files.items()}
    variant = next((variant for variant in bundle.manifest.variants if variant.name == source), None)
    if variant is None:
        check_external_data(model, sizes, str(path))
        yield path
        return
    name = variant.weights.file
    weights, graph = scratch / name, scratch.with_suffix(".onnx")
    make_weights(bundle, variant, weights)
    check_external_data(model, {**sizes, name: weights.stat().st_size}, str(path))

    def moved(entries: onnx_wire.External) -> onnx_wire.External:
        return {**entries, "location": f"{scratch.name}/{name}"} if entries["location"] == name else entries

    try:
        graph.write_bytes(onnx_wire.map_external_data(model, moved))
        yield graph
    finally:
        graph.unlink(missing_ok=True)
        weights.unlink(missing_ok=True)


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A scratch folder in the bundle. Raises SatchelError where it, or anything in the block, cannot be written."""
    path = None
    try:
        with scratch_folder(folder, SCRATCH_PREFIX) as path:
            yield path
    except OSError as error:
        advice = (
            "the portable graphs run as they are; copy the bundle to a folder of yours to specialize it"
            if path is None
            else "nothing was changed; free space and try again"
        )
        raise SatchelError(f"{folder}: cannot be written ({error.strerror}): {advice}") from None


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


def _disk_factor(bundle: Bundle, forms: list[Form]) -> int:
    layouts = {variant.name: variant.weights.layout for variant in bundle.manifest.variants}
    used = [layouts.get(source) for form in forms for source in form.sources.values()]
    return 1 + DISK_FACTOR * len(forms) + sum(LAYOUT_FACTORS.get(layout or "", 0) for layout in used)


def _check_room(bundle: Bundle, scratch: Path, factor: int) -> None:
    needed = factor * sum(bundle.manifest.files[name].bytes for name in _weight_files(bundle))
    free = shutil.disk_usage(scratch).free
    if free < needed:
        raise SatchelError(
            f"{bundle.folder}: specializing takes up to {needed >> 20:,} MiB while it works and {free >> 20:,} MiB are "
            "free: free some space"
        )


def _weight_files(bundle: Bundle) -> list[str]:
    """The files in which the portable graphs keep their data."""
    names = {
        entries.get("location", "")
        for phase in ("prefill", "decode")  # no other graph has others
        for entries in onnx_wire.external_data(bundle.graph_path(phase).read_bytes())
    }
    return sorted(name for name in names if name in bundle.manifest.files)
