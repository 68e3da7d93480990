"""Optimizes a bundle's graphs for this machine, with weights in the layout of its kernels, memory-mapped at load.

ONNX Runtime optimizes each graph and saves it with the weights that its kernels have packed. Data that both phases
share, or that `weights.bin` has already, is stored once. The portable graphs are not changed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from satchel.runtime.bundle import onnx_wire
from satchel.runtime.bundle.contract import Layout
from satchel.runtime.bundle.external_data import check_external_data
from satchel.runtime.bundle.graph_specs import Variant
from satchel.runtime.bundle.manifest import MANIFEST_NAME, Manifest, Specialized
from satchel.runtime.bundle.reader import SCRATCH_PREFIX, Bundle, read_bundle
from satchel.runtime.bundle.scratch import scratch_folder
from satchel.runtime.errors import BundleError, SatchelError, SatchelWarning
from satchel.runtime.optimize.derived import make_weights
from satchel.runtime.optimize.forms import PREFIX, STORED, Form, Made, described, form_of, portable_form, token_of
from satchel.runtime.optimize.packing import Places, Store, relocate, stored_places
from satchel.runtime.optimize.trials import (
    ENOUGH_FASTER,
    ROUNDED_TOLERANCE,
    check,
    compare,
    fastest,
    runs_ahead,
    step_seconds,
)
from satchel.runtime.ort.open_bundle import is_outdated, unusable
from satchel.runtime.ort.session import SessionSettings, save_optimized

INLINE_BYTES = 1024
"""Smaller constants stay in the graph."""

DISK_FACTOR, LAYOUT_FACTORS = 4, {Layout.INT8.value: 4, Layout.GROUPS.value: 2}
"""Max temporary disk space in sizes of the weight file, for each form and for the layouts of its variants. It covers a
graph before and after optimization, and the new files.
"""

EXACT = frozenset({Layout.GROUPS.value})
"""Layouts with exactly the stored numbers: a variant with one of them may be chosen for its speed alone."""


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
    """Write graphs and packed weights for this machine into a bundle's folder, and list them in its manifest.

    The files replace those of an earlier call. They are checked against the portable graphs before the manifest lists
    them, which is written last; until then, and after any failure, the bundle is unchanged.

    Args:
        layout: The layout of weights for ONNX Runtime's kernels: "stored", as in the bundle, or a layout of one of its
            variants, such as "groups" for decode or "int8" for prefill. "auto": as stored, or a layout of the same
            numbers if decode steps are faster with it by a margin, unless both phases share a session.
        kernels: "satchel" for satchel's own, "onnxruntime", or "auto": satchel's own if a variant for them runs here
            and is faster than ONNX Runtime's, unless `layout` names a layout.
        threads: CPU threads for the work; None for one per physical core.
        progress: Called with the name of each stage as it begins.
        say: Called with each result.

    Returns:
        The bundle's new manifest.

    Raises:
        SatchelError: The folder cannot be written, the disk is full, the logits differ, the bundle lacks the requested
            variant, or the accuracy is below what the certificate allows. With "auto", variants that differ or are
            not accurate enough are left out with a SatchelWarning.
        BundleError: A graph cannot be loaded, or the bundle cannot be specialized.
    """
    portable = _portable(bundle)
    own, forms = _own_variant(portable, kernels, layout), _forms(portable, layout)
    old = set() if bundle.manifest.specialized is None else set(bundle.manifest.specialized.files)
    with _scratch(bundle.folder) as scratch, contextlib.ExitStack() as placed:
        maker = _Maker(portable, SessionSettings(threads=threads, alone=True), scratch, placed, old, progress)
        chosen = _chosen(maker, own, forms, say, own_only=kernels == "satchel")
        progress("timing runs of several tokens")
        chosen = replace(chosen, runs_ahead=runs_ahead(replace(portable, specialized=chosen), maker.settings))
        manifest = replace(bundle.manifest, specialized=chosen)
        _write_manifest(bundle.folder, manifest, scratch)
    for name in (old | maker.written) - set(chosen.files):
        (bundle.folder / name).unlink(missing_ok=True)
    return manifest


def _portable(bundle: Bundle) -> Bundle:
    """The bundle with its portable graphs. Raises BundleError for one that cannot be specialized."""
    if not bundle.whole:
        raise BundleError(f"{bundle.folder}: can only be specialized with its custom operators: give --custom-ops")
    if bundle.manifest.graphs is None:
        raise BundleError(
            f"{bundle.folder}: has static graphs for {bundle.manifest.target}, which cannot be specialized"
        )
    return replace(bundle, specialized=None)


@dataclass
class _Maker:
    """Makes forms of a bundle in a scratch folder and moves them to the bundle's folder; `placed` undoes the moves.

    `old` are the files of an earlier call, which are never removed on failure; `written` are all new files.
    """

    portable: Bundle
    settings: SessionSettings
    scratch: Path
    placed: contextlib.ExitStack
    old: set[str]
    progress: Callable[[str], Any]
    written: set[str] = field(default_factory=set)

    def make(self, forms: list[Form]) -> list[Bundle]:
        """The bundle with the specialized graphs of each form, which are not checked yet."""
        _check_space(self.portable, self.scratch, _disk_factor(self.portable, forms))
        return self.make_now(forms)

    def make_now(self, forms: list[Form]) -> list[Bundle]:
        """`make` without a look at the space on the disk."""
        made = self._files(forms)
        files = {name: path for _, paths in made for name, path in paths.items()}
        self.written.update(files)
        self.placed.enter_context(_placed(self.portable.folder, files, keep=self.old))
        self.progress("checking")
        return [replace(self.portable, specialized=specialized) for specialized, _ in made]

    @functools.cached_property
    def _known(self) -> Places:
        """Data that the bundle's weight files have already."""
        self.progress("reading the weights")
        known: Places = {}
        for name in _weight_files(self.portable):
            known |= stored_places(self.portable, name)
        return known

    def _files(self, forms: list[Form]) -> list[Made]:
        """Make the files of each form in the scratch folder: its manifest entry, and the path of each file by name."""
        saved: dict[str, Path] = {}
        made = []
        for number, form in enumerate(forms):
            token = token_of(self.portable, form)
            place = self.scratch / token
            place.mkdir()
            files = {f"{PREFIX}{token}.bin": place / "data"}
            graphs = {phase: f"{PREFIX}{token}-{phase}.onnx" for phase in form.sources}
            later = {source for other in forms[number + 1 :] for source in other.sources.values()}
            with (place / "data").open("wb") as file:
                store = Store(file, f"{PREFIX}{token}.bin", dict(self._known))
                for phase, source in form.sources.items():
                    if source not in saved:
                        saved[source] = self._optimized(source)
                    files[graphs[phase]] = place / f"{phase}.onnx"
                    relocate(saved[source], files[graphs[phase]], store)
                    if source not in later:
                        saved[source].with_suffix(".data").unlink(missing_ok=True)
            made.append((described(self.portable, form, graphs, files), files))
        return made

    def _optimized(self, source: str) -> Path:
        """The graph of a phase or variant as ONNX Runtime saves it after optimization."""
        self.progress(f"optimizing {source}")
        path = self.scratch / f"{source}.onnx"
        with _complete(self.portable, source, self.scratch) as graph:
            save_optimized(self.portable, source, graph, self.settings, path, INLINE_BYTES)
        return path


