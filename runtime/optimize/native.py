"""Makes the weights that satchel's own kernels read, in panels of outputs, of those that a bundle stores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.bundle.manifest import MANIFEST_NAME
from satchel.runtime.bundle.onnx_wire import Tensor, external_tensors
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import BundleError
from satchel.runtime.optimize.stored import CODE_TYPES, Stored, floats, integers

NATIVE_NAME = "native.bin"
"""The file in which the native graph says that its weights are; no bundle has it."""

GATED, PLAIN = ".gated_", "."
"""What comes between a weight's name and `panels`, `panel_scales` and `panel_zero_points`; `GATED` where the outputs
are two halves, of which one is multiplied by the activated other.
"""

OUTPUTS, INPUTS = 16, 4
"""Outputs of a panel, and neighboring inputs of one output in it: what one instruction multiplies."""

CODES_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class _Weight:
    """A weight as it is stored, and what is to be made of it."""

    stored: Stored
    halves: int
    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None

    @property
    def panels(self) -> int:
        """Panels of one half."""
        return -(-(self.stored.codes.dims[1] // self.halves) // OUTPUTS)

    @property
    def bits(self) -> int:
        """8 or 4."""
        return CODE_TYPES[self.stored.codes.dtype][0]

    def check(self) -> None:
        """Raise ValueError unless what is to be made has the shapes and types of this weight's panels."""
        (inputs, outputs), panels = self.stored.codes.dims, self.panels * self.halves
        blocks = self.stored.scales.nbytes // (4 * outputs)
        size = OUTPUTS * (-(-inputs // INPUTS) * INPUTS if self.bits == 8 else inputs // 2)
        signed = CODE_TYPES[self.stored.codes.dtype][1]
        fits = (
            outputs % self.halves == 0
            and (self.bits == 8 or inputs % (2 * INPUTS) == 0)
            and blocks > 0
            and inputs % blocks == 0
            and self.codes.dims == (panels, size)
            and self.scales.dims == (panels, blocks, OUTPUTS)
            and (self.zero_points is None) == (self.stored.zero_points is None)
            and (signed or self.zero_points is not None)
            and (self.zero_points is None or self.zero_points.dims == (panels, blocks, OUTPUTS))
        )
        if not fits:
            raise ValueError(f"{self.codes.dims} and {self.scales.dims} for {self.stored.codes.dims}")


def make_native(bundle: Bundle, path: Path) -> None:
    """Write the file that the bundle's native graph reads its weights from.

    Panels of 16 outputs, the last one filled up with outputs of scale 0, hold codes uint8 by groups of inputs: in 8
    bits [ceil(inputs / 4), 16, 4], in 4 bits [inputs / 8, 16, 4], where the low half of a byte has the code of one of
    the first four inputs of eight, and the high half that of one of the last four. Signed codes get 128 or 8 added.
    Scales and zero points are [panels, blocks, 16]. Of a gated weight each half of the outputs has panels of its own,
    which take turns.

    Raises BundleError where the graphs do not belong together.
    """
    made = external_tensors(bundle.graph_path("native").read_bytes())
    # Both phases read one set of weights, and decode may have some of them in another form.
    graphs = [external_tensors(bundle.graph_path(phase).read_bytes()) for phase in ("decode", "prefill")]
    stored = {name: tensor for graph in graphs for name, tensor in graph.items()}
    with path.open("wb") as file:
        for name, tensor in made.items():
            if tensor.place.get("location") != NATIVE_NAME or not name.endswith("panels"):
                continue
            weight = _weight(bundle, made, stored, name)
            content = np.memmap(bundle.path(weight.stored.codes.place["location"]), np.uint8, "r")
            for target, parts in _parts(weight, content):
                file.seek(int(target.place["offset"]))
                for part in parts:
                    file.write(np.ascontiguousarray(part).data)


def native_bytes(bundle: Bundle) -> int:
    """How many bytes the weights in panels have. Raises BundleError for a bundle without a graph for them."""
    tensors = external_tensors(bundle.graph_path("native").read_bytes()).values()
    return sum(int(tensor.place["length"]) for tensor in tensors if tensor.place.get("location") == NATIVE_NAME)


def _weight(bundle: Bundle, made: dict[str, Tensor], stored: dict[str, Tensor], name: str) -> _Weight:
    infix = GATED if name.endswith(f"{GATED}panels") else PLAIN
    start = name.removesuffix(f"{infix}panels")
    try:
        weight = _Weight(
            Stored.of(stored, start),
            2 if infix == GATED else 1,
            made[name],
            made[f"{start}{infix}panel_scales"],
            made.get(f"{start}{infix}panel_zero_points"),
        )
        weight.check()
    except (KeyError, ValueError):
        raise BundleError(
            f"{bundle.folder / MANIFEST_NAME}: graphs.native has a weight {start} that prefill has not: "
            "export the bundle again"
        ) from None
    return weight


def _parts(weight: _Weight, content: NDArray[np.uint8]) -> Iterator[tuple[Tensor, Iterator[NDArray[Any]]]]:
    """What is to be written for each tensor that is made, a few panels at a time."""
    stored, middle = weight.stored, 1 << weight.bits - 1
    step = max(CODES_AT_ONCE // (stored.codes.dims[0] * OUTPUTS * weight.halves), 1)

    def codes() -> Iterator[NDArray[Any]]:
        for columns in _columns(weight, step):
            found = [_filled(_unsigned(content, stored.codes, start, stop), middle) for start, stop in columns]
            yield _taking_turns([_panels(half, weight.bits, middle) for half in found])

    def rows(tensor: Tensor, fill: int) -> Iterator[NDArray[Any]]:
        for columns in _columns(weight, weight.panels):
            found = [
                floats(content, tensor, *place) if fill == 0 else _unsigned(content, tensor, *place)
                for place in columns
            ]
            halves = [_filled(half, fill) for half in found]
            yield _taking_turns([half.reshape(len(half), -1, OUTPUTS).transpose(1, 0, 2) for half in halves])

    yield weight.codes, codes()
    yield weight.scales, rows(stored.scales, 0)
    if weight.zero_points is not None and stored.zero_points is not None:
        yield weight.zero_points, rows(stored.zero_points, middle)


def _columns(weight: _Weight, step: int) -> Iterator[list[tuple[int, int]]]:
    """The outputs of `step` panels after the other: of each half the first, and the one after the last."""
    half = weight.stored.codes.dims[1] // weight.halves
    for first in range(0, half, step * OUTPUTS):
        last = min(first + step * OUTPUTS, half)
        yield [(start + first, start + last) for start in range(0, weight.halves * half, half)]


def _unsigned(content: NDArray[np.uint8], tensor: Tensor, start: int, stop: int) -> NDArray[np.uint8]:
    """Codes as numbers from 0: signed ones with 128, or 8 in 4 bits, added."""
    found = integers(content, tensor, start, stop)
    bits, signed = CODE_TYPES[tensor.dtype]
    if not signed:
        return found.view(np.uint8)
    return found.view(np.uint8) ^ np.uint8(128) if bits == 8 else found.view(np.uint8) + np.uint8(8)


def _filled(rows: NDArray[Any], fill: int) -> NDArray[Any]:
    """The same with as many columns, of `fill`, as make whole panels."""
    missing = -rows.shape[1] % OUTPUTS
    return np.pad(rows, ((0, 0), (0, missing)), constant_values=fill) if missing else rows


def _panels(codes: NDArray[Any], bits: int, fill: int) -> NDArray[Any]:
    """Codes [inputs, outputs] of whole panels as [panels, groups of inputs, 16, 4] uint8."""
    outputs = codes.shape[1]
    if bits == 4:
        eights = codes.reshape(-1, 2, INPUTS, outputs)
        grouped = eights[:, 0] | eights[:, 1] << np.uint8(4)
    else:
        missing = -len(codes) % INPUTS
        whole = np.pad(codes, ((0, missing), (0, 0)), constant_values=fill) if missing else codes
        grouped = whole.reshape(-1, INPUTS, outputs)
    # Four bytes as one number: the inputs of an output come together, then whole rows of a panel move at once.
    together = np.empty((len(grouped), outputs, INPUTS), np.uint8)
    for place in range(INPUTS):
        together[:, :, place] = grouped[:, place]
    words = together.view(np.uint32).reshape(len(grouped), -1, OUTPUTS)
    return words.transpose(1, 0, 2)


def _taking_turns(halves: list[NDArray[Any]]) -> NDArray[Any]:
    """Panels of both halves, one of each after the other; of one, the same."""
    return halves[0] if len(halves) == 1 else np.stack(halves, axis=1)
