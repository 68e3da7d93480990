"""Writes a bundle's files into a folder: one weight file, the graphs that refer to it, and the companion files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnxruntime import AdapterFormat, OrtValue

from satchel.export.checkpoint import Checkpoint
from satchel.export.checkpoint.companions import without_wrong_settings
from satchel.export.config import ExportConfig
from satchel.export.writing.bom import BOM_NAME, bom
from satchel.export.writing.describe import describe
from satchel.export.writing.genai_config import genai_config
from satchel.export.writing.provenance import Sources
from satchel.graphs.ir.inputs import table_of
from satchel.graphs.ir.values import weight
from satchel.graphs.ir.weights import LazyWeight, aligned, stored
from satchel.graphs.passes.adapt.attach_adapters import adapter_inputs
from satchel.graphs.quant.quantized import LAYOUT, Quantized
from satchel.runtime.bundle.contract import BLOCK_TABLE, ROW_OFFSETS, TEXT_LENGTH, WEIGHTS_NAME, Layout
from satchel.runtime.bundle.graph_specs import TensorSpec
from satchel.runtime.bundle.layouts import file_name
from satchel.runtime.bundle.manifest import MANIFEST_NAME, AdapterSpec, FileRecord, Manifest

DEFAULTS: Mapping[str | None, NDArray[Any]] = {
    TEXT_LENGTH: np.zeros((1, 1), np.int64),
    ROW_OFFSETS: np.zeros(0, np.int32),
    BLOCK_TABLE: np.zeros((0, 0), np.int32),
}
"""What inputs are where a run leaves them out."""

Advance = Callable[[int], object]


def write_bundle(
    folder: Path,
    checkpoint: Checkpoint,
    config: ExportConfig,
    models: Mapping[str, ir.Model],
    quantized: Quantized | None,
    report: Sequence[dict[str, Any]],
    sources: Callable[[], Sources],
    progress: Callable[[int], AbstractContextManager[Advance]],
) -> Manifest:
    """Write all files of a bundle into an empty folder, the manifest last.

    `sources` waits for what `source_records` returns. `progress(total)` returns a context manager whose value is called
    with the bytes of weights written.

    Raises:
        PassError: A weight cannot be stored at this precision.
        OSError: The disk is full, or a file cannot be written.
    """
    places = lay_out(models.values())
    with progress(sum(place.weight.nbytes for place in places.values() if place.file == WEIGHTS_NAME)) as advance:
        files = {WEIGHTS_NAME: write_weights(folder, places, advance)}
    for phase, model in models.items():
        write_graph(folder, f"{phase}.onnx", model, places)
    companions = without_wrong_settings(checkpoint.companions, checkpoint.vocab_size)
    if checkpoint.tokenizer is not None:
        companions[checkpoint.tokenizer.spec.file] = checkpoint.tokenizer.file
    write_companions(folder, companions)
    starts = {name: (place.file, place.offset) for name, place in places.items()}
    adapters = write_adapters(folder, adapter_inputs(next(iter(models.values()))))
    manifest = describe(checkpoint, config, models, quantized, report, files, starts, sources(), adapters)
    genai = genai_config(checkpoint, manifest)
    if genai is not None:
        write_json(folder / "genai_config.json", genai)
    files |= {path.name: record(path) for path in sorted(folder.iterdir()) if path.name not in files}
    manifest = dataclasses.replace(manifest, files=files)
    write_json(folder / BOM_NAME, bom(manifest, _card(companions)))
    manifest = dataclasses.replace(manifest, files=files | {BOM_NAME: record(folder / BOM_NAME)})
    write_json(folder / MANIFEST_NAME, manifest.to_json())
    return manifest


def _card(companions: Mapping[str, bytes | Path]) -> str | None:
    """The text of the checkpoint's model card."""
    card = companions.get("README.md")
    if card is None:
        return None
    return (card.read_bytes() if isinstance(card, Path) else card).decode("utf-8", "replace")


@dataclasses.dataclass(frozen=True)
class Place:
    """The file of a weight, and its offset there in bytes."""

    weight: LazyWeight
    offset: int
    file: str = WEIGHTS_NAME


