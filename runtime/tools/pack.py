"""Packs a bundle into one file that Python runs, and puts it into a folder again."""

from __future__ import annotations

import contextlib
import importlib.machinery
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata, resources
from importlib.resources.abc import Traversable
from pathlib import Path

from satchel.runtime.bundle.archive.packed import FOLDER
from satchel.runtime.bundle.archive.span import Span
from satchel.runtime.bundle.archive.zip_writer import PAGE, Entry, zip_parts
from satchel.runtime.bundle.atomic_write import cannot_write, write_parts
from satchel.runtime.bundle.errors import SatchelError
from satchel.runtime.bundle.manifest import MANIFEST_NAME
from satchel.runtime.bundle.reader import BESIDE, Bundle
from satchel.runtime.bundle.scratch import scratch_folder

PREFIX = b"#!/usr/bin/env python3\n"

MAIN = b'''"""Runs the language model that lies in this file."""

import os
import sys

from satchel.runtime.cli.program import main

if __name__ == "__main__":
    sys.exit(main(os.path.dirname(__file__), sys.argv[1:]))
'''

SKIPPED = ("__pycache__", "py.typed", "entry")  # an editable install shows `satchel` itself as satchel.runtime.entry
COMPILED = (".c", ".h", *importlib.machinery.EXTENSION_SUFFIXES)
"""Ends of the names of satchel's own kernels: a library is loaded from no archive, and is for one machine."""

PROGRAM_MODE = 0o755


def pack(bundle: Bundle, output: Path) -> None:
    """Write an opened bundle, with the runner, into one file. The same bundle gives the same bytes.

    What was made on a device stays behind: the packed manifest has no `specialized`. The file appears whole or not at
    all. Raises SatchelError where it cannot be written, BundleError where the bundle cannot be read.
    """
    write_packed(bundle, bundle_entries(bundle), output, "--output")


def write_packed(bundle: Bundle, files: list[Entry], output: Path, option: str) -> None:
    """Write a packed bundle of these files of it; `option` is the flag that named `output`. Raises SatchelError."""
    entries = [*_runner_entries(), *files]
    write_parts(output, zip_parts(PREFIX, entries), option)
    with contextlib.suppress(OSError):
        os.chmod(output, PROGRAM_MODE)


def bundle_entries(bundle: Bundle) -> list[Entry]:
    """The files of a bundle as they are packed: manifest, signature, and what the manifest lists, by name."""
    spans = {name: bundle.span(name) for name in sorted(bundle.manifest.files)}
    beside = {name: content for name in BESIDE if (content := beside_content(bundle, name)) is not None}
    if bundle.packed is None and MANIFEST_NAME in beside:
        beside[MANIFEST_NAME] = _without_specialized(bundle, beside[MANIFEST_NAME])
    contents: dict[str, bytes | Span] = {**beside, **spans}
    return [Entry(f"{FOLDER}{name}", content, PAGE) for name, content in contents.items()]


def beside_content(bundle: Bundle, name: str) -> bytes | None:
    """The content of a file that the manifest does not list, the manifest itself or a signature; None without one."""
    if bundle.packed is not None:
        return bundle.packed[name].read() if name in bundle.packed else None
    path = bundle.folder / name
    return path.read_bytes() if path.exists() else None


def unpack(bundle: Bundle, output: Path) -> None:
    """Write the files of a packed bundle, which is opened and so checked, into a new folder.

    The folder appears whole or not at all. Raises SatchelError where something is there, or it cannot be written.
    """
    if bundle.packed is None:
        raise SatchelError(f"{bundle.folder}: is a folder already: give a file made by satchel pack")
    if os.path.lexists(output):
        raise SatchelError(f"--output {output}: already exists: choose another folder")
    try:
        with _staged(output) as stage:
            for name, span in bundle.packed.items():
                (stage / name).parent.mkdir(parents=True, exist_ok=True)
                with (stage / name).open("xb") as file:
                    for block in Entry(name, span).blocks():
                        file.write(block)
    except OSError as error:
        raise cannot_write(output, "--output", error) from None


@contextlib.contextmanager
def _staged(output: Path) -> Iterator[Path]:
    """An empty folder beside `output` that becomes it when the block ends well, and is removed otherwise."""
    with scratch_folder(output.absolute().parent, ".satchel-unpack-") as place:
        stage = place / "bundle"
        stage.mkdir()
        yield stage
        stage.rename(output)


def _without_specialized(bundle: Bundle, content: bytes) -> bytes:
    """The manifest's own bytes, or those of one without specialized graphs where it has some."""
    if bundle.manifest.specialized is None:
        return content
    document = replace(bundle.manifest, specialized=None).to_json()
    return (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode("utf-8")


def _runner_entries() -> list[Entry]:
    """The program: its start, the runner's modules and data, and the version by which it knows itself."""
    version = metadata.version("satchel")
    needed = [line for line in metadata.requires("satchel") or () if "extra ==" not in line]
    lines = ["Metadata-Version: 2.1", "Name: satchel", f"Version: {version}", *(f"Requires-Dist: {n}" for n in needed)]
    about = "".join(f"{line}\n" for line in lines).encode("ascii")
    return [
        Entry("__main__.py", MAIN),
        Entry("satchel/__init__.py", b'"""The part of satchel that runs bundles."""\n'),
        *_package_entries(resources.files("satchel.runtime"), "satchel/runtime"),
        Entry(f"satchel-{version}.dist-info/METADATA", about),
    ]


def _package_entries(folder: Traversable, name: str) -> Iterator[Entry]:
    for item in sorted(folder.iterdir(), key=lambda item: item.name):
        if item.name in SKIPPED or item.name.startswith(".") or item.name.endswith(COMPILED):
            continue
        if item.is_dir():
            yield from _package_entries(item, f"{name}/{item.name}")
        else:
            yield Entry(f"{name}/{item.name}", item.read_bytes())
