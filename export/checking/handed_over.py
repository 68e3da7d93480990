"""A graph as ONNX Runtime hands it to an execution provider: optimized at level BASIC, and nothing assigned yet."""

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
from satchel.runtime.bundle.contract import FURTHER
from satchel.runtime.errors import BundleError
from satchel.runtime.ort.session import ORT_ERRORS, entry_options

WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


class NotOptimized(Exception):
    """ONNX Runtime does not open the graph here; the message says why."""


def read_graph(path: Path) -> onnx.ModelProto:
    """The file as it is, without the weights beside it. Raises BundleError where it is no ONNX graph."""
    try:
        proto = onnx.load(path, load_external_data=False)
    except DecodeError:
        raise no_graph(path) from None
    named = all(isinstance(text, str) for text in _texts(proto))
    if not named or not all(node.output for node in proto.graph.node):
        raise no_graph(path)
    return proto


def no_graph(path: Path) -> BundleError:
    """The error for a file that holds no ONNX graph, or a broken one."""
    return BundleError(f"{path}: not a sound ONNX graph: copy the bundle again, or export it again")


def _texts(proto: onnx.ModelProto) -> Iterator[str]:
    """The names in a graph; protobuf gives what is no UTF-8 as bytes."""
    graph = proto.graph
    yield graph.name
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        yield value.name
    for node in graph.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)


def handed_over(graph: BundleGraph, manifest: Path, whole: GraphView | None = None) -> onnx.ModelProto:
    """The graph after ONNX Runtime's optimizers of level BASIC, which run before any provider is asked.

    ONNX Runtime's compiling interface gives it back where no provider compiles anything. A session's own saved graph
    would be a later one: with the casts that the CPU needs for float16. Nothing is written: constants of more than
    `INLINE` bytes come back without values.

    Args:
        graph: Which graph.
        manifest: The file that messages name.
        whole: The same graph with types, for a provider that takes operators whole that the CPU would have expanded.

    Raises:
        NotOptimized: ONNX Runtime cannot open it on this machine.
        BundleError: The manifest sets a session entry that is not for it to set.
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
    except (*ORT_ERRORS, UnicodeDecodeError) as error:  # the latter where its message quotes what is no text
        if graph.name in FURTHER:
            raise NotOptimized("its weights are there when satchel specialize has made them") from None
        raise NotOptimized(" ".join(str(error).split())) from None
    unwrap(optimized)
    return optimized


def _place(
    name: str, value: ort.OrtValue, external: ort.OrtExternalInitializerInfo | None
) -> ort.OrtExternalInitializerInfo | None:
    """Keep small constants in the graph, and put a name in the place of a large one's values."""
    size = value.tensor_size_in_bytes()
    return ort.OrtExternalInitializerInfo(UNREAD, 0, size) if size > INLINE else None
