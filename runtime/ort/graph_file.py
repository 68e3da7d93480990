"""A bundle's graph file as ONNX Runtime is to load it, once what it points at is known to be in the bundle."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort

from satchel.runtime.bundle import onnx_wire
from satchel.runtime.bundle.external_data import check_external_data
from satchel.runtime.bundle.reader import Bundle

WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
"""The session configuration entry that says where the external data of a graph given as bytes lies."""


def graph_file(bundle: Bundle, name: str, options: ort.SessionOptions) -> Path | bytes:
    """What to give to ONNX Runtime for the graph file `name`.

    That is its path in a folder. Of a packed bundle it is the graph itself, whose weights are made to lie where they
    are in the packed file, under the name that the file has at this moment: they are mapped from there. `options` then
    gets the entry that names the folder. Raises BundleError for a graph whose data is not in the bundle.
    """
    model = bundle.read(name)
    made = {} if bundle.specialized is None else bundle.specialized.files
    sizes = {file: record.bytes for file, record in {**bundle.manifest.files, **made}.items()}
    check_external_data(model, sizes, str(bundle.folder / name))
    if bundle.packed is None:
        return bundle.path(name)
    container = bundle.folder.resolve()
    options.add_session_config_entry(WEIGHTS_FOLDER, str(container.parent))

    def moved(entries: onnx_wire.External) -> onnx_wire.External:
        span = bundle.span(entries["location"])
        offset = span.offset + int(entries.get("offset", "0"))
        length = entries.get("length") or str(span.length - int(entries.get("offset", "0")))
        return {**entries, "location": container.name, "offset": str(offset), "length": length}

    return onnx_wire.map_external_data(model, moved)
