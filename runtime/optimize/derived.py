"""Makes the weight file of a variant from the weights that the bundle stores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from satchel.runtime.bundle.contract import Layout
from satchel.runtime.bundle.graph_specs import Variant
from satchel.runtime.bundle.layouts import PANEL, Array, pack, parts, values_ending
from satchel.runtime.bundle.manifest import MANIFEST_NAME
from satchel.runtime.bundle.onnx_wire import Tensor, external_tensors
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import BundleError
from satchel.runtime.optimize.stored import Stored

VALUES_AT_ONCE = 1 << 22
"""How many weights are packed at a time."""


def make_weights(bundle: Bundle, variant: Variant, path: Path) -> None:
    """Write the weights of a variant's graph to `path` in its layout, a few outputs at a time.

    Raises:
        BundleError: The variant's graph does not match the portable graphs.
    """
    layout = Layout(variant.weights.layout)
    made = external_tensors(bundle.path(variant.graph.file).read_bytes())
    # A variant may run both phases, and the two may store some weights in different forms.
    graphs = [external_tensors(bundle.graph_path(phase).read_bytes()) for phase in ("decode", "prefill")]
    stored = {name: tensor for tensors in graphs for name, tensor in tensors.items()}
    with path.open("wb") as file:
        for name, gated in _weights(layout, variant.weights.file, made):
            try:
                _write(file, bundle, layout, Stored.of(stored, name), made, name, gated)
            except (KeyError, ValueError):
                raise BundleError(
                    f"{bundle.folder / MANIFEST_NAME}: the weight {name} of {variant.name} does not match "
                    "one of prefill or decode: export the bundle again"
                ) from None


def _weights(layout: Layout, file: str, made: dict[str, Tensor]) -> Iterator[tuple[str, bool]]:
    """The name of each weight in this layout, and whether it is gated."""
    endings = {values_ending(layout, gated=gated): gated for gated in (True, False)}
    for name, tensor in made.items():
        for ending, gated in endings.items():
            if name.endswith(ending) and tensor.place.get("location") == file:
                yield name.removesuffix(ending), gated


def _write(
    file: BinaryIO, bundle: Bundle, layout: Layout, stored: Stored, made: dict[str, Tensor], name: str, gated: bool
) -> None:
    """Write all parts of a weight at the graph's offsets. Raises KeyError or ValueError if the graph does not match."""
    wanted = parts(layout, stored.form, gated=gated)
    tensors = {ending: made[name + ending] for ending in wanted}
    for ending, part in wanted.items():
        if (tensors[ending].dims, tensors[ending].dtype) != (part.shape, part.dtype.onnx):
            raise ValueError(f"{name}{ending} is {tensors[ending]} and not {part}")
    zero_points = f"{values_ending(layout, gated=gated).removesuffix('s')}_zero_points"
    if zero_points not in wanted and f"{name}{zero_points}" in made:
        raise ValueError(f"{name} is symmetric and has {zero_points}")
    content = np.memmap(bundle.path(stored.codes.place["location"]), np.uint8, "r")
    ends = {ending: int(tensor.place["offset"]) for ending, tensor in tensors.items()}
    whole = {ending: np.empty(part.shape, part.dtype.name) for ending, part in wanted.items() if part.axis}

    def put(ending: str, data: Array) -> None:
        file.seek(ends[ending])
        ends[ending] += file.write(np.ascontiguousarray(data).data)

    for ranges in _ranges(stored, halves=2 if gated else 1):
        for ending, data in pack(layout, stored.read(content, ranges), gated=gated).items():
            if ending in whole:  # its outputs are not contiguous in the file
                whole[ending][:, slice(*ranges[0])] = data
            else:
                put(ending, data)
    for ending, data in whole.items():
        put(ending, data)


def _ranges(stored: Stored, halves: int) -> Iterator[list[tuple[int, int]]]:
    """The ranges (first, last + 1) of outputs to pack at a time, in whole panels, one range for each half."""
    inputs, outputs = stored.dims
    half = outputs // halves
    step = max(VALUES_AT_ONCE // (inputs * PANEL * halves), 1) * PANEL
    for first in range(0, half, step):
        last = min(first + step, half)
        yield [(start + first, start + last) for start in range(0, halves * half, half)]
