"""Lists the graphs in the manifest of a bundle, each file once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from satchel.runtime.bundle.contract import EMBED, PHASES
from satchel.runtime.bundle.graph_specs import GraphSpec, StaticGraph, Variant
from satchel.runtime.bundle.hash_cache import sha256_of
from satchel.runtime.bundle.manifest import Manifest
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import BundleError

SUFFIX = ".onnx"


@dataclass(frozen=True)
class BundleGraph:
    """A graph of a bundle.

    Attributes:
        name: For people, such as "decode" or "prefill of 128 tokens, part 2".
        phase: "prefill", "decode" or "score".
        file: Its file name in the bundle.
        path: Its path.
        session: Its session configuration entries in the manifest.
        variant: The variant that it is the graph of, None for a portable graph.
    """

    name: str
    phase: str
    file: str
    path: Path
    session: Mapping[str, str]
    variant: Variant | None = None


def bundle_graphs(bundle: Bundle) -> list[BundleGraph]:
    """All graphs in the manifest, without duplicate files and without specialized graphs, which are for one CPU.

    Raises:
        BundleError: The hash of a file differs from the manifest.
    """
    found: dict[tuple[str, str], BundleGraph] = {}
    variants = {variant.name: variant for variant in bundle.manifest.variants}
    for name, phase, spec in _specs(bundle.manifest):
        graph = BundleGraph(name, phase, spec.file, bundle.path(spec.file), spec.session, variants.get(name))
        found.setdefault((phase, spec.file), graph)
    for file in {graph.file for graph in found.values()}:
        if sha256_of(bundle.path(file), lambda _: None) != bundle.manifest.files[file].sha256:
            raise BundleError(
                f"{bundle.path(file)}: damaged (its SHA-256 differs): copy the bundle again, or export it again"
            )
    return list(found.values())


def _specs(manifest: Manifest) -> Iterator[tuple[str, str, GraphSpec]]:
    """Yield (name, phase, manifest entry) of each graph."""
    if manifest.graphs is not None:
        for phase in PHASES:
            yield phase, phase, manifest.graph(phase)
        if manifest.embeddings is not None:
            yield EMBED, "score", manifest.embeddings.graph
        for variant in manifest.variants:
            yield variant.name, variant.runs[0], variant.graph
    if manifest.static is not None:
        for graph in manifest.static.prefill:
            yield from _parts("prefill", graph)
        yield from _parts("decode", manifest.static.decode)
        yield from _parts("score", manifest.static.score)


def _parts(phase: str, graph: StaticGraph) -> Iterator[tuple[str, str, GraphSpec]]:
    whole = phase if phase == "decode" else f"{phase} of {graph.tokens} tokens"
    for index, part in enumerate(graph.parts, start=1):
        yield whole if len(graph.parts) == 1 else f"{whole}, part {index}", phase, part
