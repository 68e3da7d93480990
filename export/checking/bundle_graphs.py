"""The graphs that a bundle's manifest names, each file once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from satchel.runtime.bundle.contract import FURTHER, PHASES
from satchel.runtime.bundle.hash_cache import sha256_of
from satchel.runtime.bundle.manifest import GraphSpec, Manifest, StaticGraph
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import BundleError

PHASE_OF = {"prefill_int8": "prefill", "decode_blocks": "decode", "native": "prefill"}
SUFFIX = ".onnx"


@dataclass(frozen=True)
class BundleGraph:
    """A graph of a bundle.

    Attributes:
        name: For people: "decode", or "prefill of 128 tokens, part 2".
        phase: "prefill", "decode" or "score".
        file: Its name in the bundle.
        path: Where it is.
        session: The session configuration entries that the manifest gives it.
    """

    name: str
    phase: str
    file: str
    path: Path
    session: Mapping[str, str]


def bundle_graphs(bundle: Bundle) -> list[BundleGraph]:
    """All graphs that the manifest names. A file that serves several is there once.

    Graphs that `satchel specialize` made are left out: they are for one machine and its CPU.

    Raises:
        BundleError: A file is not what the manifest says it is.
    """
    found: dict[tuple[str, str], BundleGraph] = {}
    for name, phase, spec in _specs(bundle.manifest):
        graph = BundleGraph(name, phase, spec.file, bundle.path(spec.file), spec.session)
        found.setdefault((phase, spec.file), graph)
    for file in {graph.file for graph in found.values()}:
        if sha256_of(bundle.path(file), lambda _: None) != bundle.manifest.files[file].sha256:
            raise BundleError(
                f"{bundle.path(file)}: damaged (its SHA-256 differs): copy the bundle again, or export it again"
            )
    return list(found.values())


def _specs(manifest: Manifest) -> Iterator[tuple[str, str, GraphSpec]]:
    """(name, phase, what the manifest says of it) of each graph."""
    if manifest.graphs is not None:
        for name in (*PHASES, *FURTHER):
            spec = getattr(manifest.graphs, name)
            if spec is not None:
                yield name, PHASE_OF.get(name, name), spec
    if manifest.static is not None:
        for graph in manifest.static.prefill:
            yield from _parts("prefill", graph)
        yield from _parts("decode", manifest.static.decode)
        yield from _parts("score", manifest.static.score)


def _parts(phase: str, graph: StaticGraph) -> Iterator[tuple[str, str, GraphSpec]]:
    whole = phase if phase == "decode" else f"{phase} of {graph.tokens} tokens"
    for index, part in enumerate(graph.parts, start=1):
        yield whole if len(graph.parts) == 1 else f"{whole}, part {index}", phase, part