def lay_out(models: Iterable[ir.Model]) -> dict[str, Place]:
    """Assign each weight of the graphs a place, once: graphs share the bytes of weights with the same name.

    The same holds for lookup tables whose rows are graph inputs. Weights in another layout, which are derived on the
    machine that runs the bundle, are placed in files that are not part of the bundle (`file_name`).

    Raises:
        ValueError: Two graphs have different weights of the same name.
    """
    places: dict[str, Place] = {}
    ends = dict.fromkeys((WEIGHTS_NAME, *map(file_name, Layout)), 0)
    for model in models:
        found = (*map(weight, model.graph.initializers.values()), *map(table_of, model.graph.inputs))
        for lazy in (lazy.base for lazy in found if lazy is not None):
            there = places.get(lazy.name)
            if there is not None:
                if (there.weight.dims, there.weight.dtype) != (lazy.dims, lazy.dtype):
                    raise ValueError(f"two weights have the name {lazy.name}: {there.weight} and {lazy}")
                continue
            layout = lazy.meta.get(LAYOUT)
            file = file_name(layout) if isinstance(layout, Layout) else WEIGHTS_NAME
            offset = aligned(ends[file], lazy.nbytes)
            places[lazy.name] = Place(lazy, offset, file)
            ends[file] = offset + lazy.nbytes
    return places


def write_weights(folder: Path, places: Mapping[str, Place], advance: Advance) -> FileRecord:
    """Write the weight file block by block and hash it; `advance` is called with the size of each block."""
    digest, position = hashlib.sha256(), 0
    with (folder / WEIGHTS_NAME).open("wb") as file:

        def put(data: bytes | memoryview) -> None:
            nonlocal position
            file.write(data)
            digest.update(data)
            position += len(data)

        for place in (place for place in places.values() if place.file == WEIGHTS_NAME):
            put(bytes(place.offset - position))
            for block in place.weight.blocks():
                data = stored(block).data
                put(data)
                advance(len(data))
    return FileRecord(position, digest.hexdigest())


def write_graph(folder: Path, name: str, model: ir.Model, places: Mapping[str, Place]) -> None:
    """Write one graph, with its weights as external data in the weight file.

    Inputs in `DEFAULTS` get these, so that a runner that does not know them can leave them out.
    """
    model = model.clone()
    for value in model.graph.inputs:
        if value.name in DEFAULTS:
            value.const_value = ir.tensor(DEFAULTS[value.name], name=value.name)
            model.graph.register_initializer(value)
    for value in model.graph.initializers.values():
        lazy = weight(value)
        if lazy is None:
            continue
        value.const_value = ir.ExternalTensor(
            places[lazy.base.name].file,
            places[lazy.base.name].offset,
            lazy.nbytes,
            lazy.dtype,
            shape=lazy.shape,
            name=str(value.name),
            base_dir=str(folder),
        )
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        for output in node.outputs:
            output.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.producer_name, model.producer_version = "satchel", None
    ir.save(model, folder / name)


def write_companions(folder: Path, files: Mapping[str, bytes | Path]) -> None:
    """Copy or write companion files under their names in the bundle."""
    for name, content in files.items():
        if isinstance(content, Path):
            shutil.copyfile(content, folder / name)
        else:
            (folder / name).write_bytes(content)


def write_adapters(folder: Path, inputs: Mapping[str, Mapping[str, LazyWeight]]) -> tuple[AdapterSpec, ...]:
    """Write the file of each adapter, and return their manifest entries.

    Args:
        folder: The bundle.
        inputs: The tensor of each adapter, by the adapter's name, for each optional input of the graphs.
    """
    written = []
    for adapter in dict.fromkeys(name for tensors in inputs.values() for name in tensors):
        own = {name: tensors[adapter].numpy() for name, tensors in inputs.items() if adapter in tensors}
        written.append(write_adapter(folder, adapter, own))
    return tuple(written)


def write_adapter(folder: Path, name: str, tensors: Mapping[str, np.ndarray]) -> AdapterSpec:
    """Write the file of an adapter, in ONNX Runtime's format, and return its manifest entry.

    Args:
        folder: The bundle.
        name: The adapter's name.
        tensors: Its tensors by the graphs' optional inputs; those without numbers are left out.
    """
    own = {key: np.ascontiguousarray(array, np.float32) for key, array in tensors.items() if array.size}
    content = AdapterFormat()
    content.set_adapter_version(1)
    content.set_model_version(1)
    content.set_parameters({key: OrtValue.ortvalue_from_numpy(array) for key, array in own.items()})
    file = f"{name}.onnx_adapter"
    content.export_adapter(str((folder / file).resolve()))
    return AdapterSpec(name, file, tuple(TensorSpec(key, "float32", array.shape) for key, array in own.items()))


def write_json(path: Path, document: object) -> None:
    """Write a JSON document: indented, UTF-8, with a trailing newline."""
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def record(path: Path) -> FileRecord:
    """Return the size and SHA-256 of a file."""
    with path.open("rb") as file:
        return FileRecord(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