def _chosen(
    maker: _Maker, own: Variant | None, forms: list[Form], say: Callable[[str], Any], *, own_only: bool
) -> Specialized:
    """The fastest of what gives the right logits: satchel's own kernels by the variant `own`, or ONNX Runtime's.

    `own_only` takes satchel's own without timing them; the logits must then be right.
    """
    portable, settings = maker.portable, maker.settings
    native = None
    if own is not None:
        [made] = maker.make([form_of(own)])
        native = made if _is_right(portable, made, settings, needed=own_only) else None
    if own_only and native is not None and native.specialized is not None:
        return native.specialized
    kept = _choose(maker, maker.make(forms if native is None else forms[:1]), say)
    maker.progress("timing attention")
    return fastest(kept, native, settings, say)


def _is_right(portable: Bundle, native: Bundle, settings: SessionSettings, *, needed: bool) -> bool:
    """Whether satchel's own kernels give the right logits. If not, warns with SatchelWarning; raises it if `needed`."""
    try:
        check(portable, native, settings)
    except SatchelError as error:
        if needed:
            raise
        warnings.warn(f"satchel's own kernels are left out: {error}", SatchelWarning, stacklevel=4)
        return False
    return True


def _own_variant(portable: Bundle, kernels: str, layout: str) -> Variant | None:
    """The variant for satchel's own kernels to make: the first that this machine can run.

    Raises SatchelError if it was asked for by `kernels` and there is none.
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
        remedy = "export the bundle again, or leave the flag out" if own and is_outdated(own[0]) else "leave it out"
        raise SatchelError(f"--kernels satchel: {reason}: {remedy}")
    return usable


def _forms(portable: Bundle, layout: str) -> list[Form]:
    """The forms to make; the first is kept unless another is faster. Raises BundleError for an unknown layout."""
    manifest = portable.manifest
    variants = [variant for variant in manifest.variants if variant.kernel_abi is None]
    if layout not in ("auto", STORED):
        found = [form_of(variant) for variant in variants if variant.weights.layout == layout]
        if not found:
            others = ", ".join([STORED, *sorted({variant.weights.layout for variant in variants})])
            raise BundleError(
                f"{portable.folder}: no variant has weights in the layout {layout}: choose one of: {others}"
            )
        return found[:1]
    stored = portable_form(manifest)
    # A bundle whose phases share a session was exported for low memory use.
    if layout == STORED or set(stored.sources) == {"prefill"}:
        return [stored]
    return [stored, *(form_of(variant) for variant in variants if variant.weights.layout in EXACT)]


def _names(made: Bundle) -> str:
    """The variants of specialized graphs, for messages."""
    return " and ".join(made.specialized.variants if made.specialized else ()) or "the portable graphs"


def _choose(maker: _Maker, found: list[Bundle], say: Callable[[str], Any]) -> Bundle:
    """Check the forms, time decode if there are several, and return the one to keep.

    Raises SatchelError if the first form gives wrong logits; other wrong forms are left out with a SatchelWarning.
    """
    first, *others = found
    check(maker.portable, first, maker.settings)
    kept = first
    for other in others:
        try:
            check(maker.portable, other, maker.settings)
        except SatchelError as error:
            warnings.warn(f"{_names(other)} is left out: {error}", SatchelWarning, stacklevel=4)
            continue
        maker.progress("timing decode")
        before, after = step_seconds([kept, other], maker.settings)
        names = _names(kept), _names(other)
        if after < before * ENOUGH_FASTER:
            kept = other
        say(
            f"a decode step takes {1e3 * before:.1f} ms with {names[0]} and {1e3 * after:.1f} ms with {names[1]}: "
            f"keeping {_names(kept)}"
        )
    return kept


@contextlib.contextmanager
def on_own_kernels(bundle: Bundle, settings: SessionSettings) -> Iterator[Bundle | None]:
    """While it is entered, the bundle on satchel's own kernels; None where it has no variant for them that runs here.

    Its files are in the bundle's folder for that time, and its manifest does not list them. The logits of a few tokens
    are compared with those of the portable graphs.

    Args:
        bundle: A bundle that is a folder.
        settings: Those for the comparison.

    Raises:
        SatchelError: The logits differ, or the folder cannot be written.
        BundleError: A graph cannot be loaded.
    """
    specializable = bundle.whole and bundle.manifest.graphs is not None
    own = _own_variant(bundle, "auto", "auto") if specializable else None
    if own is None:
        yield None
        return
    portable = _portable(bundle)
    with _scratch(bundle.folder) as scratch, contextlib.ExitStack() as placed:
        maker = _Maker(portable, settings, scratch, placed, set(), silent)
        [made] = maker.make_now([form_of(own)])
        try:
            compare(portable, made, settings, (ROUNDED_TOLERANCE, ROUNDED_TOLERANCE), lean=True)
            yield made
        finally:
            for name in maker.written:
                (bundle.folder / name).unlink(missing_ok=True)


def remove(bundle: Bundle) -> Manifest:
    """Remove what `specialize` added to a bundle. Returns the new manifest. Raises SatchelError."""
    bundle = bundle if bundle.whole else read_bundle(bundle.folder)  # its whole manifest is written
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
    """The graph file of `source` with all of its weights. ONNX Runtime reads no file outside the graph's folder."""
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
    """A scratch folder in the bundle. Raises SatchelError if it, or anything in the block, cannot be written."""
    path = None
    try:
        with scratch_folder(folder, SCRATCH_PREFIX) as path:
            yield path
    except OSError as error:
        advice = (
            "the portable graphs still run; copy the bundle to a folder of yours to specialize it"
            if path is None
            else "nothing was changed; free space and try again"
        )
        raise SatchelError(f"{folder}: cannot be written ({error.strerror}): {advice}") from None


