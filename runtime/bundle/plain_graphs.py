"""Reduces the manifest of a bundle with custom passes or operators to the graphs that need neither."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from satchel.runtime.bundle.errors import BundleError

if TYPE_CHECKING:
    from satchel.runtime.bundle.manifest import Manifest


def without_custom(manifest: Manifest) -> Manifest:
    """The manifest with its plain graphs only. Raises BundleError if there are none."""
    if manifest.plain is None:
        raise BundleError("this bundle has no graphs without custom passes and operators")
    plain = dataclasses.replace(
        manifest,
        graphs=manifest.plain.graphs,
        variants=(),
        static=manifest.plain.static,
        plain=None,
        custom_ops=(),
        specialized=None,
    )
    custom_only = _graph_files(manifest) - _graph_files(plain)
    files = {name: record for name, record in manifest.files.items() if name not in custom_only}
    return dataclasses.replace(plain, files=files)


def _graph_files(manifest: Manifest) -> set[str]:
    """The files of a manifest's graphs, without those of `plain`."""
    files: set[str] = set()
    if manifest.graphs is not None:
        files |= {spec.file for spec in vars(manifest.graphs).values()}
    files |= {variant.graph.file for variant in manifest.variants}
    if manifest.static is not None:
        graphs = (*manifest.static.prefill, manifest.static.decode, manifest.static.score)
        files |= {part.file for graph in graphs for part in graph.parts}
    return files
