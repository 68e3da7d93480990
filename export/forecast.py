"""What an export will need, said before it starts."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from satchel.export.checkpoint import Checkpoint
from satchel.export.config import ExportConfig
from satchel.export.errors import ExportError
from satchel.export.quantize.texts import CALIBRATION_WINDOWS, certificate_windows
from satchel.graphs.ir.weights import BLOCK_BYTES
from satchel.runtime.bundle.certificate import Window

MIB = 1 << 20
BYTES = {"fp32": 4, "fp16": 2, "a16w8": 1.1, "a8w8": 1.1, "int8": 1.1, "a16w4": 0.8, "int4": 0.8}
"""Of one weight with its share of scales; the upper end for those in 4 bits, whose embedding has 8."""

# Measured on two cores; see docs/benchmarks.md.
IMPORTS_MIB = 430
LAYER_MIB = 2.5
START_SECONDS = 6.0
LAYER_SECONDS = 0.5
WRITE_BYTES_PER_SECOND = 250e6
GRAPH_BYTES_PER_LAYER = 40_000
ROUNDING_SECONDS = 0.9e-6
"""For each weight that is rounded with feedback from the calibration text."""
MEASURING_SECONDS = 0.12e-6
"""For each weight, to run the float model and the bundle over the certificate's text."""
ACTIVATIONS_PER_TOKEN = 6144
"""Numbers that lie between two pieces of a model while it is calibrated; a wide model has more."""
ROUNDING_MIB = 220
"""Second moments, a weight in several forms, and what ONNX Runtime holds while it runs one piece."""


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Peak anonymous memory in bytes (mapped file pages apart), bytes on disk, bytes put aside beside the bundle while
    it is made, and seconds.
    """

    memory: int
    disk: int
    scratch: int
    seconds: float

    def __str__(self) -> str:
        time = f"{self.seconds:.0f} s" if self.seconds < 90 else f"{self.seconds / 60:.1f} min"
        more = f" ({self.scratch / MIB:,.0f} more while it works)" if self.scratch >= MIB else ""
        return f"about {self.memory / MIB:,.0f} MiB of memory, {self.disk / MIB:,.0f} MiB of disk{more} and {time}"


def forecast(checkpoint: Checkpoint, config: ExportConfig) -> Forecast:
    """Estimate an export from the sizes in the checkpoint."""
    precision = config.precision
    layers = checkpoint.layers or 1
    weights = {id(w): w for w in checkpoint.weights.values()}.values()
    elements = [w.size for w in weights]
    disk = int(sum(elements) * BYTES[precision]) + layers * 3 * GRAPH_BYTES_PER_LAYER + 4 * MIB
    # A GGUF weight that is transposed is decoded whole; all else is read a block at a time.
    largest = max(elements, default=0) * 4 if checkpoint.kind == "gguf" else 0
    if precision == "fp16":  # the check of the bundle expands one weight after the other
        largest += max(elements, default=0) * 4
    memory = int((IMPORTS_MIB + LAYER_MIB * layers) * MIB) + 3 * BLOCK_BYTES + largest
    seconds = START_SECONDS + LAYER_SECONDS * layers + sum(elements) * 4 / WRITE_BYTES_PER_SECOND
    scratch = 0
    if config.quantized:
        scratch += sum(elements) + CALIBRATION_WINDOWS * Window.LENGTH * 4 * ACTIVATIONS_PER_TOKEN
        memory += ROUNDING_MIB * MIB + 4 * max(elements, default=0)
        seconds += ROUNDING_SECONDS * sum(elements)
    if config.certificate:
        scratch += 4 * checkpoint.vocab_size * certificate_windows(config) * Window.LENGTH
        seconds += MEASURING_SECONDS * sum(elements)
    return Forecast(memory, disk, scratch, seconds)


def check_disk(needed: Forecast, output: Path) -> None:
    """Check that the disk has room.

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
            "free some space or choose another place"
        )
