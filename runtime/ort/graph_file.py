"""The graph file of a bundle in the form ONNX Runtime loads, after a check that its weights are in the bundle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnxruntime as ort

from satchel.runtime.bundle import onnx_wire
from satchel.runtime.bundle.external_data import check_external_data
from satchel.runtime.bundle.reader import Bundle

WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
"""The session entry that names the folder of the external data of a graph given as bytes."""


def graph_file(
    bundle: Bundle, name: str, options: ort.SessionOptions, change: Callable[[bytes], bytes] | None = None
) -> Path | bytes:
    """The path or the bytes to load for the graph file `name`, as `change` returns it.

    For a folder it is the path of a graph that is not changed. For a packed bundle it is the graph itself, whose
    external data points into the packed file, from which weights are mapped. `options` gets the entry that names the
    folder of the data of a graph that is given as bytes.

    Raises BundleError for a graph whose data is not in the bundle.
    """
    model = bundle.read(name)
    made = {} if bundle.specialized is None else bundle.specialized.files
    sizes = {file: record.bytes for file, record in {**bundle.manifest.files, **made}.items()}
    check_external_data(model, sizes, str(bundle.folder / name))
    if bundle.packed is None:
        if change is None:
            return bundle.path(name)
        options.add_session_config_entry(WEIGHTS_FOLDER, str(bundle.folder.resolve()))
        return change(model)
    container = bundle.folder.resolve()
    options.add_session_config_entry(WEIGHTS_FOLDER, str(container.parent))

    def moved(entries: onnx_wire.External) -> onnx_wire.External:
        span = bundle.span(entries["location"])
        offset = span.offset + int(entries.get("offset", "0"))
        length = entries.get("length") or str(span.length - int(entries.get("offset", "0")))
        return {**entries, "location": container.name, "offset": str(offset), "length": length}

    return onnx_wire.map_external_data(model if change is None else change(model), moved)
