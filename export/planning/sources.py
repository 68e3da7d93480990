"""Opens what is to be planned: a config.json, a checkpoint folder, a GGUF file or a bundle. No weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from satchel.export.config import DEFAULT_CONTEXT, FLOAT_PRECISIONS, KV_CACHES, PRECISIONS, STORED
from satchel.export.errors import ExportError
from satchel.export.planning.config_shape import read_config, shape_of
from satchel.export.planning.model import Made, Model, Planned
from satchel.export.planning.shape import FLOAT_BYTES, Shape
from satchel.export.planning.stored import HALF_BYTES, INT8_BYTES, Precision
from satchel.export.recipes import load_recipe
from satchel.graphs.quant.recipe import RecipeError
from satchel.runtime.bundle.reader import read_bundle
from satchel.runtime.bundle.recognize import CHECKPOINT_CONFIG, GGUF_MAGIC, is_made_by_satchel

PLANNED = tuple(name for name in PRECISIONS if name != STORED)
"""Precisions whose sizes follow from a config; those of stored values are in the weights."""


def open_model(source: str, precision: str | None, kv_cache: str | None, max_context: int | None) -> Model:
    """The model at a path.

    Args:
        source: The path.
        precision: One of `PLANNED`; None for int8, or for that of a bundle.
        kv_cache: float or int8; None for float, or for that of a bundle.
        max_context: Positions of the bundle; None for what `satchel export` would choose, or for those of a bundle.

    Raises:
        ExportError: Nothing there is a model, or an option does not go with it.
        BundleError: A bundle is damaged.
    """
    path = Path(source)
    if is_made_by_satchel(path):
        return _bundle(path, precision, kv_cache, max_context)
    for option, value, allowed in (("precision", precision, PLANNED), ("kv-cache", kv_cache, KV_CACHES)):
        if value is not None and value not in allowed:
            raise ExportError(f"--{option} {value}: unknown value; choose {' or '.join(allowed)}")
    shape = shape_of(_config(path), source)
    if max_context is not None and not 1 <= max_context <= shape.context:
        raise ExportError(f"--max-context {max_context}: give 1 to the model's {shape.context} positions")
    positions = min(shape.context, DEFAULT_CONTEXT) if max_context is None else max_context
    name = precision or PLANNED[0]
    recipe = None if name in FLOAT_PRECISIONS else load_recipe(name)
    stored = Precision(name, recipe, _number_bytes(name, kv_cache, shape)).fitted(shape)
    model = Planned(source, shape, stored, positions)
    try:
        model.weights()
    except RecipeError as error:
        raise ExportError(f"{source}: --precision {name}: {error}") from None
    return model


def _number_bytes(precision: str, kv_cache: str | None, shape: Shape) -> int:
    """Bytes of a number in the KV cache, with the fastest kernels: satchel's own have it in float16, for all layers."""
    if kv_cache == "int8":
        return INT8_BYTES
    native = all(layer.reads is layer.cache and (layer.cache is None or layer.cache.native) for layer in shape.layers)
    return HALF_BYTES if native and precision != "fp32" else FLOAT_BYTES


def _bundle(path: Path, precision: str | None, kv_cache: str | None, max_context: int | None) -> Model:
    bundle = read_bundle(str(path))
    made = {"precision": bundle.manifest.precision, "kv-cache": None, "max-context": bundle.manifest.model.max_context}
    for option, given in (("precision", precision), ("kv-cache", kv_cache), ("max-context", max_context)):
        if given is not None and given != made[option]:
            raise ExportError(
                f"--{option} {given} does not go with {path}, which is a bundle already: leave it out, or give the "
                "checkpoint"
            )
    return Made(str(path), bundle)


def _config(path: Path) -> Mapping[str, Any]:
    if path.is_dir():
        if not (path / CHECKPOINT_CONFIG).is_file():
            raise ExportError(f"{path}: has neither a {CHECKPOINT_CONFIG} nor a manifest.json: pass a model")
        return read_config(path / CHECKPOINT_CONFIG)
    if not path.is_file():
        raise ExportError(f"{path}: no such file or folder; pass a config.json, a checkpoint, a GGUF file or a bundle")
    with path.open("rb") as file:
        is_gguf = file.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    if not is_gguf:
        return read_config(path)
    from satchel.export.checkpoint.gguf_config import config_of  # needs the extra "export"
    from satchel.export.checkpoint.gguf_parts import open_parts

    table: dict[str, Any] = config_of(open_parts(path)).to_dict()
    return table
