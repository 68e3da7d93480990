"""Checks that the external data of a graph file lies in files that the manifest lists."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from satchel.runtime.bundle import onnx_wire
from satchel.runtime.bundle.errors import BundleError
from satchel.runtime.bundle.limits import LIMITS

LOCATION = b"location"
"""The required key of external data: a message without these bytes has none."""

# Fields of each message type that can contain tensors at any depth, as in onnx.proto3.
NESTED: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "function": {7: "node", 11: "attribute"},
    "training": {1: "graph", 2: "graph"},
}

DEEPEST = 64
"""The maximum depth of nested graphs."""


def check_external_data(model: bytes, sizes: Mapping[str, int], name: str) -> None:
    """Check a serialized graph before ONNX Runtime sees it.

    Initializers may have external data within the files of `sizes` (bytes by name); no other tensor may have any.
    `name` is the graph's name in messages. Raises BundleError.
    """
    if len(model) > LIMITS["graph bytes"].most:
        raise BundleError(f"{name}: exceeds the size limit for graphs: export the bundle again, or do not trust it")
    try:
        tensors = onnx_wire.external_tensors(model)
        places = sum(1 for _ in _places(model, "model", DEEPEST))
        if places != len(tensors):
            raise BundleError(
                f"{name}: external data outside the initializers of the main graph is not allowed: "
                "do not trust this bundle"
            )
        for tensor in tensors.values():
            _check_place(tensor, sizes, name)
    except ValueError as error:  # invalid protobuf or UTF-8
        raise BundleError(f"{name}: not an ONNX graph ({error}): export the bundle again") from None


def _check_place(tensor: onnx_wire.Tensor, sizes: Mapping[str, int], name: str) -> None:
    location = tensor.place.get("location", "")
    if location not in sizes:
        raise BundleError(
            f"{name}: the data of {tensor.name[:60]!r} is in {location[:60]!r}, which is not part of the bundle: "
            "do not trust this bundle"
        )
    offset, length = (_number(tensor.place.get(key, "0")) for key in ("offset", "length"))
    if offset + length > sizes[location]:
        raise BundleError(
            f"{name}: the data of {tensor.name[:60]!r} extends beyond the end of {location}: export the bundle again"
        )


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ValueError(f"{text[:30]!r} is not an offset or a length")
    return int(text)


def _places(message: bytes, kind: str, depth: int) -> Iterable[None]:
    """Yields once for each tensor in a message, at any depth, that has external data."""
    if depth == 0:
        raise ValueError("graphs nested too deep")
    if kind == "tensor":
        numbers = {number for number, _, _ in onnx_wire.fields(message)}
        if onnx_wire.TENSOR_EXTERNAL_DATA in numbers:
            yield None
        return
    inner = NESTED[kind]
    for number, content, _ in onnx_wire.fields(message):
        if number in inner and LOCATION in content:
            yield from _places(content, inner[number], depth - 1)
