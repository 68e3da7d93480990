"""Estimates the memory, disk space and time of an export before it starts."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path

from satchel.export.checkpoint import Checkpoint
from satchel.export.config import STORED, ExportConfig
from satchel.export.errors import ExportError
from satchel.export.planning.shape import FLOAT_BYTES, Matrix
from satchel.export.planning.stored import Precision
from satchel.export.quantize.texts import CALIBRATION_WINDOWS, certificate_windows
from satchel.export.recipes.fit import layer_kinds
from satchel.export.stages import duration
from satchel.graphs.ir.weights import BLOCK_BYTES, LazyWeight
from satchel.graphs.quant.recipe import Recipe, Scheme
from satchel.graphs.quant.stored import GRID, WIDENED, StoredGrid
from satchel.runtime.bundle.certificate import Window

MIB = 1 << 20

# Measured on two cores; see docs/benchmarks.md.
IMPORTS_MIB = 430
LAYER_MIB = 2.5
TRACING_SECONDS, TRACING_LAYER_SECONDS = 5.0, 0.12
PASSES_LAYER_SECONDS = 0.05
WRITE_BYTES_PER_SECOND = 250e6
CHECK_SECONDS = 2.0
GRAPH_BYTES_PER_LAYER = 40_000
ROUNDING_SECONDS = {"quick": 0.11e-6, "normal": 0.6e-6}
"""For each weight, by effort."""
TRYING_SECONDS = 0.03e-6
"""For each weight and linear layer of a model, to measure layers for a budget: each is tried by half a run. Measured on
SmolLM2-135M, 502 s on two cores that were shared with other work."""
CACHE_SECONDS = 0.15e-6
"""For each weight, to find the scales of an int8 KV cache on the calibration text."""
MEASURING_SECONDS = 0.025e-6
"""For each weight and window of the certificate's text, to run the float model and the bundle."""
LINEAR_LAYERS = 4
"""Of a layer, once those that read the same are merged."""
ACTIVATIONS_PER_TOKEN = 6144
"""Numbers stored between two pieces of a model while it is calibrated; a wide model has more."""
ROUNDING_MIB = 220
"""Second moments, a weight in several forms, and what ONNX Runtime allocates while it runs one piece."""


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What an export needs.

    Attributes:
        memory: Peak anonymous memory in bytes; mapped file pages are not counted.
        disk: Size of the bundle in bytes.
        scratch: Temporary disk space in bytes.
        stages: Expected seconds of each stage, by its name in STAGES.
    """

    memory: int
    disk: int
    scratch: int
    stages: Mapping[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.stages.values())

    def __str__(self) -> str:
        more = f" ({self.scratch / MIB:,.0f} more while it works)" if self.scratch >= MIB else ""
        return (
            f"about {self.memory / MIB:,.0f} MiB of memory, {self.disk / MIB:,.0f} MiB of disk{more} "
            f"and {duration(self.seconds)}"
        )


def forecast(checkpoint: Checkpoint, config: ExportConfig, recipe: Recipe | None) -> Forecast:
    """Estimate an export from the sizes in the checkpoint; `recipe` is the one that was fitted to it."""
    layers = checkpoint.layers or 1
    elements = [w.size for w in {id(w): w for w in checkpoint.weights.values()}.values()]
    total, largest = sum(elements), 4 * max(elements, default=0)
    disk = _weight_bytes(checkpoint, config, recipe) + layers * 3 * GRAPH_BYTES_PER_LAYER + 4 * MIB
    memory = int((IMPORTS_MIB + LAYER_MIB * layers) * MIB) + 3 * BLOCK_BYTES
    if checkpoint.kind == "gguf":  # a weight that is transposed is decoded whole; all else is read a block at a time
        memory += largest
    if config.precision == "fp16":  # the check of the bundle expands one weight after the other
        memory += largest
    stages = {
        "tracing the model": TRACING_SECONDS + TRACING_LAYER_SECONDS * layers,
        "optimizing the graphs": PASSES_LAYER_SECONDS * layers,
        "writing the bundle": disk / WRITE_BYTES_PER_SECOND,
        "checking the bundle": CHECK_SECONDS + disk / WRITE_BYTES_PER_SECOND,
    }
    scratch = 0
    calibrated = CALIBRATION_WINDOWS * Window.LENGTH * 4 * ACTIVATIONS_PER_TOKEN
    if config.int8_cache or config.quantized:
        stages["rounding the weights"] = CACHE_SECONDS * total * config.int8_cache
    if config.quantized:
        scratch += total
        memory += ROUNDING_MIB * MIB + largest
        stages["rounding the weights"] += ROUNDING_SECONDS[str(config.effort)] * total
    if config.budgeted:
        scratch += 4 * total
        stages["measuring the layers"] = TRYING_SECONDS * total * LINEAR_LAYERS * layers
    if config.reads_calibration_text:
        scratch += calibrated
    if config.certificate:
        windows = certificate_windows(config)
        scratch += 4 * checkpoint.vocab_size * windows * Window.LENGTH
        if config.precision != "fp32":  # the weights in two layouts, to measure them with satchel's kernels
            scratch += 2 * disk
        stages["measuring the bundle"] = MEASURING_SECONDS * windows * total
    return Forecast(memory, disk, scratch, stages)


def _weight_bytes(checkpoint: Checkpoint, config: ExportConfig, recipe: Recipe | None) -> int:
    weights = {id(w): (name, w) for name, w in reversed(list(checkpoint.weights.items()))}.values()
    if config.size is not None:
        return int(config.size * 1e6)
    if config.bits is not None:
        return int(sum(w.size for _, w in weights) * config.bits / 8)
    if config.precision == STORED:
        return int(sum(w.size * _stored_bytes(w, checkpoint.kind == "gguf") for _, w in weights))
    precision = Precision(config.precision, recipe, FLOAT_BYTES)
    kinds = dict(layer_kinds(checkpoint))
    return sum(precision.nbytes(_matrix(name, weight, kinds, checkpoint.vocab_size)) for name, weight in weights)


def _matrix(name: str, weight: LazyWeight, kinds: Mapping[str, tuple[str, int | None]], vocabulary: int) -> Matrix:
    """A weight of a checkpoint by its sizes; what is no matrix is one that no recipe rounds."""
    layer = name.removesuffix(".weight")
    kind, inputs = kinds.get(layer, ("float", 1))
    inputs = inputs or weight.dims[-1]
    outputs = weight.size // inputs
    return Matrix(layer, outputs, inputs, "head" if (kind, outputs) == ("linear", vocabulary) else kind)


def _stored_bytes(weight: LazyWeight, rounds: bool) -> float:
    """Bytes of one value of --precision stored; `rounds` if what cannot be kept is rounded to 8 bits."""
    grid = weight.meta.get(GRID)
    if isinstance(grid, StoredGrid):
        return grid.scheme.bits_per_weight("linear") / 8
    return Scheme(8, 32).bits_per_weight("linear") / 8 if rounds and WIDENED in weight.meta else 4


def check_disk(needed: Forecast, output: Path) -> None:
    """Check that the disk has enough free space.

    Raises:
        ExportError: It has not.
    """
    place = output.absolute().parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    wanted = needed.disk + needed.scratch
    if free < wanted:
        raise ExportError(
            f"{place}: {wanted / MIB:,.0f} MiB are needed and {free / MIB:,.0f} MiB are free: "
            "free some space or choose another folder"
        )
