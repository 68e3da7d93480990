"""Specializes a bundle for this machine, in its own folder or as a copy in the user's cache."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from satchel.runtime.bundle import user_cache
from satchel.runtime.bundle.archive.zip_writer import Entry
from satchel.runtime.bundle.lock import locked
from satchel.runtime.bundle.manifest import MANIFEST_NAME
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import SatchelError, SatchelWarning
from satchel.runtime.optimize import specialize
from satchel.runtime.optimize.forms import serves
from satchel.runtime.ort import machine
from satchel.runtime.ort.custom_ops import DEFAULT_CUSTOM, Custom
from satchel.runtime.ort.open_bundle import open_bundle


@dataclass(frozen=True)
class Prepared:
    """An opened bundle, and whether it was specialized just now: `made` is False if it was specialized already."""

    bundle: Bundle
    made: bool


def prepare(
    path: Path,
    *,
    layout: str = "auto",
    kernels: str = "auto",
    force: bool = False,
    threads: int | None = None,
    custom: Custom = DEFAULT_CUSTOM,
    shown: bool = False,
    progress: Callable[[str], Any] = specialize.silent,
    say: Callable[[str], Any] = specialize.silent,
    waiting: Callable[[], object] | None = None,
) -> Prepared:
    """Specialize the bundle at `path`, a folder or a packed file, unless it already is with these options.

    The new files go into its folder. For a packed file or a read-only folder they go into a copy in the user's cache,
    which is used whenever the bundle is opened.

    Args:
        layout: As for `specialize`.
        kernels: As for `specialize`.
        force: Specialize again.
        threads: As for `specialize`.
        custom: Which custom passes and operators run.
        shown: Show a progress bar when a large bundle is checked for the first time.
        progress: Called with the name of each stage.
        say: Called with each result.
        waiting: Called before waiting for another process that is specializing this bundle.

    Raises:
        SatchelError: As in `specialize`, or the user's cache cannot be written.
        BundleError: The bundle cannot be opened.
        BusyError: Another process is specializing it, and `waiting` is None.
    """
    with locked(path, waiting):
        bundle = _open(path, shown, custom)
        made = bundle.specialized
        if made is not None and not force and serves(bundle.manifest, made, layout, kernels):
            return Prepared(bundle, made=False)

        def run(target: Bundle) -> None:
            specialize.specialize(target, layout=layout, kernels=kernels, threads=threads, progress=progress, say=say)

        if machine.is_in_place(bundle):
            run(bundle)
        else:
            _in_cache(bundle, custom, progress, run)
        machine.note_attempts(bundle, 0)
        return Prepared(_open(path, shown, custom), made=True)


def remove(path: Path, custom: Custom = DEFAULT_CUSTOM) -> None:
    """Remove what `prepare` made for the bundle at `path`. Raises SatchelError and BundleError."""
    with locked(path, lambda: None):
        bundle = _open(path, shown=False, custom=custom)
        cached = user_cache.find(machine.cache_name(bundle))
        if cached is not None:
            user_cache.remove(cached)
        machine.note_attempts(bundle, 0)
        if cached is None or bundle.folder != cached:
            specialize.remove(bundle)


def _open(path: Path, shown: bool, custom: Custom) -> Bundle:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SatchelWarning)  # specialized graphs that do not fit are replaced
        return open_bundle(path, progress=shown, custom=custom)


def _in_cache(bundle: Bundle, custom: Custom, progress: Callable[[str], Any], run: Callable[[Bundle], None]) -> None:
    try:
        with user_cache.adding(machine.cache_name(bundle)) as folder:
            progress("copying the bundle to the user's cache")
            _copy(bundle, folder)
            run(_open(folder, shown=False, custom=custom))
    except OSError as error:
        raise SatchelError(
            f"{user_cache.bundles_folder()}: cannot be written ({error.strerror}): free space, or set XDG_CACHE_HOME "
            "to a writable folder"
        ) from None


def _copy(bundle: Bundle, folder: Path) -> None:
    """Write a bundle's files, except specialized ones, into a new folder. Raises OSError."""
    folder.mkdir()
    for name in bundle.manifest.files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("xb") as file:
            for block in Entry(name, bundle.span(name)).blocks():
                file.write(block)
    document = replace(bundle.manifest, specialized=None).to_json()
    (folder / MANIFEST_NAME).write_text(
        json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n"
    )