@contextlib.contextmanager
def _placed(folder: Path, made: dict[str, Path], keep: set[str]) -> Iterator[None]:
    """Move files to their names in the folder; they are removed if the block fails, except those in `keep`."""
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
    path.write_text(json.dumps(manifest.to_json(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
    shutil.copymode(folder / MANIFEST_NAME, path)
    path.replace(folder / MANIFEST_NAME)


def _disk_factor(bundle: Bundle, forms: list[Form]) -> int:
    layouts = {variant.name: variant.weights.layout for variant in bundle.manifest.variants}
    used = [layouts.get(source) for form in forms for source in form.sources.values()]
    return 1 + DISK_FACTOR * len(forms) + sum(LAYOUT_FACTORS.get(layout or "", 0) for layout in used)


def _check_space(bundle: Bundle, scratch: Path, factor: int) -> None:
    needed = factor * sum(bundle.manifest.files[name].bytes for name in _weight_files(bundle))
    free = shutil.disk_usage(scratch).free
    if free < needed:
        raise SatchelError(
            f"{bundle.folder}: specializing needs up to {needed >> 20:,} MiB of temporary disk space, and "
            f"{free >> 20:,} MiB are free: free some space"
        )


def _weight_files(bundle: Bundle) -> list[str]:
    """The weight files of the portable graphs."""
    names = {
        entries.get("location", "")
        for phase in ("prefill", "decode")  # the score graph has no others
        for entries in onnx_wire.external_data(bundle.graph_path(phase).read_bytes())
    }
    return sorted(name for name in names if name in bundle.manifest.files)
