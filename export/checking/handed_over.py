"""Optimizes a graph at level BASIC, as ONNX Runtime does before it asks an execution provider."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError

from satchel.export.checking.bundle_graphs import BundleGraph
from satchel.export.checking.value_types import INLINE, UNREAD
from satchel.export.checking.whole_functions import unwrap, wrap
from satchel.graphs.providers.findings import GraphView
from satchel.runtime.errors import BundleError
from satchel.runtime.ort.session import ORT_ERRORS, entry_options

WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


class NotOptimized(Exception):
    """ONNX Runtime cannot open the graph on this machine; the message says why."""


def read_graph(path: Path) -> onnx.ModelProto:
    """Read the file, without external weights. Raises BundleError if it is not an ONNX graph."""
    try:
        proto = onnx.load(path, load_external_data=False)
    except DecodeError:
        raise no_graph(path) from None
    named = all(isinstance(text, str) for text in _texts(proto))
    if not named or not all(node.output for node in proto.graph.node):
        raise no_graph(path)
    return proto


def no_graph(path: Path) -> BundleError:
    """The error for a file that is not a valid ONNX graph."""
    return BundleError(f"{path}: not a valid ONNX graph: copy the bundle again, or export it again")


def _texts(proto: onnx.ModelProto) -> Iterator[str]:
    """The names in a graph; protobuf returns those that are not UTF-8 as bytes."""
    graph = proto.graph
    yield graph.name
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        yield value.name
    for node in graph.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)


def handed_over(graph: BundleGraph, manifest: Path, whole: GraphView | None = None) -> onnx.ModelProto:
    """The graph after ONNX Runtime's BASIC optimizers, which run before any provider is asked.

    ONNX Runtime's compile API returns it, since no provider compiles anything. The saved graph of a session would be a
    later one, with the casts that the CPU needs for float16. Writes nothing: constants of more than `INLINE` bytes are
    returned without values.

    Args:
        graph: The graph.
        manifest: The file to name in messages.
        whole: The same graph with types, for providers that have kernels for operators that the CPU would expand.

    Raises:
        NotOptimized: ONNX Runtime cannot open the graph on this machine.
        BundleError: The manifest sets a session entry that is not allowed.
    """
    options = entry_options(graph.session, f"{manifest}: {graph.name}")
    source: str | bytes = str(graph.path)
    if whole is not None:
        proto = read_graph(graph.path)
        if wrap(proto, whole):
            source = proto.SerializeToString()
            options.add_session_config_entry(WEIGHTS_FOLDER, str(graph.path.parent))
    try:
        compiler = ort.ModelCompiler(
            options,
            source,
            graph_optimization_level=ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
            get_initializer_location_func=_place,
        )
        optimized = onnx.load_model_from_string(compiler.compile_to_bytes())
    except (*ORT_ERRORS, UnicodeDecodeError) as error:  # the latter if the message quotes bytes that are not text
        if graph.variant is not None:
            raise NotOptimized("its weights are created by satchel specialize") from None
        raise NotOptimized(" ".join(str(error).split())) from None
    unwrap(optimized)
    return optimized


def _place(
    name: str, value: ort.OrtValue, external: ort.OrtExternalInitializerInfo | None
) -> ort.OrtExternalInitializerInfo | None:
    """Keep small constants in the graph, and replace the values of large ones with a reference."""
    size = value.tensor_size_in_bytes()
    return ort.OrtExternalInitializerInfo(UNREAD, 0, size) if size > INLINE else None
