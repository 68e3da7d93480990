"""Packs a bundle into one file that Python runs, and extracts it again."""

from __future__ import annotations

import contextlib
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
COMPILED = (".c", ".h", ".dll", ".dylib", ".pyd", ".so")
"""Name suffixes of satchel's own kernels on any system: they are for one machine, and load from no archive."""

PROGRAM_MODE = 0o755


def pack(bundle: Bundle, output: Path) -> None:
    """Write an opened bundle, with the runner, into one file. The same bundle gives the same bytes.

    Specialized graphs are left out of it. The file is written atomically. Raises SatchelError if it cannot be written,
    and BundleError if the bundle cannot be read.
    """
    write_packed(bundle, bundle_entries(bundle), output, "--output")


def write_packed(bundle: Bundle, files: list[Entry], output: Path, option: str) -> None:
    """Write a packed bundle with these files; `option` is the flag that named `output`. Raises SatchelError."""
    entries = [*_runner_entries(), *files]
    write_parts(output, zip_parts(PREFIX, entries), option)
    with contextlib.suppress(OSError):
        os.chmod(output, PROGRAM_MODE)


def bundle_entries(bundle: Bundle) -> list[Entry]:
    """The files of a bundle to pack: manifest, signature, and the files that the manifest lists, sorted by name."""
    spans = {name: bundle.span(name) for name in sorted(bundle.manifest.files)}
    beside = {name: content for name in BESIDE if (content := beside_content(bundle, name)) is not None}
    if bundle.packed is None and MANIFEST_NAME in beside:
        beside[MANIFEST_NAME] = _without_specialized(bundle, beside[MANIFEST_NAME])
    contents: dict[str, bytes | Span] = {**beside, **spans}
    return [Entry(f"{FOLDER}{name}", content, PAGE) for name, content in contents.items()]


def beside_content(bundle: Bundle, name: str) -> bytes | None:
    """The content of the manifest or the signature, which the manifest does not list; None if there is none."""
    if bundle.packed is not None:
        return bundle.packed[name].read() if name in bundle.packed else None
    path = bundle.folder / name
    return path.read_bytes() if path.exists() else None


def unpack(bundle: Bundle, output: Path) -> None:
    """Extract the files of an opened packed bundle into a new folder.

    The folder is created atomically. Raises SatchelError if it exists or cannot be written.
    """
    if bundle.packed is None:
        raise SatchelError(f"{bundle.folder}: is a folder already: give a file made by satchel pack")
    if os.path.lexists(output):
        raise SatchelError(f"--output {output}: already exists: choose another folder")
    try:
        with staged_folder(output) as stage:
            for name, span in bundle.packed.items():
                (stage / name).parent.mkdir(parents=True, exist_ok=True)
                with (stage / name).open("xb") as file:
                    for block in Entry(name, span).blocks():
                        file.write(block)
    except OSError as error:
        raise cannot_write(output, "--output", error) from None


@contextlib.contextmanager
def staged_folder(output: Path) -> Iterator[Path]:
    """An empty folder beside `output`, renamed to it if the block succeeds, and removed otherwise."""
    with scratch_folder(output.absolute().parent, ".satchel-unpack-") as place:
        stage = place / "bundle"
        stage.mkdir()
        yield stage
        stage.rename(output)


def _without_specialized(bundle: Bundle, content: bytes) -> bytes:
    """The bytes of the manifest without specialized graphs; unchanged if it has none."""
    if bundle.manifest.specialized is None:
        return content
    document = replace(bundle.manifest, specialized=None).to_json()
    return (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode("utf-8")


def _runner_entries() -> list[Entry]:
    """The program: __main__.py, the runner's modules and data, and metadata with its version."""
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
