"""A graph as ONNX Runtime hands it to an execution provider: optimised at level BASIC, and nothing assigned yet."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError

from satchel.export.checking.bundle_graphs import BundleGraph
from satchel.export.checking.value_types import INLINE, UNREAD
from satchel.runtime.errors import BundleError
from satchel.runtime.manifest import FURTHER
from satchel.runtime.session import ORT_ERRORS, entry_options


class NotOptimised(Exception):
    """ONNX Runtime does not open the graph here; the message says why."""


def read_graph(path: Path) -> onnx.ModelProto:
    """The file as it is, without the weights beside it. Raises BundleError where it is no ONNX graph."""
    try:
        return onnx.load(path, load_external_data=False)
    except DecodeError:
        raise BundleError(f"{path}: not an ONNX graph: copy the bundle again, or export it again") from None


def handed_over(graph: BundleGraph, manifest: Path) -> onnx.ModelProto:
    """The graph after ONNX Runtime's optimisers of level BASIC, which run before any provider is asked.

    ONNX Runtime's compiling interface gives it back where no provider compiles anything. A session's own saved graph
    would be a later one: with the casts that the CPU needs for float16. Nothing is written: constants of more than
    `INLINE` bytes come back without values.

    Raises:
        NotOptimised: ONNX Runtime cannot open it on this machine.
        BundleError: The manifest sets a session entry that is not for it to set.
    """
    options = entry_options(graph.session, f"{manifest}: {graph.name}")
    try:
        compiler = ort.ModelCompiler(
            options,
            str(graph.path),
            graph_optimization_level=ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
            get_initializer_location_func=_place,
        )
        return onnx.load_model_from_string(compiler.compile_to_bytes())
    except ORT_ERRORS as error:
        if graph.name in FURTHER:
            raise NotOptimised("its weights are there when satchel specialize has made them") from None
        raise NotOptimised(" ".join(str(error).split())) from None


def _place(
    name: str, value: ort.OrtValue, external: ort.OrtExternalInitializerInfo | None
) -> ort.OrtExternalInitializerInfo | None:
    """Keep small constants in the graph, and put a name in the place of a large one's values."""
    size = value.tensor_size_in_bytes()
    return ort.OrtExternalInitializerInfo(UNREAD, 0, size) if size > INLINE else None
